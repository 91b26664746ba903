//! Instructions in Alpaca form or as messages.
//!
//! An Alpaca row (Taori et al. 2023), whose `input` may be empty or missing:
//!
//! ```json
//! {"instruction": "Name the capital.", "input": "France", "output": "Paris."}
//! ```
//!
//! The user's message is the instruction and, after an empty line, the input; the answer is the
//! output. A row of messages ends with the assistant's, which is the answer.
//!
//! Without a path the data are `instruction-data/instruction-data.json` (1,100 rows, from "Build a
//! Large Language Model From Scratch"), split as its author does: in file order 85 % train, 10 %
//! test, and the rest, about 5 %, validation.

use std::path::Path;

use serde_json::Value;

use crate::example::{filled, message};
use crate::rows::text;
use crate::{Error, Example, Result, Row, locate, map_rows, read_rows, read_split};

/// The examples of `train`, `test` or `validation`.
///
/// `path` is a file, which is split as above, or a folder with a file a split.
///
/// # Errors
/// If the split is unknown, the file is missing, or a row is neither in Alpaca form nor messages.
pub fn load(path: Option<&Path>, split: &str) -> Result<Vec<Example>> {
    let path = match path {
        Some(path) => path.to_path_buf(),
        None => locate::find("instruction-data", "instruction-data.json")?,
    };
    let rows = if path.is_dir() {
        read_split(&path, split)?
    } else {
        let rows = read_rows(&path)?;
        let range = range(split, rows.len())?;
        rows[range].to_vec()
    };
    map_rows(&rows, example)
}

/// The rows of a split among all `n` in file order.
fn range(split: &str, n: usize) -> Result<std::ops::Range<usize>> {
    let (train, test) = (n * 85 / 100, n * 10 / 100);
    match split {
        "train" => Ok(0..train),
        "test" => Ok(train..train + test),
        "validation" => Ok(train + test..n),
        other => Err(Error::usage(format!(
            "instruct has no split {other}; it has train, test and validation"
        ))),
    }
}

/// The conversation of an Alpaca row or a row of messages, as [`Example::Chat`].
///
/// # Errors
/// If the row is neither, its messages do not end with text of the assistant, or the answer is
/// empty.
pub fn example(row: &Row) -> Result<Example> {
    if row.contains_key("messages") {
        return match Example::from_row(row)? {
            Example::Messages(messages) => answered(messages),
            other => Ok(other),
        };
    }
    let instruction = text(row, "instruction").map_err(Error::usage)?;
    let completion = filled(text(row, "output").map_err(Error::usage)?.to_string())?;
    let question = match row.get("input") {
        None | Some(Value::Null) => instruction.to_string(),
        Some(_) => match text(row, "input").map_err(Error::usage)? {
            "" => instruction.to_string(),
            input => format!("{instruction}\n\n{input}"),
        },
    };
    Ok(Example::Chat { prompt: vec![message("user", &question)], completion })
}

fn answered(mut messages: Vec<Value>) -> Result<Example> {
    let last = messages.pop().filter(|last| last["role"] == "assistant");
    match last.as_ref().map(|last| &last["content"]) {
        Some(Value::String(completion)) if !messages.is_empty() => {
            Ok(Example::Chat { prompt: messages, completion: filled(completion.clone())? })
        }
        _ => Err(Error::usage(
            "messages of an instruction are a prompt and, last, text of the role assistant",
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{file, row, shared};

    fn chat(prompt: &str, completion: &str) -> Example {
        Example::Chat { prompt: vec![message("user", prompt)], completion: completion.into() }
    }

    #[test]
    fn alpaca_rows_and_messages_become_conversations() {
        let turns = json!([message("user", "a"), message("assistant", "b")]);
        for (columns, wanted) in [
            (json!({"instruction": "a", "input": "x", "output": "b"}), chat("a\n\nx", "b")),
            (json!({"instruction": "a", "input": "", "output": "b"}), chat("a", "b")),
            (json!({"instruction": "a", "input": null, "output": "b"}), chat("a", "b")),
            (json!({"instruction": "a", "output": "b"}), chat("a", "b")),
            (json!({"messages": turns}), chat("a", "b")),
        ] {
            assert_eq!(example(&row(columns)).unwrap(), wanted);
        }
    }

    #[test]
    fn other_rows_are_refused() {
        for (columns, wanted) in [
            (json!({"instruction": "a"}), "no column output; the row has instruction"),
            (json!({"instruction": "a", "output": ""}), "the completion is empty"),
            (json!({"instruction": 1, "output": "b"}), "column instruction is a number, not text"),
            (json!({"messages": [message("user", "a")]}), "last, text of the role assistant"),
            (json!({"messages": [message("assistant", "a")]}), "are a prompt and"),
        ] {
            let error = example(&row(columns)).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn a_file_is_split_in_its_order() {
        let Some(path) = shared("instruction-data/instruction-data.json") else { return };
        let read = |split| load(Some(&path), split).unwrap();
        let splits = [read("train"), read("test"), read("validation")];
        assert_eq!(splits.each_ref().map(Vec::len), [935, 110, 55]);
        let all: Vec<_> = splits.into_iter().flatten().collect();
        assert_eq!(all, map_rows(&read_rows(&path).unwrap(), example).unwrap());
        assert!(load(Some(&path), "dev").unwrap_err().to_string().contains("no split dev"));
    }

    #[test]
    fn a_folder_has_its_own_splits() {
        let (folder, _) = file("dev.jsonl", r#"{"instruction":"a","output":"b"}"#);
        assert_eq!(load(Some(folder.path()), "dev").unwrap(), [chat("a", "b")]);
        assert!(load(Some(folder.path()), "train").unwrap_err().to_string().contains("found dev"));
    }
}
