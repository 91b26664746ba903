//! Signs that a policy-gradient run goes wrong, and what to try.

use super::scoring::Failures;
use crate::report::Metrics;

/// Steps in a row that a sign must last.
const PATIENCE: u32 = 5;
/// Steps between two warnings of the same kind.
const QUIET: u64 = 50;

/// A sign, what a metric must be for it, and what to try.
struct Sign {
    metric: &'static str,
    is_bad: fn(f64) -> bool,
    says: &'static str,
}

const SIGNS: [Sign; 6] = [
    Sign {
        metric: "frac_reward_zero_std",
        is_bad: |share| share >= 0.9,
        says: "in nearly all groups every completion has the same reward, so there is nothing to \
               learn: easier or harder prompts, more num_generations, a finer reward, or \
               dynamic_sampling; where all are 0, see what steer reward test says of them",
    },
    Sign {
        metric: "completions/clipped_ratio",
        is_bad: |share| share >= 0.9,
        says: "nearly all completions are cut at max_completion_length: raise it, ask for shorter \
               answers, or add soft_overlong_punishment to reward_funcs",
    },
    Sign {
        metric: "entropy",
        is_bad: |nats| nats < 0.02,
        says: "the policy has almost no entropy left and samples the same again and again: a lower \
               learning_rate, entropy_coef, a higher temperature, or beta above 0",
    },
    Sign {
        metric: "clip_ratio/region_mean",
        is_bad: |share| share > 0.3,
        says: "more than 30 % of the tokens are clipped: a lower learning_rate or fewer \
               num_iterations",
    },
    Sign {
        metric: "kl",
        is_bad: |nats| nats > 1.0,
        says: "the policy runs away from the reference (kl above 1 nat a token): a lower \
               learning_rate or a higher beta",
    },
    Sign {
        metric: "completions/empty_ratio",
        is_bad: |share| share >= 0.25,
        says: "many completions are empty: where wrong answers get less than empty ones the policy \
               learns to say nothing; give them 0, and let right ones earn less the longer they are",
    },
];

/// What has been seen of each sign.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    in_a_row: u32,
    told: Option<u64>,
}

/// Watches the metrics of steps.
#[derive(Clone, Debug, Default)]
pub struct Health {
    seen: [Seen; SIGNS.len()],
    /// Failing rewards as they were last told: when, of which reward, and why.
    failed: Option<(u64, String, String)>,
}

impl Health {
    /// Takes in that rewards failed; returns the warning for the first time, for a new reason, and now
    /// and then.
    pub fn failed(&mut self, step: u64, failures: &Failures) -> Option<String> {
        let known = self.failed.as_ref().is_some_and(|(told, name, reason)| {
            step < told + QUIET && (name, reason) == (&failures.name, &failures.reason)
        });
        (!known).then(|| {
            self.failed = Some((step, failures.name.clone(), failures.reason.clone()));
            format!("step {step}: {failures}; they are left out of the loss")
        })
    }

    /// Takes in a step's metrics; returns what the user should know now.
    pub fn watch(&mut self, step: u64, metrics: &Metrics) -> Vec<String> {
        let mut warnings = Vec::new();
        for (sign, seen) in SIGNS.iter().zip(&mut self.seen) {
            let Some(value) = metrics.get(sign.metric) else { continue };
            seen.in_a_row = if (sign.is_bad)(value) { seen.in_a_row + 1 } else { 0 };
            let quiet = seen.told.is_some_and(|told| step < told + QUIET);
            if seen.in_a_row >= PATIENCE && !quiet {
                seen.told = Some(step);
                warnings.push(format!("step {step}: {}", sign.says));
            }
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(health: &mut Health, step: u64, name: &str, value: f64) -> usize {
        health.watch(step, &Metrics::new().with(name, value)).len()
    }

    #[test]
    fn a_sign_must_last_and_is_told_now_and_then() {
        let mut health = Health::default();
        let told: Vec<u64> = (1..=120)
            .filter(|step| watch(&mut health, *step, "frac_reward_zero_std", 1.0) > 0)
            .collect();
        assert_eq!(told, [5, 55, 105]);
    }

    #[test]
    fn good_steps_and_missing_metrics_tell_nothing() {
        let mut health = Health::default();
        for step in 1..=20 {
            let value = if step % 4 == 0 { 0.5 } else { 0.0 };
            assert_eq!(watch(&mut health, step, "entropy", value), 0);
            assert_eq!(watch(&mut health, step, "loss", 1e9), 0);
        }
    }

    #[test]
    fn failing_rewards_are_told_at_once_for_a_new_reason_and_now_and_then() {
        let mut health = Health::default();
        let failures = |reason: &str| Failures {
            count: 3,
            all: 12,
            name: "mine".into(),
            reason: reason.into(),
            row: 7,
            log: None,
        };
        assert_eq!(
            health.failed(1, &failures("it gave nan")).unwrap(),
            "step 1: reward mine failed for 3 of 12 completions, first in row 7: it gave nan; they \
             are left out of the loss"
        );
        let told: Vec<u64> = (2..=120)
            .filter(|step| {
                let reason = if *step < 10 { "it gave nan" } else { "no" };
                health.failed(*step, &failures(reason)).is_some()
            })
            .collect();
        assert_eq!(told, [10, 60, 110]);
    }

    #[test]
    fn every_sign_is_found() {
        for (name, value) in [
            ("frac_reward_zero_std", 1.0),
            ("completions/clipped_ratio", 1.0),
            ("entropy", 0.0),
            ("clip_ratio/region_mean", 0.5),
            ("kl", 2.0),
            ("completions/empty_ratio", 0.5),
        ] {
            let mut health = Health::default();
            let told: usize = (1..=5).map(|step| watch(&mut health, step, name, value)).sum();
            assert_eq!(told, 1, "{name}");
        }
    }
}
