//! Grading by a task's grader, and the proof that a task's own answers grade right.

use std::fmt;

use datasets::Grader;

use crate::outcome::Outcome;
use crate::{digit, exact, letter, numeric};

/// How many bad rows an error names.
const NAMED: usize = 3;
/// How many characters of a target an error quotes, from its end.
const QUOTED: usize = 60;

/// Compares what a completion comes to with the gold answer.
pub fn grade(grader: Grader, completion: &str, gold: &str) -> Outcome {
    match grader {
        Grader::Numeric => numeric::grade(completion, gold),
        Grader::Digit => digit::grade(completion, gold),
        Grader::Letter => letter::grade(completion, gold),
        Grader::Exact => exact::grade(completion, gold),
    }
}

/// Grades every row's own target, given as (id, target, gold), and demands that all are right: a
/// reward that calls the gold answer wrong trains nonsense.
///
/// # Errors
/// If any target does not grade right; the error names the first ones.
pub fn check_gold<'a>(
    grader: Grader,
    rows: impl IntoIterator<Item = (u64, &'a str, &'a str)>,
) -> Result<(), GoldError> {
    let mut error = GoldError { grader, rows: 0, failed: 0, first: Vec::new() };
    for (id, target, gold) in rows {
        error.rows += 1;
        let outcome = grade(grader, target, gold);
        if outcome == Outcome::Right {
            continue;
        }
        error.failed += 1;
        if error.first.len() < NAMED {
            error.first.push(BadGold { id, target: target.into(), gold: gold.into(), outcome });
        }
    }
    if error.failed == 0 { Ok(()) } else { Err(error) }
}

/// A row whose own target does not grade right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadGold {
    /// Number of the row in its split.
    pub id: u64,
    /// Its target.
    pub target: String,
    /// Its gold answer.
    pub gold: String,
    /// What the grader says.
    pub outcome: Outcome,
}

/// A task's own answers do not all grade right. One sentence names the first rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoldError {
    /// The grader.
    pub grader: Grader,
    /// Number of rows checked.
    pub rows: usize,
    /// Number of rows that did not grade right.
    pub failed: usize,
    /// The first of them, at most three.
    pub first: Vec<BadGold>,
}

impl fmt::Display for GoldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grader = format!("{:?}", self.grader).to_lowercase();
        let (failed, rows) = (self.failed, self.rows);
        write!(f, "{failed} of {rows} gold answers do not grade right ({grader} grader): ")?;
        for (i, bad) in self.first.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            let BadGold { id, gold, outcome, .. } = bad;
            let target = ending(&bad.target);
            write!(f, "{comma}row {id} with target {target:?} and gold {gold:?} is {outcome}")?;
        }
        f.write_str("; correct these rows or choose the task's right grader")
    }
}

impl std::error::Error for GoldError {}

/// The end of a text, with dots for what is left out.
fn ending(text: &str) -> String {
    let skipped = text.chars().count().saturating_sub(QUOTED);
    let dots = if skipped > 0 { "…" } else { "" };
    dots.chars().chain(text.chars().skip(skipped)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_grader_reads_its_own_kind() {
        assert_eq!(grade(Grader::Numeric, "so #### 1,234", "1234"), Outcome::Right);
        assert_eq!(grade(Grader::Digit, "3", "3"), Outcome::Right);
        assert_eq!(grade(Grader::Letter, "(B)", "B"), Outcome::Right);
        assert_eq!(grade(Grader::Exact, "the correct answer is true", "true"), Outcome::Right);
    }

    #[test]
    fn a_wrong_gold_answer_is_named() -> Result<(), &'static str> {
        let rows = [(0, "#### 5", "5"), (7, "#### 6", "5"), (9, "none", "5")];
        let error = check_gold(Grader::Numeric, rows).err().ok_or("accepted")?;
        let sentence = "2 of 3 gold answers do not grade right (numeric grader): row 7 with target \
             \"#### 6\" and gold \"5\" is wrong, row 9 with target \"none\" and gold \"5\" is \
             unparsable; correct these rows or choose the task's right grader";
        assert_eq!(error.to_string(), sentence);
        assert_eq!(check_gold(Grader::Numeric, [(0, "#### 5", "5")]), Ok(()));
        Ok(())
    }

    #[test]
    fn many_bad_rows_are_counted_and_long_targets_cut() -> Result<(), &'static str> {
        let long = "é".repeat(500);
        let rows = (0..100).map(|id| (id, long.as_str(), "A"));
        let error = check_gold(Grader::Letter, rows).err().ok_or("accepted")?;
        assert_eq!((error.failed, error.first.len()), (100, 3));
        assert!(error.to_string().chars().count() < 500);
        Ok(())
    }
}
