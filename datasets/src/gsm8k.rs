//! GSM8K (Cobbe et al. 2021): grade-school maths word problems with worked solutions.
use std::path::Path;

use crate::{Error, Message, Problem, Result};

/// Reads a split.
pub fn load(path: &Path) -> Result<Vec<Problem>> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    text.lines()
        .enumerate()
        .map(|(i, line)| {
            let row: serde_json::Value = serde_json::from_str(line).map_err(|e| Error::Row {
                path: path.to_path_buf(),
                line: i + 1,
                message: e.to_string(),
            })?;
            let question = row["question"].as_str().unwrap_or_default();
            let target = without_marks(row["answer"].as_str().unwrap_or_default());
            let gold = target.rsplit("#### ").next().unwrap_or_default().replace(',', "");
            let ask = "Solve the problem step by step. End with #### and the answer.";
            let prompt = vec![Message::user(format!("{question}\n{ask}"))];
            Ok(Problem { id: i as u64, prompt, target, gold })
        })
        .collect()
}

fn without_marks(answer: &str) -> String {
    let mut out = String::new();
    let mut rest = answer;
    while let Some(start) = rest.find("<<") {
        out.push_str(&rest[..start]);
        rest = rest[start..].find(">>").map_or("", |end| &rest[start + end + 2..]);
    }
    out + rest
}
