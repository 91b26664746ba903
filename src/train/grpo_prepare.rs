//! From a step's scored completions to what optimizer steps learn from.

use super::collection::Collection;
use super::grpo::GrpoTrainer;
use super::loss::advantage::{Advantages, Baseline, advantages, mean};
use super::policy_gradient::plain_logps;
use super::rollouts::{Rollouts, normaliser, top_entropy};
use crate::Result;
use crate::adapter::Adapter;
use crate::config::AdvantageEstimator;
use crate::report::{Fold, StepMetrics};
use crate::rollout::{Group, StopReason};

impl GrpoTrainer<'_> {
    /// What optimizer steps learn from: advantages of the rewards, log-probs of the reference, the
    /// tokens that count.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn prepare(&self, collection: Collection, names: &[&str]) -> Result<Rollouts> {
        let grpo = &self.config.grpo;
        let (cursor, mut metrics) = (collection.cursor, collection.metrics(names));
        let mut scores = collection.rewards();
        let groups: Vec<Group> = collection.into_groups();
        let reference = match grpo.beta != 0.0 {
            true => self.logps(&self.reference, &groups)?,
            false => Vec::new(),
        };
        if grpo.kl_in_reward {
            let kl = self.sampled_kl(&groups, &reference)?;
            scores.iter_mut().zip(&kl).for_each(|(score, kl)| {
                *score = score.map(|score| score - grpo.beta * kl);
            });
            metrics.push(Fold::Mean, "objective/kl", mean(&kl));
        }
        let mut values = self.advantages(&scores, &mut metrics);
        let (mask, longest) = (grpo.mask_truncated_completions, self.options.max_new_tokens);
        let normaliser = normaliser(&groups, &values, mask, longest);
        if mask {
            let completions = groups.iter().flat_map(|group| &group.completions);
            let cut = completions.map(|completion| completion.stop == StopReason::Length);
            values.iter_mut().zip(cut).filter(|(_, cut)| *cut).for_each(|(value, _)| *value = None);
        }
        let chosen = top_entropy(&groups, &values, grpo.top_entropy_quantile);
        let reference = if grpo.kl_in_loss() { reference } else { Vec::new() };
        let advantages = values;
        let old = Vec::new();
        Ok(Rollouts {
            groups,
            advantages,
            reference,
            chosen,
            old,
            normaliser,
            used: 0,
            cursor,
            metrics,
        })
    }

    /// Advantages of a step's scores, and what they tell about its groups.
    fn advantages(&self, scores: &[Option<f64>], metrics: &mut StepMetrics) -> Vec<Option<f64>> {
        let grpo = &self.config.grpo;
        let baseline = match grpo.advantage_estimator {
            AdvantageEstimator::Grpo => Baseline::Group(grpo.scale_rewards),
            AdvantageEstimator::Rloo => Baseline::LeaveOneOut,
            AdvantageEstimator::ReinforcePlusPlus => Baseline::Whitened,
        };
        let Advantages { values, dropped, groups, without_spread } =
            advantages(scores, grpo.num_generations, baseline);
        let share = without_spread as f64 / groups.max(1) as f64;
        metrics.push(Fold::Mean, "frac_reward_zero_std", share);
        metrics.push(Fold::Sum, "groups_dropped", dropped as f64);
        values
    }

    /// Log-probs of completions without filters.
    fn logps(&self, adapters: &[Box<dyn Adapter>], groups: &[Group]) -> Result<Vec<Vec<f32>>> {
        let (policy, temperature) = (self.learner.policy(), self.objective.sampling.temperature);
        plain_logps(policy, adapters, groups, temperature, self.plan.micro_batch_tokens)
    }

    /// Each completion's divergence from the reference, summed over its tokens (k1).
    fn sampled_kl(&self, groups: &[Group], reference: &[Vec<f32>]) -> Result<Vec<f64>> {
        let completions = groups.iter().flat_map(|group| &group.completions);
        let logps: Vec<Vec<f32>> = match self.objective.sampling.has_rules() {
            true => self.logps(self.learner.adapters(), groups)?,
            false => completions.map(|completion| completion.logps.clone()).collect(),
        };
        let sum = |(logps, reference): (&Vec<f32>, &Vec<f32>)| {
            logps.iter().zip(reference).map(|(p, q)| f64::from(*p) - f64::from(*q)).sum()
        };
        Ok(logps.iter().zip(reference).map(sum).collect())
    }
}
