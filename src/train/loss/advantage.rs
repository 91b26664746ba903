//! From the rewards of a step to advantages, one a completion.
//!
//! Completions without a score are left out of every mean and deviation and get no advantage; a group
//! with fewer than two scores is dropped as a whole, since nothing can be said about it.

use crate::config::ScaleRewards;

/// What is subtracted from a reward, and how the rest is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// The mean of the group, GRPO's (arXiv:2402.03300): `(r - mean) / (std + 1e-4)`.
    Group(ScaleRewards),
    /// The mean of the others of the group, RLOO's (arXiv:2402.14740), not scaled.
    LeaveOneOut,
    /// The mean of the group, then whitened over the step: REINFORCE++ with baseline
    /// (arXiv:2501.03262).
    Whitened,
}

/// What keeps a division by a small deviation finite, as in TRL.
const TINY: f64 = 1e-4;

/// Advantages of a step and what they tell about its groups.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One a completion; `None` where it takes no part.
    pub values: Vec<Option<f64>>,
    /// Groups that were dropped because fewer than two completions had a score.
    pub dropped: usize,
    /// Groups that take part.
    pub groups: usize,
    /// Groups among them whose scores are all equal: they teach nothing.
    pub without_spread: usize,
}

/// Advantages of the scores of a step, `num_generations` neighbours a group.
///
/// Standard deviations have n - 1 in their denominator. Panics if the scores are not whole groups.
pub fn advantages(
    scores: &[Option<f64>],
    num_generations: usize,
    baseline: Baseline,
) -> Advantages {
    assert!(scores.len().is_multiple_of(num_generations.max(1)), "the last group is not whole");
    let mut all = Advantages { values: Vec::new(), dropped: 0, groups: 0, without_spread: 0 };
    let mut kept = Vec::new();
    for group in scores.chunks(num_generations.max(1)) {
        let known: Vec<f64> = group.iter().flatten().copied().collect();
        if known.len() < 2 {
            all.dropped += 1;
            all.values.extend(group.iter().map(|_| None));
            continue;
        }
        all.groups += 1;
        all.without_spread += usize::from(known.iter().all(|score| *score == known[0]));
        let centred = |score: f64| centre(score, &known, baseline);
        all.values.extend(group.iter().map(|score| score.map(centred)));
        kept.extend(known);
    }
    match baseline {
        Baseline::Group(ScaleRewards::Batch) => {
            let scale = deviation(&kept) + TINY;
            all.values.iter_mut().flatten().for_each(|value| *value /= scale);
        }
        Baseline::Whitened => whiten(&mut all.values),
        _ => {}
    }
    all
}

fn centre(score: f64, known: &[f64], baseline: Baseline) -> f64 {
    let n = known.len() as f64;
    let centred = score - mean(known);
    match baseline {
        Baseline::Group(ScaleRewards::Group) => centred / (deviation(known) + TINY),
        // score - (sum - score) / (n - 1)
        Baseline::LeaveOneOut => centred * n / (n - 1.0),
        _ => centred,
    }
}

/// Shifts and scales values to mean 0 and deviation 1.
fn whiten(values: &mut [Option<f64>]) {
    let known: Vec<f64> = values.iter().flatten().copied().collect();
    let (mean, scale) = (mean(&known), deviation(&known) + TINY);
    values.iter_mut().flatten().for_each(|value| *value = (*value - mean) / scale);
}

/// The mean; 0 of nothing, and exact where all values are equal, so that such a group has no
/// advantage and no deviation left over from rounding.
pub fn mean(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [first, rest @ ..] if rest.iter().all(|value| value == first) => *first,
        _ => values.iter().sum::<f64>() / values.len() as f64,
    }
}

/// The standard deviation with n - 1; 0 of fewer than two.
pub fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let centre = mean(values);
    let squares: f64 = values.iter().map(|value| (value - centre) * (value - centre)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(scores: &[Option<f64>], g: usize, baseline: Baseline) -> Vec<Option<f64>> {
        advantages(scores, g, baseline).values
    }

    fn close(a: &[Option<f64>], b: &[Option<f64>]) -> bool {
        let same = |(a, b): (&Option<f64>, &Option<f64>)| match (a, b) {
            (Some(a), Some(b)) => (a - b).abs() < 1e-12,
            (a, b) => a == b,
        };
        a.len() == b.len() && a.iter().zip(b).all(same)
    }

    #[test]
    fn group_advantages_are_those_of_the_formula() {
        // mean 0.5, deviation sqrt(4 * 0.25 / 3)
        let scale = (1.0f64 / 3.0).sqrt() + 1e-4;
        let scores = [1.0, 0.0, 0.0, 1.0].map(Some);
        let want = [0.5, -0.5, -0.5, 0.5].map(|x| Some(x / scale));
        let scaled = Baseline::Group(ScaleRewards::Group);
        assert!(close(&values(&scores, 4, scaled), &want));
        let plain = values(&scores, 4, Baseline::Group(ScaleRewards::None));
        assert!(close(&plain, &[0.5, -0.5, -0.5, 0.5].map(Some)));
    }

    #[test]
    fn equal_scores_have_no_advantage_and_no_deviation() {
        let scores = [0.1; 3];
        assert_ne!(scores.iter().sum::<f64>() / 3.0, scores[0], "rounding would show here");
        assert_eq!((mean(&scores), deviation(&scores)), (scores[0], 0.0));
        for baseline in [Baseline::Group(ScaleRewards::Group), Baseline::LeaveOneOut] {
            assert_eq!(values(&scores.map(Some), 3, baseline), [Some(0.0); 3]);
        }
    }

    #[test]
    fn batch_scale_is_the_deviation_of_all_scores() {
        let scores = [1.0, 3.0, 10.0, 20.0].map(Some);
        // mean 8.5; squares 56.25 + 30.25 + 2.25 + 132.25 = 221
        let scale = (221.0f64 / 3.0).sqrt() + 1e-4;
        let want = [-1.0, 1.0, -5.0, 5.0].map(|x| Some(x / scale));
        assert!(close(&values(&scores, 2, Baseline::Group(ScaleRewards::Batch)), &want));
    }

    #[test]
    fn leave_one_out_compares_with_the_mean_of_the_others() {
        let scores = [1.0, 2.0, 6.0].map(Some);
        let want = [1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5].map(Some);
        assert!(close(&values(&scores, 3, Baseline::LeaveOneOut), &want));
    }

    #[test]
    fn whitened_advantages_have_mean_0_and_deviation_1() {
        let scores = [1.0, 3.0, 10.0, 20.0, 0.0, 0.5].map(Some);
        let whitened = values(&scores, 2, Baseline::Whitened);
        let known: Vec<f64> = whitened.into_iter().flatten().collect();
        assert!(mean(&known).abs() < 1e-12 && (deviation(&known) - 1.0).abs() < 1e-3);
    }

    #[test]
    fn a_completion_without_a_score_changes_nothing_for_the_others() {
        for baseline in [
            Baseline::Group(ScaleRewards::Group),
            Baseline::Group(ScaleRewards::Batch),
            Baseline::LeaveOneOut,
            Baseline::Whitened,
        ] {
            let with = [Some(1.0), None, Some(2.0), Some(5.0), None, None, Some(3.0), None];
            let got = advantages(&with, 4, baseline);
            assert_eq!((got.dropped, got.groups, got.without_spread), (1, 1, 0));
            let without = values(&[1.0, 2.0, 5.0].map(Some), 3, baseline);
            let known: Vec<_> =
                got.values.iter().filter(|value| value.is_some()).copied().collect();
            assert!(close(&known, &without), "{baseline:?}");
        }
    }

    #[test]
    fn equal_scores_give_no_advantage_and_are_counted() {
        for baseline in [Baseline::Group(ScaleRewards::Group), Baseline::LeaveOneOut] {
            let got = advantages(&[1.0, 1.0, 0.0, 1.0].map(Some), 2, baseline);
            assert_eq!(got.without_spread, 1);
            assert_eq!(&got.values[..2], &[Some(0.0), Some(0.0)]);
        }
    }
}
