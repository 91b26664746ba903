//! Short arithmetic word problems: AddSub (Hosseini et al. 2014), MultiArith (Roy and Roth 2015) and
//! SingleEq (Koncel-Kedziorski et al. 2015), in the files of MAWPS.
//!
//! ```json
//! {"sQuestion": "Joan found 70 shells . She gave away 27 . How many are left ? ", "lSolutions": ["43"]}
//! ```
//!
//! Prompts ask as those of [`crate::gsm8k`] do, so that a policy that learnt on these can be evaluated
//! there. The target is `#### 43`: there is no worked solution.
//!
//! Upstream has no splits: the last 100 rows of a file are `test`, the 50 before them `validation`, the
//! others `train`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::gsm8k::INSTRUCTION;
use crate::rows::{kind, text};
use crate::{Error, Message, Problem, Result, Row, locate, read_rows};

/// The folder of the files.
const FOLDER: &str = "llm-adapters";
/// Rows of the test split.
const TEST: usize = 100;
/// Rows of the validation split.
const VALIDATION: usize = 50;

/// The problems of a split of the set whose file is `<name>/<name>.json`.
///
/// `path` is that file, its folder, or a folder that holds it; without one it is looked for as
/// `llm-adapters/<name>/<name>.json` by [`locate::find`].
///
/// # Errors
/// If the split is unknown, the file is missing, or a row is malformed.
pub fn load(name: &str, path: Option<&Path>, split: &str) -> Result<Vec<Problem>> {
    let file = file(name, path)?;
    let rows = read_rows(&file)?;
    let test = rows.len().saturating_sub(TEST);
    let validation = test.saturating_sub(VALIDATION);
    let range = match split {
        "train" => 0..validation,
        "validation" => validation..test,
        "test" => test..rows.len(),
        other => {
            let name = name.to_lowercase();
            return Err(Error::usage(format!(
                "{name} has no split {other}; it has train, validation and test"
            )));
        }
    };
    let numbered = |i: usize| {
        let problem = problem(&rows[i]).map_err(|message| Error::row(&file, i + 1, message))?;
        Ok(Problem { id: i as u64, ..problem })
    };
    range.map(numbered).collect()
}

fn file(name: &str, path: Option<&Path>) -> Result<PathBuf> {
    let (own, below) = (format!("{name}.json"), format!("{name}/{name}.json"));
    match path {
        None => locate::find(FOLDER, &below),
        Some(folder) if folder.join(&below).is_file() => Ok(folder.join(below)),
        Some(folder) if folder.is_dir() => Ok(folder.join(own)),
        Some(file) => Ok(file.to_path_buf()),
    }
}

fn problem(row: &Row) -> std::result::Result<Problem, String> {
    let question = text(row, "sQuestion")?.trim();
    let gold = match row.get("lSolutions").and_then(|list| list.get(0)) {
        Some(Value::String(text)) => text.trim().to_string(),
        Some(Value::Number(number)) => number.to_string(),
        Some(other) => return Err(format!("the solution is {}, not a number", kind(other))),
        None => return Err("column lSolutions holds no number".to_string()),
    };
    let gold = gold.strip_suffix(".0").unwrap_or(&gold).to_string();
    if gold.parse::<f64>().is_err() {
        return Err(format!("the solution {gold} is no number"));
    }
    let prompt = vec![Message::user(format!("{question}\n{INSTRUCTION}"))];
    Ok(Problem { id: 0, prompt, target: format!("#### {gold}"), gold })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{file, row, shared};

    #[test]
    fn a_row_becomes_question_and_number() {
        for (solution, gold) in
            [(json!(["43"]), "43"), (json!([39.0]), "39"), (json!([0.5]), "0.5")]
        {
            let row = row(json!({"sQuestion": " How many ? ", "lSolutions": solution}));
            let problem = problem(&row).unwrap();
            assert_eq!(problem.prompt, [Message::user(format!("How many ?\n{INSTRUCTION}"))]);
            assert_eq!((problem.target, problem.gold), (format!("#### {gold}"), gold.to_string()));
        }
    }

    #[test]
    fn upstream_counts_and_splits_are_right() {
        let Some(folder) = shared("llm-adapters") else { return };
        for (name, rows) in [("AddSub", 395), ("MultiArith", 600), ("SingleEq", 508)] {
            let read = |split| load(name, Some(&folder), split).unwrap();
            let (train, validation, test) = (read("train"), read("validation"), read("test"));
            let sizes = [train.len(), validation.len(), test.len()];
            assert_eq!(sizes, [rows - 150, 50, 100]);
            assert_eq!(test[99].id, rows as u64 - 1);
        }
    }

    #[test]
    fn malformed_rows_and_unknown_splits_are_named() {
        for (columns, wanted) in [
            (json!({"sQuestion": "a"}), ": row 1: column lSolutions holds no number"),
            (
                json!({"sQuestion": "a", "lSolutions": ["x"]}),
                ": row 1: the solution x is no number",
            ),
            (json!({"lSolutions": [1]}), ": row 1: no column sQuestion"),
        ] {
            let (_folder, path) = file("AddSub.json", json!([columns]).to_string());
            let error = load("AddSub", Some(&path), "test").unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        let (_folder, path) = file("AddSub.json", "[]");
        let error = load("AddSub", Some(&path), "dev").unwrap_err().to_string();
        assert!(error.starts_with("addsub has no split dev"), "{error}");
    }
}
