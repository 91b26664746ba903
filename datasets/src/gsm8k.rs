//! GSM8K (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"): grade-school maths
//! word problems with worked solutions.
//!
//! An upstream row (JSONL; the hub's parquet files have the same columns):
//!
//! ```json
//! {"question": "Tom has 3 boxes of 12 eggs. He eats 6 eggs. How many are left?",
//!  "answer": "Tom has 3*12 = <<3*12=36>>36 eggs.\nThen 36-6 = <<36-6=30>>30 are left.\n#### 30"}
//! ```
//!
//! The prompt is the question and [`INSTRUCTION`] as the user's message. The target is the answer
//! without its calculator marks `<<…>>`; gold is the number behind `#### `, without the commas
//! between thousands.
//!
//! Upstream has train (7,473 rows) and test (1,319). `validation` is the last 473 rows of train
//! (the last tenth of a smaller copy), which `train` leaves out: 7,000 remain.

use std::path::Path;

use crate::rows::text;
use crate::{Error, Message, Problem, Result, Row, locate, read_rows, read_split};

/// What the prompt asks for, on a line behind the question.
pub const INSTRUCTION: &str = "Solve the problem step by step and end with #### and the number.";

/// The folder of the upstream files.
pub const FOLDER: &str = "gsm8k";

/// Most rows of the upstream train split that are kept for validation.
const VALIDATION: usize = 473;

/// The problems of `train`, `validation` or `test`.
///
/// `path` is a folder with the upstream files or a fetched hub copy (its configuration's folder);
/// without one the files are looked for as `gsm8k/train.jsonl` by [`locate::find`].
///
/// # Errors
/// If the split is unknown, the files are missing, or a row is malformed.
pub fn load(path: Option<&Path>, split: &str) -> Result<Vec<Problem>> {
    let stored = upstream_split(split)?;
    let (path, mut rows) = match path {
        Some(folder) if folder.is_file() => {
            let message = "is a file; give the folder that holds train.jsonl and test.jsonl";
            return Err(Error::usage(format!("{}: {message}", folder.display())));
        }
        Some(folder) => (folder.to_path_buf(), read_split(folder, stored)?),
        None => {
            let file = locate::find(FOLDER, &format!("{stored}.jsonl"))?;
            let rows = read_rows(&file)?;
            (file, rows)
        }
    };
    let kept = rows.len() - VALIDATION.min(rows.len() / 10);
    match split {
        "train" => rows.truncate(kept),
        "validation" => rows = rows.split_off(kept),
        _ => {}
    }
    let first = if split == "validation" { kept } else { 0 };
    let numbered = |(i, row)| {
        problem(i as u64, row).map_err(|message| Error::row(&path, first + i + 1, message))
    };
    rows.iter().enumerate().map(numbered).collect()
}

/// The upstream file that holds the rows of `split`.
///
/// # Errors
/// If the split is unknown.
pub fn file_of(split: &str) -> Result<String> {
    Ok(format!("{}.jsonl", upstream_split(split)?))
}

/// The upstream split that holds the rows of `split`.
fn upstream_split(split: &str) -> Result<&str> {
    match split {
        "train" | "test" => Ok(split),
        "validation" => Ok("train"),
        other => Err(Error::usage(format!(
            "gsm8k has no split {other}; it has train, validation and test"
        ))),
    }
}

fn problem(id: u64, row: &Row) -> std::result::Result<Problem, String> {
    let question = text(row, "question")?;
    let target = without_marks(text(row, "answer")?);
    let Some((_, gold)) = target.rsplit_once("#### ") else {
        return Err("the answer has no number behind \"#### \"".to_string());
    };
    let gold = gold.trim().replace(',', "");
    if gold.parse::<f64>().is_err() {
        return Err(format!("the answer ends with {gold}, which is not a number"));
    }
    let prompt = vec![Message::user(format!("{question}\n{INSTRUCTION}"))];
    Ok(Problem { id, prompt, target, gold })
}

/// `answer` without its calculator marks; one that is not closed stays.
fn without_marks(answer: &str) -> String {
    let mut out = String::with_capacity(answer.len());
    let mut rest = answer;
    while let Some((before, mark)) = rest.split_once("<<") {
        let Some((_, after)) = mark.split_once(">>") else { break };
        out.push_str(before);
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{file, row, shared};

    #[test]
    fn a_row_becomes_question_solution_and_number() {
        let answer = "a = <<3*400=1200>>1,200 b.\n<<x\n#### 1,200";
        let problem = problem(4, &row(json!({"question": "Why?", "answer": answer}))).unwrap();
        assert_eq!(problem.prompt, [Message::user(format!("Why?\n{INSTRUCTION}"))]);
        assert_eq!(problem.target, "a = 1,200 b.\n<<x\n#### 1,200");
        assert_eq!((problem.id, problem.gold.as_str()), (4, "1200"));
    }

    #[test]
    fn upstream_counts_and_splits_are_right() {
        let Some(folder) = shared("gsm8k") else { return };
        let read = |split| load(Some(&folder), split).unwrap();
        let (train, validation, test) = (read("train"), read("validation"), read("test"));
        assert_eq!([train.len(), validation.len(), test.len()], [7000, 473, 1319]);
        assert_eq!(read_split(&folder, "train").unwrap().len(), 7473);
        let last = read_split(&folder, "train").unwrap().pop().unwrap();
        let question = last["question"].as_str().unwrap();
        assert!(validation[472].prompt[0].content.starts_with(question));
        for problem in train.iter().chain(&validation).chain(&test) {
            assert!(!problem.target.contains("<<") && problem.target.contains("#### "));
        }
    }

    #[test]
    fn malformed_rows_and_unknown_splits_are_named() {
        for (columns, wanted) in [
            (json!({"question": "a"}), ": row 1: no column answer; the row has question"),
            (json!({"question": "a", "answer": "b"}), ": row 1: the answer has no number behind"),
            (json!({"question": "a", "answer": "#### many"}), ": row 1: the answer ends with many"),
            (json!({"question": 7, "answer": "#### 1"}), ": row 1: column question is a number"),
        ] {
            let (folder, _) = file("train.jsonl", columns.to_string());
            let error = load(Some(folder.path()), "train").unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        let error = load(None, "dev").unwrap_err().to_string();
        assert_eq!(error, "gsm8k has no split dev; it has train, validation and test");
        let (_folder, path) = file("train.jsonl", "");
        assert!(load(Some(&path), "train").unwrap_err().to_string().contains("give the folder"));
    }
}
