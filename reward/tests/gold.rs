//! The gold answers of published tasks grade right on their own worked solutions.

use std::path::{Path, PathBuf};

use datasets::{Grader, Task, TaskOptions};
use reward::{Outcome, check_gold, final_letter, grade};
use serde_json::Value;

type Checked = Result<(), Box<dyn std::error::Error>>;

/// The rows of a JSONL file of the shared data, or none (said on stderr) where it is missing.
fn rows(name: &str) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(name);
    if !path.is_file() {
        eprintln!("skipped: {name} is not in the shared data folder");
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path)?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// A worked solution without its `<<…>>` calculator marks.
fn without_marks(answer: &str) -> String {
    let mut pieces = answer.split("<<");
    let first = pieces.next().unwrap_or_default().to_string();
    pieces.fold(first, |out, piece| out + piece.split_once(">>").map_or("", |(_, after)| after))
}

#[test]
fn gsm8k_targets_grade_right_and_shifted_golds_wrong() -> Checked {
    for name in ["gsm8k/train.jsonl", "gsm8k/test.jsonl"] {
        let targets = rows(name)?
            .iter()
            .map(|row| without_marks(row["answer"].as_str().unwrap_or("")))
            .collect::<Vec<_>>();
        let gold = |target: &String| target.rsplit("#### ").next().unwrap_or("").replace(',', "");
        let golds: Vec<String> = targets.iter().map(gold).collect();
        let pairs = targets.iter().zip(&golds).enumerate();
        check_gold(Grader::Numeric, pairs.map(|(i, (t, g))| (i as u64, t.as_str(), g.as_str())))?;
        for (target, gold) in targets.iter().zip(&golds) {
            let other = format!("{gold}.5");
            assert_eq!(grade(Grader::Numeric, target, &other), Outcome::Wrong, "{target}");
        }
    }
    Ok(())
}

#[test]
fn every_split_of_a_graded_task_grades_right() -> Checked {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    for name in Task::names() {
        let task = Task::by_name(name)?;
        if task.grader().is_none() {
            continue;
        }
        let path = match name {
            "gsm8k" | "aqua" | "listops" => root.join(name),
            _ => root.join("llm-adapters"),
        };
        let options = TaskOptions { path: Some(path.clone()), ..TaskOptions::default() };
        for split in task.splits() {
            let generated = task == Task::ListOps && *split != "official";
            if !generated && !path.is_dir() {
                eprintln!("skipped: {} {split} is not in the shared data folder", task.name());
                continue;
            }
            let problems = task.problems(split, 0, &options)?;
            let rows = problems.iter().map(|p| (p.id, p.target.as_str(), p.gold.as_str()));
            check_gold(task.grader().ok_or("no grader")?, rows)?;
        }
    }
    Ok(())
}

#[test]
fn gsm8k_solutions_without_their_ending_mostly_agree() -> Checked {
    let rows = rows("gsm8k/test.jsonl")?;
    let agrees = |row: &&Value| {
        let answer = without_marks(row["answer"].as_str().unwrap_or(""));
        let (solution, gold) = answer.split_once("#### ").unwrap_or_default();
        grade(Grader::Numeric, solution, gold) == Outcome::Right
    };
    let right = rows.iter().filter(agrees).count();
    assert!(right * 100 >= rows.len() * 90, "{right} of {} by the last number", rows.len());
    Ok(())
}

#[test]
fn aqua_rationales_that_end_in_a_letter_mostly_agree() -> Checked {
    let rows = rows("aqua/test.json")?;
    let read = |row: &Value| {
        let letter = final_letter(row["rationale"].as_str()?)?;
        Some(row["correct"].as_str()? == letter.to_string())
    };
    let verdicts: Vec<bool> = rows.iter().filter_map(read).collect();
    let right = verdicts.iter().filter(|verdict| **verdict).count();
    assert!(right * 100 >= verdicts.len() * 90, "{right} of {} letters", verdicts.len());
    Ok(())
}
