//! The evaluation of a policy-gradient run: greedy completions of held-out prompts, scored by its own
//! rewards.

use std::cell::RefCell;

use reward::{Outcome, RewardSet};

use super::grpo::GrpoTrainer;
use super::loss::advantage::{deviation, mean};
use super::prompts::PromptTokens;
use super::run::{Evaluation, Trainer};
use super::scoring::{Failures, Scored, score, value};
use crate::eval::Tally;
use crate::model::TextModel;
use crate::report::{Metrics, Progress};
use crate::rollout::{
    GenerateOptions, Generator, Request, SamplingParams, StopReason, StopStrings,
};
use crate::{Error, Result};

/// Held-out prompts and the rewards of their completions.
pub struct RewardEvaluation<'a> {
    /// The prompts.
    pub prompts: &'a [PromptTokens],
    /// The tokenizer's side of the model.
    pub text: &'a TextModel,
    /// Texts that end a completion.
    pub stop: &'a [String],
    /// The rewards, which may keep processes.
    pub rewards: &'a RefCell<RewardSet>,
    /// Share of the completions whose reward may fail.
    pub most_failures: f64,
}

impl Evaluation<GrpoTrainer<'_>> for RewardEvaluation<'_> {
    fn answers(&self, trainer: &GrpoTrainer) -> Result<(Metrics, Option<String>)> {
        if self.prompts.is_empty() {
            return Ok((Metrics::new(), None));
        }
        let sampling = SamplingParams::greedy();
        let options = GenerateOptions { sampling, ..trainer.options().clone() };
        let stops = StopStrings::new(&self.text.tokenizer, self.stop);
        let found = |tokens: &[u32]| stops.found(tokens);
        let learner = trainer.learner();
        let generator =
            Generator::new(learner.policy(), learner.adapters(), &options, Some(&found));
        let requests: Vec<Request> = self
            .prompts
            .iter()
            .map(|prompt| Request {
                prompt: prompt.input_ids.clone(),
                prompt_id: prompt.row.id,
                sample: 0,
            })
            .collect();
        let mut progress = Progress::new("answers", requests.len());
        let completions = generator.run(&requests, &mut |done| progress.set(done))?;
        drop(progress);
        let pairs: Vec<_> = self.prompts.iter().zip(&completions).collect();
        let rewards = &mut self.rewards.borrow_mut();
        let scored = score(&self.text.tokenizer, rewards, &pairs)?;
        let failures = Failures::of(&scored, rewards);
        let share = failures.as_ref().map_or(0.0, Failures::share);
        let failures = failures.map(|failures| failures.to_string());
        if let Some(failures) = failures.clone().filter(|_| share > self.most_failures) {
            return Err(Error::Interrupted(failures));
        }
        let mut metrics = metrics(&scored, &rewards.names());
        metrics.set("eval_reward_failures", share);
        let lengths: Vec<f64> = completions.iter().map(|c| c.tokens.len() as f64).collect();
        let cut = completions.iter().filter(|c| c.stop == StopReason::Length).count();
        metrics.set("eval_completions/mean_length", mean(&lengths));
        metrics.set("eval_completions/clipped_ratio", cut as f64 / lengths.len() as f64);
        let warning =
            failures.map(|failures| format!("{failures}; they are left out of the means"));
        Ok((metrics, warning))
    }
}

/// Mean rewards, the whole one with its 95 % interval (normal approximation), and the accuracy of the
/// completions that were graded, if any were.
fn metrics(scored: &[Scored], names: &[&str]) -> Metrics {
    let mut metrics = Metrics::new();
    let rewards: Vec<f64> = scored.iter().filter_map(|scored| scored.judged.reward).collect();
    if !rewards.is_empty() {
        let (centre, n) = (mean(&rewards), rewards.len() as f64);
        let half = 1.959964 * deviation(&rewards) / n.sqrt();
        metrics.set("eval_reward", centre);
        metrics.set("eval_reward_low", centre - half);
        metrics.set("eval_reward_high", centre + half);
    }
    for (i, name) in names.iter().enumerate() {
        let values: Vec<f64> = scored.iter().filter_map(|s| value(&s.judged.scores[i])).collect();
        if !values.is_empty() {
            metrics.set(format!("eval_rewards/{name}/mean"), mean(&values));
        }
    }
    let outcomes = scored.iter().filter_map(|s| s.judged.outcome());
    let graded: Vec<Outcome> = outcomes.filter(|outcome| !outcome.is_failure()).collect();
    if !graded.is_empty() {
        Tally::new(graded.into_iter()).write(&mut metrics);
    }
    metrics
}
