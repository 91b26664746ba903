//! What a policy-gradient run tells its user besides metrics: whether the rewards work, what the loss says,
//! and when something goes wrong.

use reward::RewardSet;

use super::grpo::GrpoTrainer;
use super::run::StepReport;
use super::scoring::{Failures, score};
use crate::config::{LossType, precision_note};
use crate::ops::Engine;
use crate::rollout::{GenerateOptions, Generator, sample_groups};
use crate::{Error, Result};

/// Completions that rewards are tried on before a run.
const REHEARSED: usize = 8;

impl GrpoTrainer<'_> {
    /// Tries the rewards on eight completions before anything is trained; returns what the user
    /// should know.
    ///
    /// # Errors
    /// If no completion gets a reward because a reward fails.
    pub fn rehearse(&self, rewards: &mut RewardSet) -> Result<Vec<String>> {
        let rows = self.prompts.len().min(REHEARSED);
        let options = self.options.clone();
        // nothing has been planned yet
        let options = GenerateOptions { max_batch: REHEARSED, keep_rounded: false, ..options };
        let (policy, adapters) = (self.learner.policy(), self.learner.adapters());
        let generator = Generator::new(policy, adapters, &options, None);
        let prompts = (0..rows).map(|row| (row as u64, row, self.prompts[row].input_ids.clone()));
        let each = REHEARSED.div_ceil(rows);
        let groups = sample_groups(&generator, prompts.collect(), (each, 0), None, &mut |_| {})?;
        let pairs: Vec<_> = groups
            .iter()
            .flat_map(|group| group.completions.iter().map(|c| (&self.prompts[group.row], c)))
            .collect();
        let scored = score(&self.text.tokenizer, rewards, &pairs)?;
        let known: Vec<f64> = scored.iter().filter_map(|scored| scored.judged.reward).collect();
        let failures = Failures::of(&scored, rewards).map(|failures| failures.to_string());
        if known.is_empty() {
            let reason = failures.unwrap_or_else(|| {
                "no reward is applicable to any of the completions that it was tried on".to_string()
            });
            return Err(Error::failure(format!(
                "{reason}; nothing was trained: `steer reward test` tries a reward on a file of \
                 completions"
            )));
        }
        let same = known.iter().all(|reward| *reward == known[0]);
        let same = same.then(|| {
            format!(
                "all of {} completions that the reward was tried on got {}: if that goes on there is \
                 nothing to learn",
                known.len(),
                known[0]
            )
        });
        let failures = failures.map(|failures| format!("before the run: {failures}"));
        Ok(failures.into_iter().chain(same).collect())
    }

    /// What the user should know of the run after a step.
    pub fn warnings(&mut self, report: &StepReport) -> Vec<String> {
        let failures = self.failures.take();
        let failed = failures.and_then(|failures| self.health.failed(report.step, &failures));
        let signs = self.health.watch(report.step, &report.metrics.metrics());
        failed.into_iter().chain(signs).collect()
    }

    /// What explains the run that begins.
    pub fn notes(&self) -> Vec<String> {
        let loss = self.loss_note().map(str::to_string);
        let sampler = self.sampler.as_ref().map(|sampler| sampler.engine());
        let sampler = sampler.filter(|engine| engine.device().is_cpu());
        let note = |engine: &Engine| precision_note("rollout_matmul_precision", engine.precision());
        let precision = sampler.and_then(note);
        loss.into_iter().chain(precision).map(|text| format!("note: {text}")).collect()
    }

    /// Why the loss that a user sees says nothing of progress, if it does not.
    fn loss_note(&self) -> Option<&'static str> {
        let grpo = &self.config.grpo;
        if grpo.num_iterations > 1 || grpo.kl_in_loss() || grpo.entropy_coef > 0.0 {
            return None;
        }
        Some(match grpo.loss_type {
            LossType::Grpo => {
                "the loss is 0 by construction (the importance ratio is 1 and a group's \
                 advantages sum to 0); it has a gradient all the same: watch reward and grad_norm"
            }
            _ => {
                "the loss is minus the mean advantage weighted by length, 0 where all \
                 completions are equally long, and says nothing of progress; it has a gradient all \
                 the same: watch reward and grad_norm"
            }
        })
    }
}
