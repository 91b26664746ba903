//! What a grader says of a completion.

use std::fmt;

/// The verdict on one completion. Every graded completion gets exactly one, and each is counted in the
/// metric `reward_outcome/{name}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It comes to the gold answer.
    Right,
    /// It comes to something else.
    Wrong,
    /// No answer was found in it.
    Unparsable,
    /// The reward did not answer in time.
    Timeout,
    /// The reward failed.
    Error,
}

impl Outcome {
    /// Every outcome, the best first: the order in which reports list them.
    pub const ALL: [Outcome; 5] =
        [Outcome::Right, Outcome::Wrong, Outcome::Unparsable, Outcome::Timeout, Outcome::Error];

    /// Whether it says that a reward failed, and nothing of the completion.
    pub fn is_failure(self) -> bool {
        matches!(self, Outcome::Timeout | Outcome::Error)
    }

    /// The name in files and logs: `right`, `wrong`, `unparsable`, `timeout`, `error`.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Right => "right",
            Outcome::Wrong => "wrong",
            Outcome::Unparsable => "unparsable",
            Outcome::Timeout => "timeout",
            Outcome::Error => "error",
        }
    }

    /// The name of the metric that counts it: `reward_outcome/right` and so on.
    pub fn metric(self) -> String {
        format!("reward_outcome/{}", self.as_str())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_the_promised_names() {
        let names: Vec<String> = Outcome::ALL.iter().map(|outcome| outcome.metric()).collect();
        let promised = ["right", "wrong", "unparsable", "timeout", "error"]
            .map(|name| format!("reward_outcome/{name}"));
        assert_eq!(names, promised);
    }
}
