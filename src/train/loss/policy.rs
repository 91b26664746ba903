//! Clipped policy objectives of the GRPO family.
//!
//! With r the importance ratio of a token (or of its completion), A the completion's advantage, and c
//! the normaliser's share of the completion:
//!
//! loss = sum over completions c * sum over tokens of
//!     - min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta r KL
//!
//! as TRL's GRPOTrainer computes it (arXiv:2402.03300, DAPO arXiv:2503.14476, Dr. GRPO
//! arXiv:2503.20783, GSPO arXiv:2507.18071); CISPO (arXiv:2506.13585) has
//! `- min(r, epsilon_high) A log p` instead, the ratio being a constant.

use serde::{Deserialize, Serialize};

use super::kl::kl;
use crate::config::{ImportanceSamplingLevel, KlEstimator, LossType};

/// The objective; defaults are TRL's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    /// How the losses of tokens become one number.
    pub loss_type: LossType,
    /// Whose ratio a token's is.
    pub level: ImportanceSamplingLevel,
    /// How far below 1 a ratio still counts.
    pub epsilon: f64,
    /// How far above 1; with CISPO the cap of the ratio itself.
    pub epsilon_high: f64,
    /// The cap of the ratio where the advantage is negative (dual clip).
    pub delta: Option<f64>,
    /// Weight of the KL divergence from the reference.
    pub beta: f64,
    /// Its estimator.
    pub kl_estimator: KlEstimator,
}

impl Default for PolicyLoss {
    fn default() -> Self {
        PolicyLoss {
            loss_type: LossType::Dapo,
            level: ImportanceSamplingLevel::Token,
            epsilon: 0.2,
            epsilon_high: 0.2,
            delta: None,
            beta: 0.0,
            kl_estimator: KlEstimator::K3,
        }
    }
}

/// What the whole optimizer step counts, so that micro-batches change memory alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Normaliser {
    /// Completions that take part.
    pub completions: usize,
    /// Their tokens.
    pub tokens: usize,
    /// The longest that a completion may be.
    pub max_completion_length: usize,
}

impl Normaliser {
    /// The factor of each of `tokens` losses of a completion.
    pub fn share(&self, loss_type: LossType, tokens: usize) -> f64 {
        let parts = match loss_type {
            LossType::Grpo => self.completions * tokens,
            LossType::Dapo | LossType::Cispo => self.tokens,
            LossType::DrGrpo => self.completions * self.max_completion_length,
        };
        1.0 / parts.max(1) as f64
    }
}

/// The tokens of one completion, in nats.
#[derive(Clone, Copy, Debug)]
pub struct Completion<'a> {
    /// Log-probs under the policy.
    pub logps: &'a [f32],
    /// Log-probs under the policy that sampled.
    pub sampled: &'a [f32],
    /// Log-probs under the reference; read if `beta` is not 0.
    pub reference: Option<&'a [f32]>,
    /// Log-probs under the policy without filters, which the divergence from the reference is taken
    /// of; `logps` where there are none.
    pub unfiltered: Option<&'a [f32]>,
    /// Which tokens the policy objective counts (`top_entropy_quantile`); all without it.
    pub chosen: Option<&'a [bool]>,
    /// Factor of each token's policy objective: truncated importance weights where the sampler is not
    /// the policy that `sampled` is of; all 1 without it.
    pub correction: Option<&'a [f64]>,
    /// The completion's advantage.
    pub advantage: f64,
}

/// A completion's part of the loss, and what metrics are made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompletionLoss {
    /// Its part of the loss, KL included.
    pub loss: f64,
    /// Its part of `beta * KL`.
    pub kl_loss: f64,
    /// Derivative of the loss in each log-prob.
    pub dlogps: Vec<f32>,
    /// Derivative of the loss in each log-prob without filters, if there are such.
    pub dunfiltered: Vec<f32>,
    /// Sum over tokens of the KL estimate.
    pub kl: f64,
    /// Each token's ratio.
    pub ratios: Vec<f64>,
    /// Tokens whose ratio was clipped from below, with a negative advantage.
    pub clipped_low: usize,
    /// Tokens whose ratio was clipped from above, with a positive advantage.
    pub clipped_high: usize,
}

impl PolicyLoss {
    /// A completion's part of the loss of a step. Panics if the lengths disagree.
    pub fn of(&self, completion: &Completion, normaliser: &Normaliser) -> CompletionLoss {
        let Completion { logps, sampled, reference, unfiltered, chosen, correction, advantage } =
            *completion;
        let n = logps.len();
        assert!(sampled.len() == n && reference.is_none_or(|r| r.len() == n));
        assert!(chosen.is_none_or(|chosen| chosen.len() == n));
        assert!(unfiltered.is_none_or(|logps| logps.len() == n));
        assert!(correction.is_none_or(|weights| weights.len() == n));
        let share = normaliser.share(self.loss_type, n);
        let mut all = CompletionLoss { ratios: self.ratios(logps, sampled), ..Default::default() };
        // derivatives in each log-prob itself, and in the logarithm of its ratio
        let (mut direct, mut through) = (vec![0.0; n], vec![0.0; n]);
        let mut dkls = vec![0.0; n];
        for t in 0..n {
            let (logp, r) = (f64::from(logps[t]), all.ratios[t]);
            if chosen.is_none_or(|chosen| chosen[t]) {
                let term = self.objective(r, advantage, logp);
                let share = share * correction.map_or(1.0, |weights| weights[t]);
                all.loss += share * term.loss;
                direct[t] += share * term.direct;
                through[t] += share * term.slope * r;
                all.clipped_low += usize::from(r < 1.0 - self.epsilon && advantage < 0.0);
                all.clipped_high += usize::from(r > self.highest() && advantage > 0.0);
            }
            let Some(reference) = reference.filter(|_| self.beta != 0.0) else { continue };
            let plain = unfiltered.map_or(logp, |logps| f64::from(logps[t]));
            let (kl, dkl) = kl(self.kl_estimator, plain, f64::from(reference[t]));
            all.kl += kl;
            all.kl_loss += share * self.beta * r * kl;
            dkls[t] = share * self.beta * r * dkl;
            through[t] += share * self.beta * kl * r;
        }
        all.loss += all.kl_loss;
        if self.level == ImportanceSamplingLevel::Sequence {
            let mean = through.iter().sum::<f64>() / n.max(1) as f64;
            through.fill(mean);
        }
        match unfiltered {
            Some(_) => all.dunfiltered = dkls.iter().map(|d| *d as f32).collect(),
            None => direct.iter_mut().zip(&dkls).for_each(|(direct, d)| *direct += d),
        }
        all.dlogps = direct.iter().zip(&through).map(|(a, b)| (a + b) as f32).collect();
        all
    }

    /// Weights of tokens that another policy sampled with log-probs `sampler` than the one with log-probs
    /// `old`, which the ratio is taken to: `min(exp(old - sampler), cap)` (truncated importance sampling;
    /// as TRL with `vllm_importance_sampling_cap`).
    pub fn truncated_weights(old: &[f32], sampler: &[f32], cap: f64) -> Vec<f64> {
        let weight =
            |(old, sampler): (&f32, &f32)| (f64::from(*old) - f64::from(*sampler)).exp().min(cap);
        old.iter().zip(sampler).map(weight).collect()
    }

    /// Each token's importance ratio.
    fn ratios(&self, logps: &[f32], sampled: &[f32]) -> Vec<f64> {
        let logs = logps.iter().zip(sampled).map(|(new, old)| f64::from(*new) - f64::from(*old));
        match self.level {
            ImportanceSamplingLevel::Token => logs.map(f64::exp).collect(),
            ImportanceSamplingLevel::Sequence => {
                let mean = logs.sum::<f64>() / logps.len().max(1) as f64;
                vec![mean.exp(); logps.len()]
            }
        }
    }

    /// The ratio above which nothing more is won.
    fn highest(&self) -> f64 {
        match self.loss_type {
            LossType::Cispo => self.epsilon_high,
            _ => 1.0 + self.epsilon_high,
        }
    }

    fn objective(&self, r: f64, advantage: f64, logp: f64) -> Term {
        if self.loss_type == LossType::Cispo {
            let weight = r.min(self.epsilon_high) * advantage;
            return Term { loss: -weight * logp, direct: -weight, slope: 0.0 };
        }
        let capped = self.delta.map_or(r, |delta| r.min(delta));
        let clipped = r.clamp(1.0 - self.epsilon, 1.0 + self.epsilon_high);
        let (used, moves) = match capped * advantage <= clipped * advantage {
            true => (capped, capped == r),
            false => (clipped, clipped == r),
        };
        let slope = if moves { -advantage } else { 0.0 };
        Term { loss: -used * advantage, direct: 0.0, slope }
    }
}

/// A token's policy objective: its loss, the derivative in the log-prob, the derivative in the ratio.
struct Term {
    loss: f64,
    direct: f64,
    slope: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [LossType; 4] =
        [LossType::Grpo, LossType::Dapo, LossType::DrGrpo, LossType::Cispo];
    const STEP: Normaliser = Normaliser { completions: 3, tokens: 10, max_completion_length: 8 };

    fn completion<'a>(logps: &'a [f32], sampled: &'a [f32], advantage: f64) -> Completion<'a> {
        Completion {
            logps,
            sampled,
            reference: None,
            unfiltered: None,
            chosen: None,
            correction: None,
            advantage,
        }
    }

    #[test]
    fn on_policy_the_derivative_is_the_advantage() {
        let logps = [-0.5, -1.0, -2.0, -0.1];
        for (loss_type, share) in TYPES.into_iter().zip([1.0 / 12.0, 0.1, 1.0 / 24.0, 0.1]) {
            for level in [ImportanceSamplingLevel::Token, ImportanceSamplingLevel::Sequence] {
                let loss = PolicyLoss { loss_type, level, epsilon_high: 5.0, ..Default::default() };
                let got = loss.of(&completion(&logps, &logps, 1.5), &STEP);
                assert!(got.ratios.iter().all(|r| *r == 1.0));
                assert_eq!((got.clipped_low, got.clipped_high, got.kl), (0, 0, 0.0));
                let want = (-1.5 * share) as f32;
                assert!(got.dlogps.iter().all(|d| (d - want).abs() < 1e-7), "{loss_type:?}");
            }
        }
    }

    #[test]
    fn ratios_are_clipped_on_both_sides_and_by_delta() {
        let old = [0.0f32; 5];
        let logps = [0.5f64, 0.79, 1.1, 1.5, 4.0].map(|r| r.ln() as f32);
        let loss = PolicyLoss { epsilon_high: 0.3, delta: Some(2.0), ..Default::default() };
        let terms = |advantage: f64| -> (f64, Vec<f64>, usize, usize) {
            let got = loss.of(&completion(&logps, &old, advantage), &STEP);
            let slopes = got.dlogps.iter().map(|d| f64::from(*d) * 10.0).collect();
            (got.loss * 10.0, slopes, got.clipped_low, got.clipped_high)
        };
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        // min(r, 1.3) counts for a positive advantage
        let (sum, slopes, low, high) = terms(1.0);
        assert!((sum + 0.5 + 0.79 + 1.1 + 1.3 + 1.3).abs() < 1e-6);
        assert!(close(&slopes, &[-0.5, -0.79, -1.1, 0.0, 0.0]));
        assert_eq!((low, high), (0, 2));
        // max(min(r, 2), 0.8) for a negative one
        let (sum, slopes, low, high) = terms(-1.0);
        assert!((sum - 0.8 - 0.8 - 1.1 - 1.5 - 2.0).abs() < 1e-6);
        assert!(close(&slopes, &[0.0, 0.0, 1.1, 1.5, 0.0]));
        assert_eq!((low, high), (2, 0));
    }

    #[test]
    fn tokens_that_are_not_chosen_keep_their_kl_alone() {
        let (logps, reference) = ([-0.5f32, -1.0], [-0.7f32, -0.2]);
        let loss = PolicyLoss { beta: 0.1, ..Default::default() };
        let all = Completion { reference: Some(&reference), ..completion(&logps, &logps, 2.0) };
        let chosen = Completion { chosen: Some(&[true, false]), ..all };
        let (all, some) = (loss.of(&all, &STEP), loss.of(&chosen, &STEP));
        assert!((all.loss - some.loss + 0.2).abs() < 1e-9, "two tenths of -1 are left out");
        assert_eq!(all.kl, some.kl);
        assert_eq!(all.dlogps[0], some.dlogps[0]);
    }

    #[test]
    fn derivatives_are_finite_differences() {
        let sampled = [-0.5f32, -1.0, -2.0, -0.1];
        let logps = [-0.62f32, -0.4, -2.05, -0.9];
        let reference = [-0.7f32, -0.6, -1.0, -0.3];
        let kinds = [KlEstimator::K2, KlEstimator::K3];
        let levels = [ImportanceSamplingLevel::Token, ImportanceSamplingLevel::Sequence];
        for loss_type in TYPES {
            for (kl_estimator, level) in kinds.into_iter().flat_map(|k| levels.map(|l| (k, l))) {
                for (advantage, delta) in [(1.3, None), (-0.7, None), (-0.7, Some(1.1))] {
                    let epsilon_high = if loss_type == LossType::Cispo { 1.4 } else { 0.3 };
                    let loss = PolicyLoss {
                        loss_type,
                        level,
                        epsilon: 0.2,
                        epsilon_high,
                        delta,
                        beta: 0.05,
                        kl_estimator,
                    };
                    let value = |logps: &[f32]| {
                        let reference = Some(&reference[..]);
                        let plain = completion(logps, &sampled, advantage);
                        loss.of(&Completion { reference, ..plain }, &STEP)
                    };
                    check(loss_type, &logps, value);
                }
            }
        }
    }

    /// Compares the derivatives with differences of the loss. The ratio of CISPO is a constant, so
    /// there the loss is linear in the log-prob only with the ratio held: it is left to the formula.
    fn check(loss_type: LossType, logps: &[f32; 4], value: impl Fn(&[f32]) -> CompletionLoss) {
        if loss_type == LossType::Cispo {
            return;
        }
        let got = value(logps);
        for t in 0..logps.len() {
            let step = 2f32.powi(-8);
            let moved = |by: f32| {
                let mut logps = *logps;
                logps[t] += by;
                value(&logps).loss
            };
            // two central differences cancel the error of second order
            let slope = |h: f32| (moved(h) - moved(-h)) / (2.0 * f64::from(h));
            let slope = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
            let d = f64::from(got.dlogps[t]);
            assert!((d - slope).abs() < 1e-6, "{loss_type:?} {t}: {d} {slope}");
        }
    }

    #[derive(serde::Deserialize)]
    struct Fixture {
        max_completion_length: usize,
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        loss_type: String,
        level: String,
        epsilon: f64,
        epsilon_high: f64,
        delta: Option<f64>,
        beta: f64,
        kl_estimator: String,
        logps: Vec<Vec<f32>>,
        sampled: Vec<Vec<f32>>,
        reference: Vec<Vec<f32>>,
        chosen: Vec<Vec<bool>>,
        advantages: Vec<f64>,
        loss: f64,
        dlogps: Vec<Vec<f64>>,
    }

    impl Case {
        fn objective(&self) -> PolicyLoss {
            PolicyLoss {
                loss_type: match self.loss_type.as_str() {
                    "grpo" => LossType::Grpo,
                    "dapo" => LossType::Dapo,
                    "dr_grpo" => LossType::DrGrpo,
                    "cispo" => LossType::Cispo,
                    other => panic!("{other}"),
                },
                level: match self.level.as_str() {
                    "token" => ImportanceSamplingLevel::Token,
                    _ => ImportanceSamplingLevel::Sequence,
                },
                epsilon: self.epsilon,
                epsilon_high: self.epsilon_high,
                delta: self.delta,
                beta: self.beta,
                kl_estimator: match self.kl_estimator.as_str() {
                    "k2" => KlEstimator::K2,
                    _ => KlEstimator::K3,
                },
            }
        }
    }

    #[test]
    fn losses_and_gradients_are_those_of_autograd_on_the_formula_of_trl() {
        let text = include_str!("../../../tests/fixtures/policy_loss.json");
        let fixture: Fixture = serde_json::from_str(text).unwrap();
        assert!(fixture.cases.len() >= 16);
        for case in &fixture.cases {
            let normaliser = Normaliser {
                completions: case.logps.len(),
                tokens: case.logps.iter().map(Vec::len).sum(),
                max_completion_length: fixture.max_completion_length,
            };
            let (objective, mut loss) = (case.objective(), 0.0);
            for i in 0..case.logps.len() {
                let completion = Completion {
                    logps: &case.logps[i],
                    sampled: &case.sampled[i],
                    reference: Some(&case.reference[i]),
                    unfiltered: None,
                    chosen: Some(&case.chosen[i]),
                    correction: None,
                    advantage: case.advantages[i],
                };
                let got = objective.of(&completion, &normaliser);
                loss += got.loss;
                for (d, want) in got.dlogps.iter().zip(&case.dlogps[i]) {
                    assert!((f64::from(*d) - want).abs() < 1e-7, "{objective:?}: {d} {want}");
                }
            }
            assert!((loss - case.loss).abs() < 1e-12, "{objective:?}: {loss} {}", case.loss);
        }
    }

    #[test]
    fn cispo_weighs_log_probs_by_the_capped_ratio() {
        let (logps, sampled) = ([-0.5f32, -0.1], [-1.0f32, -3.0]);
        let loss =
            PolicyLoss { loss_type: LossType::Cispo, epsilon_high: 5.0, ..Default::default() };
        let got = loss.of(&completion(&logps, &sampled, 2.0), &STEP);
        let weights = [0.5f64.exp() * 2.0, 10.0];
        let want = weights[0] * 0.5 + weights[1] * f64::from(0.1f32);
        assert!((got.loss - want / 10.0).abs() < 1e-9);
        assert!(
            got.dlogps.iter().zip(weights).all(|(d, w)| (f64::from(*d) + w / 10.0).abs() < 1e-6)
        );
        assert_eq!((got.clipped_low, got.clipped_high), (0, 1));
    }

    #[test]
    fn the_divergence_without_filters_has_a_derivative_of_its_own() {
        let (logps, plain, reference) = ([-0.5f32, -0.2], [-0.9f32, -0.7], [-1.0f32, -0.3]);
        let loss = PolicyLoss { beta: 0.3, ..Default::default() };
        let at = |logps: &[f32], unfiltered: Option<&[f32]>| {
            let plain = completion(logps, &[-0.6, -0.2], 1.5);
            loss.of(&Completion { reference: Some(&reference), unfiltered, ..plain }, &STEP)
        };
        assert_eq!(at(&logps, Some(&logps)).loss, at(&logps, None).loss);
        let got = at(&logps, Some(&plain));
        for t in 0..2 {
            let slope = |which: bool| {
                let moved = |by: f32| {
                    let (mut logps, mut plain) = (logps, plain);
                    if which {
                        logps[t] += by
                    } else {
                        plain[t] += by
                    }
                    at(&logps, Some(&plain)).loss
                };
                (moved(1.0 / 256.0) - moved(-1.0 / 256.0)) * 128.0
            };
            assert!((f64::from(got.dlogps[t]) - slope(true)).abs() < 1e-5);
            assert!((f64::from(got.dunfiltered[t]) - slope(false)).abs() < 1e-5);
        }
    }

    #[test]
    fn truncated_weights_scale_the_policy_objective_and_not_the_divergence() {
        let (logps, reference) = ([-0.5f32, -1.0], [-0.7f32, -0.4]);
        let weights = PolicyLoss::truncated_weights(&logps, &[-0.4, -4.0], 2.0);
        assert!((weights[0] - (-0.1f64).exp()).abs() < 1e-6 && weights[1] == 2.0, "{weights:?}");
        let at = |beta: f64, correction: Option<&[f64]>| {
            let loss = PolicyLoss { beta, ..Default::default() };
            let plain = completion(&logps, &logps, 1.5);
            loss.of(&Completion { reference: Some(&reference), correction, ..plain }, &STEP)
        };
        for t in 0..2 {
            let plain = f64::from(at(0.0, None).dlogps[t]);
            let scaled = f64::from(at(0.0, Some(&weights)).dlogps[t]);
            assert!((scaled - plain * weights[t]).abs() < 1e-7);
        }
        assert_eq!(at(0.3, None).kl_loss, at(0.3, Some(&weights)).kl_loss);
    }

    #[test]
    fn parts_of_a_step_add_up_whatever_the_order() {
        let (a, b) = ([-0.5f32, -0.1], [-0.9f32]);
        let loss = PolicyLoss { loss_type: LossType::Grpo, ..Default::default() };
        let step = Normaliser { completions: 2, tokens: 3, max_completion_length: 4 };
        let (x, y) = (completion(&a, &a, 1.0), completion(&b, &b, -3.0));
        let sum = loss.of(&x, &step).loss + loss.of(&y, &step).loss;
        assert!((sum - (-1.0 + 3.0) / 2.0).abs() < 1e-12);
    }
}
