//! What a reward is: a function of completions.

use std::path::PathBuf;

use datasets::{Prompt, Row};

use crate::outcome::Outcome;

/// One completion to be scored.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// What it continues.
    pub prompt: &'a Prompt,
    /// Its text.
    pub completion: &'a str,
    /// Its tokens, the one that ended it included.
    pub completion_ids: &'a [u32],
    /// Every further column of the prompt's row.
    pub columns: &'a Row,
}

/// What a reward says of a completion.
#[derive(Clone, Debug, PartialEq)]
pub enum Score {
    /// A number.
    Value(f64),
    /// A number with the verdict that it stands for.
    Graded(f64, Outcome),
    /// Nothing: the reward is not for this completion (`None` in Python).
    NotApplicable,
    /// The reward did not answer in time.
    Timeout,
    /// The reward failed, and why.
    Error(String),
}

/// A reward. A Rust recipe implements it for a type of its own:
///
/// ```
/// use reward::{Reward, Sample, Score};
///
/// struct Short;
///
/// impl Reward for Short {
///     fn name(&self) -> &str {
///         "short"
///     }
///
///     fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
///         samples.iter().map(|s| Score::Value(-(s.completion.len() as f64))).collect()
///     }
/// }
/// ```
pub trait Reward {
    /// What metrics call it: `rewards/{name}/mean`.
    fn name(&self) -> &str;

    /// Gets ready, so that what is wrong with it shows before training.
    ///
    /// # Errors
    /// One sentence why it cannot.
    fn start(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// The file that holds what it said of itself besides its scores, if it said anything.
    fn log(&self) -> Option<PathBuf> {
        None
    }

    /// One score for each sample.
    fn score(&mut self, samples: &[Sample]) -> Vec<Score>;
}

/// `"it gave 1 reward for 3 completions"`.
pub(crate) fn miscounted(what: &str, given: usize, samples: usize) -> String {
    let counted = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    format!("it gave {} for {}", counted(given, what), counted(samples, "completion"))
}
