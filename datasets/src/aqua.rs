//! AQuA-RAT (Ling et al. 2017, "Program Induction by Rationale Generation"): algebra word problems with
//! five options and a rationale.
//!
//! An upstream row (JSON lines in `dev.json` and `test.json`; the hub's parquet files have the same
//! columns):
//!
//! ```json
//! {"question": "What is 3 + 4?", "options": ["A)5", "B)6", "C)7", "D)8", "E)9"],
//!  "rationale": "3 + 4 = 7\nAnswer: C", "correct": "C"}
//! ```
//!
//! The prompt is the question with its options and [`INSTRUCTION`] as the user's message. The target is
//! the rationale and, on a line of its own, `The answer is (C).`; gold is the letter.
//!
//! # Splits
//! `validation` is the official dev set, `test` the official test set (254 rows each). `train` is, in
//! this order: the official `train.json` beside them if it is there, or `aqua_train.tsv`, the 2,728 rows
//! with cleaned rationales of the FLAN collection. Training rows whose question is one of dev or test
//! are left out (two rows of the FLAN file).

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::rows::{kind, text};
use crate::{Error, Message, Problem, Result, Row, locate, read_rows, read_split};

/// What the prompt asks for, behind the options.
pub const INSTRUCTION: &str = "Reason step by step and end with: The answer is (letter).";

/// The folder of the official files.
pub const FOLDER: &str = "aqua";

/// Folder and file of the training rows.
const TRAIN: (&str, &str) = ("aqua-flan-cot", "aqua_train.tsv");

/// The problems of `train`, `validation` or `test`.
///
/// `path` is a folder with the official files, or a fetched hub copy (its configuration's folder);
/// without one they are looked for as `aqua/dev.json` and `aqua-flan-cot/aqua_train.tsv` by
/// [`locate::find`].
///
/// # Errors
/// If the split is unknown, the files are missing, or a row is malformed.
pub fn load(path: Option<&Path>, split: &str) -> Result<Vec<Problem>> {
    match split {
        "validation" | "test" => official(path, split),
        "train" => {
            let held_out = [official(path, "validation")?, official(path, "test")?].concat();
            let held_out: HashSet<String> = held_out.iter().map(question_of).collect();
            let mut problems = train(path)?;
            problems.retain(|problem| !held_out.contains(&question_of(problem)));
            (0..).zip(&mut problems).for_each(|(id, problem)| problem.id = id);
            Ok(problems)
        }
        other => Err(Error::usage(format!(
            "aqua has no split {other}; it has train, validation and test"
        ))),
    }
}

/// Folder and file that hold the rows of `split`.
///
/// # Errors
/// If the split is unknown.
pub fn file_of(split: &str) -> Result<(&'static str, &'static str)> {
    match split {
        "train" => Ok(TRAIN),
        "validation" => Ok((FOLDER, "dev.json")),
        "test" => Ok((FOLDER, "test.json")),
        other => load(None, other).map(|_| TRAIN),
    }
}

/// The question without its options, by which problems are compared.
fn question_of(problem: &Problem) -> String {
    let content = &problem.prompt[0].content;
    content.split("\nOptions:\n").next().unwrap_or_default().trim().to_string()
}

/// The rows of an official split.
fn official(path: Option<&Path>, split: &str) -> Result<Vec<Problem>> {
    let (folder, file) = file_of(split)?;
    let (path, rows) = match path {
        None => {
            let path = locate::find(folder, file)?;
            let rows = read_rows(&path)?;
            (path, rows)
        }
        Some(folder) if folder.join(file).is_file() => {
            (folder.join(file), read_rows(&folder.join(file))?)
        }
        Some(folder) => (folder.to_path_buf(), read_split(folder, split)?),
    };
    problems(&path, &rows)
}

/// The rows to train on.
fn train(path: Option<&Path>) -> Result<Vec<Problem>> {
    let Some(folder) = path else { return flan(&locate::find(TRAIN.0, TRAIN.1)?) };
    let beside = folder.parent().map(|parent| parent.join(TRAIN.0).join(TRAIN.1));
    let whole = folder.join("train.json");
    if whole.is_file() {
        return problems(&whole, &read_rows(&whole)?);
    }
    let found: Option<PathBuf> =
        [Some(folder.join(TRAIN.1)), beside].into_iter().flatten().find(|path| path.is_file());
    match found {
        Some(path) => flan(&path),
        None => problems(folder, &read_split(folder, "train")?),
    }
}

fn problems(path: &Path, rows: &[Row]) -> Result<Vec<Problem>> {
    let numbered = |(i, row)| problem(row).map_err(|message| Error::row(path, i + 1, message));
    let problems = rows.iter().enumerate().map(numbered).collect::<Result<Vec<_>>>()?;
    Ok((0..).zip(problems).map(|(id, problem)| Problem { id, ..problem }).collect())
}

/// An official row.
fn problem(row: &Row) -> std::result::Result<Problem, String> {
    let options = match row.get("options") {
        Some(Value::Array(options)) => options,
        Some(other) => return Err(format!("column options is {}, not a list", kind(other))),
        None => return Err("no column options".to_string()),
    };
    let option = |value: &Value| match value.as_str().and_then(|text| text.split_once(')')) {
        Some((letter, text)) => Ok(format!("({}) {}", letter.trim(), text.trim())),
        None => Err(format!("the option {value} is not written as A)…")),
    };
    let options = options.iter().map(option).collect::<std::result::Result<Vec<_>, _>>()?;
    assemble(
        text(row, "question")?,
        &options.join("\n"),
        text(row, "rationale")?,
        text(row, "correct")?,
    )
}

/// The rows of the FLAN collection's file: question with options, answer, rationale, separated by
/// tabs; a line break in a field is written `\n`.
fn flan(path: &Path) -> Result<Vec<Problem>> {
    let content = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let row = |(i, line): (usize, &str)| -> Result<Problem> {
        let fields: Vec<String> =
            line.split('\t').map(|field| field.replace("\\n", "\n")).collect();
        let parts = match &fields[..] {
            [asked, answer, rationale] => match asked.split_once("\nOptions:\n") {
                Some((question, options)) => {
                    let letter = answer.trim_matches(['(', ')', ' ']);
                    assemble(question, options, rationale, letter)
                }
                None => Err("the question has no Options:".to_string()),
            },
            other => Err(format!("has {} fields separated by tabs, wanted 3", other.len())),
        };
        let problem = parts.map_err(|message| Error::line(path, i + 1, message))?;
        Ok(Problem { id: i as u64, ..problem })
    };
    content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(row).collect()
}

fn assemble(
    question: &str,
    options: &str,
    rationale: &str,
    letter: &str,
) -> std::result::Result<Problem, String> {
    let letter = letter.trim().to_uppercase();
    if !["A", "B", "C", "D", "E"].contains(&letter.as_str()) {
        return Err(format!("the answer {letter:?} is none of A to E"));
    }
    let asked = format!("{}\nOptions:\n{}\n{INSTRUCTION}", question.trim(), options.trim());
    let target = format!("{}\nThe answer is ({letter}).", rationale.trim());
    Ok(Problem { id: 0, prompt: vec![Message::user(asked)], target, gold: letter })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{row, shared};

    #[test]
    fn a_row_becomes_question_options_rationale_and_letter() {
        let columns = json!({"question": "3 + 4? ", "options": ["A)5", "B) 7", "C)9"],
            "rationale": "It is 7\nB", "correct": "b"});
        let problem = problem(&row(columns)).unwrap();
        let asked = format!("3 + 4?\nOptions:\n(A) 5\n(B) 7\n(C) 9\n{INSTRUCTION}");
        assert_eq!(problem.prompt, [Message::user(asked)]);
        assert_eq!(problem.target, "It is 7\nB\nThe answer is (B).");
        assert_eq!(problem.gold, "B");
    }

    #[test]
    fn upstream_counts_are_right_and_no_question_is_in_two_splits() {
        let Some(folder) = shared("aqua") else { return };
        let read = |split| load(Some(&folder), split).unwrap();
        let (train, validation, test) = (read("train"), read("validation"), read("test"));
        assert_eq!([train.len(), validation.len(), test.len()], [2726, 254, 254]);
        let held_out: HashSet<String> = validation.iter().chain(&test).map(question_of).collect();
        assert!(train.iter().all(|problem| !held_out.contains(&question_of(problem))));
        assert!(train.iter().all(|p| p.prompt[0].content.contains("\nOptions:\n(A)")));
        assert_eq!(train.last().unwrap().id, 2725);
    }

    #[test]
    fn malformed_rows_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let good = r#"{"question":"q","options":["A)1"],"rationale":"r","correct":"A"}"#;
        let lines = |first: &str| format!("{first}\n{good}\n");
        write("dev.json", &lines(good));
        for (file, text, split, wanted) in [
            ("test.json", r#"{"question":"q"}"#, "test", "test.json: row 1: no column options"),
            ("test.json", r#"{"question":"q","options":["1"]}"#, "test", "is not written as A)"),
            ("test.json", good, "test", ""),
            ("aqua_train.tsv", "a\tb\n", "train", ".tsv:1: has 2 fields separated by tabs"),
            ("aqua_train.tsv", "a\t(A)\tr\n", "train", ".tsv:1: the question has no Options"),
            ("aqua_train.tsv", "a\\nOptions:\\n(A) 1\t(F)\tr\n", "train", "none of A to E"),
        ] {
            write(file, &if file == "test.json" { lines(text) } else { text.to_string() });
            match load(Some(dir.path()), split) {
                Ok(problems) => assert!(wanted.is_empty() && problems.len() == 2),
                Err(error) => assert!(error.to_string().contains(wanted), "{error}"),
            }
        }
        let error = load(None, "dev").unwrap_err().to_string();
        assert_eq!(error, "aqua has no split dev; it has train, validation and test");
    }
}
