//! What is known of completions since they were sampled must be what training computes, by the same adapters.

use crate::ops::RowStats;
use crate::rollout::Completion;
use crate::{Error, Result};

/// Refuses to go on where the trainer's log-probs of a completion are not the sampler's.
///
/// # Errors
/// Names the first token whose log-probs differ.
pub fn check_ratio(completion: &Completion, logps: &[f32]) -> Result<()> {
    let mut pairs = completion.logps.iter().zip(logps).enumerate();
    match pairs.find(|(_, (sampled, now))| sampled != now) {
        None => Ok(()),
        Some((t, (sampled, now))) => Err(Error::failure(format!(
            "the importance ratio is not 1 on-policy: token {t} of a completion was sampled with log-prob \
             {sampled} and has {now} in training, by the same adapters; this is a bug"
        ))),
    }
}

/// Refuses to go on where the trainer's logits do not have the sampler's statistics: the probabilities under them,
/// `mass` of each row, do not sum to one.
///
/// # Errors
/// Tells such a sum.
pub fn check_mass(stats: &[RowStats], mass: &[f32]) -> Result<()> {
    const ROUNDING: f32 = 1e-3;
    let off = |(stats, mass): &(&RowStats, &f32)| {
        let lse = stats.lse().abs();
        mass.is_nan() || mass.ln().abs() > ROUNDING + 2.0 * f32::EPSILON * lse
    };
    match stats.iter().zip(mass).find(off) {
        None => Ok(()),
        Some((_, mass)) => Err(Error::failure(format!(
            "the probabilities of a token's alternatives sum to {mass} in training under the statistics of \
             sampling, by the same adapters; this is a bug"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_that_do_not_sum_to_one_stop_the_step() {
        let stats = |max| RowStats { max, argmax: 0, log_sum: 2.0, entropy: 1.0 };
        assert!(check_mass(&[], &[]).is_ok());
        assert!(check_mass(&[stats(3.0); 2], &[1.0, 0.9995]).is_ok());
        // logits that a temperature of 1e-5 has made large are rounded coarsely
        assert!(check_mass(&[stats(3e6)], &[1.2]).is_ok());
        for mass in [0.99, 1.01, 0.0, f32::NAN, f32::INFINITY] {
            assert!(check_mass(&[stats(3.0); 2], &[1.0, mass]).is_err(), "{mass}");
        }
    }
}
