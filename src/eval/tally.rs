//! What the answers of an evaluation came to, counted.

use std::fmt;

use reward::Outcome;

use super::Proportion;
use crate::report::Metrics;

/// How many answers came to each outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// In the order of [`Outcome::ALL`].
    counts: [usize; Outcome::ALL.len()],
}

impl Tally {
    /// Counts outcomes.
    pub fn new(outcomes: impl Iterator<Item = Outcome>) -> Self {
        let mut counts = [0; Outcome::ALL.len()];
        for outcome in outcomes {
            for (known, count) in Outcome::ALL.into_iter().zip(&mut counts) {
                *count += usize::from(known == outcome);
            }
        }
        Tally { counts }
    }

    /// How many answers came to `wanted`.
    pub fn count(&self, wanted: Outcome) -> usize {
        self.iter().filter(|(outcome, _)| *outcome == wanted).map(|(_, count)| count).sum()
    }

    /// Every outcome with its count.
    fn iter(&self) -> impl Iterator<Item = (Outcome, usize)> {
        Outcome::ALL.into_iter().zip(self.counts)
    }

    /// The share of right answers with its interval.
    pub fn proportion(&self) -> Proportion {
        Proportion::new(self.count(Outcome::Right), self.counts.iter().sum())
    }

    /// Adds `eval_accuracy` with its interval, `eval_samples`, and an `eval_reward_outcome/…` each.
    pub fn write(&self, metrics: &mut Metrics) {
        let accuracy = self.proportion();
        metrics.set("eval_accuracy", accuracy.rate());
        metrics.set("eval_accuracy_low", accuracy.low);
        metrics.set("eval_accuracy_high", accuracy.high);
        metrics.set("eval_samples", accuracy.trials as f64);
        for (outcome, count) in self.iter().filter(|(outcome, count)| is_shown(*outcome, *count)) {
            metrics.set(metric(outcome), count as f64);
        }
    }

    /// What [`Tally::write`] added, or nothing.
    pub fn read(metrics: &Metrics) -> Option<Self> {
        metrics.get("eval_accuracy")?;
        let mut counts = [0; Outcome::ALL.len()];
        for (outcome, count) in Outcome::ALL.into_iter().zip(&mut counts) {
            *count = metrics.get(&metric(outcome)).unwrap_or(0.0) as usize;
        }
        Some(Tally { counts })
    }
}

/// Whether an outcome's count is told: failures where there are some only.
fn is_shown(outcome: Outcome, count: usize) -> bool {
    count > 0 || !matches!(outcome, Outcome::Timeout | Outcome::Error)
}

/// The name under which an evaluation counts an outcome.
fn metric(outcome: Outcome) -> String {
    format!("eval_{}", outcome.metric())
}

/// `50.0 % [44.4, 55.6] (150/300; 140 wrong, 10 unparsable)`
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let accuracy = self.proportion();
        let (right, of) = (accuracy.successes, accuracy.trials);
        let others = self.iter().skip(1).filter(|(outcome, count)| is_shown(*outcome, *count));
        let others: Vec<_> = others.map(|(outcome, count)| format!("{count} {outcome}")).collect();
        write!(f, "{} ({right}/{of}; {})", accuracy.percent(), others.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(right: usize, wrong: usize, unparsable: usize) -> Tally {
        let all = Outcome::ALL.into_iter().zip([right, wrong, unparsable, 0, 0]);
        let all: Vec<_> = all.flat_map(|(outcome, n)| std::iter::repeat_n(outcome, n)).collect();
        Tally::new(all.into_iter().rev())
    }

    #[test]
    fn a_tally_tells_the_share_its_interval_and_every_count() {
        let text = tally(150, 140, 10).to_string();
        assert_eq!(text, "50.0 % [44.4, 55.6] (150/300; 140 wrong, 10 unparsable)");
        assert_eq!(tally(0, 0, 0).to_string(), "0.0 % [0.0, 100.0] (0/0; 0 wrong, 0 unparsable)");
    }

    #[test]
    fn failures_are_told_where_there_are_some() {
        let tally = Tally::new([Outcome::Right, Outcome::Timeout].into_iter());
        assert!(tally.to_string().ends_with("(1/2; 0 wrong, 0 unparsable, 1 timeout)"), "{tally}");
        let mut metrics = Metrics::new();
        tally.write(&mut metrics);
        assert_eq!(Tally::read(&metrics), Some(tally));
    }

    #[test]
    fn metrics_hold_all_of_a_tally() {
        let (mut metrics, tally) = (Metrics::new().with("eval_loss", 1.5), tally(7, 2, 1));
        assert_eq!(Tally::read(&metrics), None);
        tally.write(&mut metrics);
        assert_eq!(Tally::read(&metrics), Some(tally));
        let names = ["eval_accuracy", "eval_samples", "eval_reward_outcome/right"];
        assert_eq!(names.map(|name| metrics.get(name)), [Some(0.7), Some(10.0), Some(7.0)]);
        let names = ["eval_reward_outcome/wrong", "eval_reward_outcome/unparsable"];
        assert_eq!(names.map(|name| metrics.get(name)), [Some(2.0), Some(1.0)]);
    }
}
