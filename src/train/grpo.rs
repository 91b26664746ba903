//! The policy-gradient trainer (GRPO, DAPO, Dr. GRPO, CISPO, GSPO, RLOO, REINFORCE++): which prompts a
//! step samples for, what their rewards make of the completions, and the update.

use std::path::Path;
use std::time::Instant;

use reward::RewardSet;
use tracing::debug_span;

use super::batching::order;
use super::checkpoint::{DataCursor, DataIdentity};
use super::collection::{Collected, Collection};
use super::health::Health;
use super::learner::{Learner, Update};
use super::loss::policy::PolicyLoss;
use super::memory::Sampling;
use super::plan::{LongestCase, Plan};
use super::policy_gradient::{Cut, Objective, OffPolicy, Step, Sums, gradients};
use super::prompts::{PromptTokens, digest};
use super::rollouts::Rollouts;
use super::run::{StepReport, Trainer};
use super::scoring::{Failures, score};
use crate::adapter::Adapter;
use crate::config::{GrpoConfig, OptimArgs, Reference};
use crate::model::{Policy, TextModel};
use crate::ops::Gradients;
use crate::report::{CompletionRow, Fold, StepMetrics};
use crate::rollout::{GenerateOptions, Generator, Group, Record, StopStrings, sample_groups};
use crate::{Error, Result};

/// Policy-gradient training of adapters on a frozen policy.
pub struct GrpoTrainer<'a> {
    pub(super) config: &'a GrpoConfig,
    pub(super) text: &'a TextModel,
    pub(super) prompts: &'a [PromptTokens],
    pub(super) learner: Learner<'a>,
    /// The policy that samples, where it is of another precision.
    pub(super) sampler: Option<Policy>,
    /// The adapters that the divergence is from; none = the base.
    pub(super) reference: Vec<Box<dyn Adapter>>,
    pub(super) objective: Objective,
    pub(super) options: GenerateOptions,
    pub(super) plan: Plan,
    /// What the next step learns from, if it was sampled before.
    pub(super) pending: Option<Rollouts>,
    /// The order of the prompts of an epoch.
    pub(super) epoch: Option<(u64, Vec<usize>)>,
    pub(super) health: Health,
    /// Rewards that failed since the last warnings.
    pub(super) failures: Option<Failures>,
    /// What sampling has the room to keep besides the outputs of blocks.
    room_for: Record,
    /// Tokens sampled for the next step, and the share of those of the last one that was learnt from.
    sampled_tokens: usize,
    learnt_share: f64,
}

/// The share of sampled tokens that must be learnt from for gradients at the head to be worth taking while
/// sampling: that costs a product with the head a sampled token, in passes of few rows, and spares two a token
/// that is learnt from.
const HEAD_SHARE: f64 = 0.6;

/// A prompt of a step: its number in the run, and its row.
pub type Drawn = (u64, usize);

impl<'a> GrpoTrainer<'a> {
    /// A trainer at the start of its run.
    ///
    /// # Errors
    /// If the reference cannot be loaded.
    pub fn new(
        config: &'a GrpoConfig,
        (policy, text): (&'a Policy, &'a TextModel),
        adapters: Vec<Box<dyn Adapter>>,
        prompts: &'a [PromptTokens],
    ) -> Result<Self> {
        let (grpo, train, optim) = (&config.grpo, &config.train, &config.optim);
        let data = DataIdentity {
            examples: prompts.len() as u64,
            steps_per_epoch: prompts.len().div_ceil(grpo.prompts_per_step) as u64,
            sha256: digest(prompts),
        };
        let samplings =
            train.num_train_epochs * prompts.len() as f64 / grpo.prompts_per_step as f64;
        let by_epochs = samplings.ceil() as u64 * grpo.num_iterations as u64;
        let total_steps = train.step_limit().unwrap_or(by_epochs);
        let rates = config.learning_rates();
        let learner =
            Learner::new(policy, adapters, (optim, rates), total_steps, (train.seed, data));
        let reference = match grpo.reference {
            Reference::Base => Vec::new(),
            Reference::Adapter => {
                config.adapter.build(policy.config(), train.seed, policy.engine().device())?
            }
        };
        let loss = PolicyLoss {
            loss_type: grpo.loss_type,
            level: grpo.importance_sampling_level,
            epsilon: grpo.epsilon,
            epsilon_high: grpo.epsilon_high(),
            delta: grpo.delta,
            beta: if grpo.kl_in_loss() { grpo.beta } else { 0.0 },
            kl_estimator: grpo.kl_estimator,
        };
        let sampling = config.sampling.params();
        let precision = config.sampling.precision().filter(|p| *p != policy.engine().precision());
        Ok(GrpoTrainer {
            sampler: precision.map(|precision| policy.at_precision(precision)),
            objective: Objective { loss, entropy_coef: grpo.entropy_coef, sampling },
            options: GenerateOptions {
                max_new_tokens: config.sampling.longest_completion(config.data.dataset()?),
                sampling,
                eos_token_ids: text.stop_token_ids.clone(),
                max_batch: config.sampling.max_num_seqs,
                seed: train.seed,
                ..GenerateOptions::default()
            },
            plan: Plan::unbounded(optim),
            config,
            text,
            prompts,
            learner,
            reference,
            pending: None,
            epoch: None,
            health: Health::default(),
            failures: None,
            room_for: Record::default(),
            sampled_tokens: 0,
            learnt_share: 1.0,
        })
    }

    /// How completions are sampled.
    pub fn options(&self) -> &GenerateOptions {
        &self.options
    }

    /// The completions of the last sampling, if `num_iterations` has them learnt from again.
    pub fn take_up(&mut self) -> Option<Rollouts> {
        self.pending.take()
    }

    /// Begins to collect the groups of a step.
    pub fn collect(&self) -> Collection {
        let grpo = &self.config.grpo;
        let rounds = if grpo.dynamic_sampling { grpo.dynamic_sampling_rounds } else { 0 };
        Collection::new(self.learner.state().cursor, grpo.prompts_per_step, rounds)
    }

    /// The next prompts that a collection wants; nothing when it is whole.
    pub fn next_prompts(&mut self, collection: &mut Collection) -> Option<Vec<Drawn>> {
        let (rows, wanted) = (self.prompts.len() as u64, collection.wanted());
        let draw = |_| {
            let DataCursor { epoch, row } = collection.cursor;
            let known = self.epoch.take().filter(|(known, _)| *known == epoch);
            let seed = self.learner.state().seed;
            let (_, order) = self
                .epoch
                .insert(known.unwrap_or_else(|| (epoch, order(rows as usize, seed, epoch))));
            let drawn = (epoch * rows + row, order[row as usize]);
            collection.cursor = match row + 1 == rows {
                true => DataCursor { epoch: epoch + 1, row: 0 },
                false => DataCursor { epoch, row: row + 1 },
            };
            drawn
        };
        (wanted > 0).then(|| (0..wanted).map(draw).collect())
    }

    /// The policy that samples.
    fn sampler(&self) -> &Policy {
        self.sampler.as_ref().unwrap_or(self.learner.policy())
    }

    /// Samples `num_generations` completions of each prompt.
    ///
    /// # Errors
    /// As [`Generator::run`].
    pub fn sample(&self, drawn: &[Drawn]) -> Result<Vec<Group>> {
        let state = self.learner.state();
        let _phase = debug_span!("generate", prompts = drawn.len()).entered();
        let options = GenerateOptions { step: state.global_step, ..self.options.clone() };
        let stops = StopStrings::new(&self.text.tokenizer, &self.config.sampling.stop.0);
        let found = |tokens: &[u32]| stops.found(tokens);
        let (policy, adapters) = (self.sampler(), self.learner.adapters());
        let generator = Generator::new(policy, adapters, &options, Some(&found));
        let prompt = |(id, row): &Drawn| (*id, *row, self.prompts[*row].input_ids.clone());
        let prompts = drawn.iter().map(prompt).collect();
        let how = (self.config.grpo.num_generations, state.global_step);
        sample_groups(&generator, prompts, how, self.record(), &mut |_| {})
    }

    /// What sampling keeps for the update. It has no influence on a result.
    fn record(&self) -> Option<Record> {
        let head = self.room_for.head && self.learnt_share >= HEAD_SHARE;
        self.plan.reuse_activations.then_some(Record { head, ..self.room_for })
    }

    /// Rewards of the completions of groups, all that were sampled for a step.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if a reward fails for more than `max_reward_failures` of the completions.
    pub fn score(&mut self, groups: Vec<Group>, rewards: &mut RewardSet) -> Result<Vec<Collected>> {
        let all: Vec<_> = groups
            .iter()
            .flat_map(|group| {
                group.completions.iter().map(|completion| (&self.prompts[group.row], completion))
            })
            .collect();
        let scored = score(&self.text.tokenizer, rewards, &all)?;
        self.sampled_tokens += all.iter().map(|(_, sampled)| sampled.tokens.len()).sum::<usize>();
        if let Some(failures) = Failures::of(&scored, rewards) {
            if failures.share() > self.config.reward.max_reward_failures {
                return Err(Error::Interrupted(failures.to_string()));
            }
            let worse = |known: &Failures| known.count < failures.count;
            if self.failures.as_ref().is_none_or(worse) {
                self.failures = Some(failures);
            }
        }
        let mut scored = scored.into_iter();
        let of_group = |group: Group| Collected {
            scored: scored.by_ref().take(group.completions.len()).collect(),
            group,
        };
        Ok(groups.into_iter().map(of_group).collect())
    }

    /// The gradients of the next optimizer step.
    ///
    /// # Errors
    /// If the completions are older than `num_iterations` allows, or a number is not finite.
    pub fn gradients(&self, rollouts: &Rollouts) -> Result<(Sums, Gradients)> {
        let now = self.learner.state().global_step;
        let version = rollouts.groups.iter().map(|group| group.version).min().unwrap_or(now);
        let age = now - version;
        if age >= self.config.grpo.num_iterations as u64 {
            return Err(Error::failure(format!(
                "completions of the adapter of step {version} are {age} steps old: num_iterations \
                 allows fewer than {}",
                self.config.grpo.num_iterations
            )));
        }
        let step = Step {
            groups: &rollouts.groups,
            advantages: &rollouts.advantages,
            reference: &rollouts.reference,
            chosen: &rollouts.chosen,
            normaliser: rollouts.normaliser,
            on_policy: age == 0,
            off_policy: self.sampler.as_ref().map(|_| OffPolicy {
                old: &rollouts.old,
                cap: self.config.grpo.importance_sampling_cap,
            }),
        };
        let Plan { micro_batch_tokens, gradient_checkpointing, .. } = self.plan;
        let cut = Cut { micro_batch_tokens, gradient_checkpointing };
        let learner = &self.learner;
        gradients(learner.policy(), learner.adapters(), &step, &self.objective, cut)
    }

    /// Makes the optimizer step, and tells of it.
    ///
    /// # Errors
    /// If a gradient is not finite.
    pub fn update(
        &mut self,
        mut rollouts: Rollouts,
        (sums, gradients): (Sums, Gradients),
        started: Instant,
    ) -> Result<StepReport> {
        let tokens = if rollouts.used == 0 { rollouts.tokens() } else { 0 };
        let update = self.learner.update(gradients, tokens)?;
        let rows = self.prompts.len() as f64;
        let state = self.learner.state_mut();
        state.cursor = rollouts.cursor;
        state.epoch = rollouts.cursor.epoch as f64 + rollouts.cursor.row as f64 / rows;
        rollouts.used += 1;
        if rollouts.used == 1 {
            let sampled = std::mem::take(&mut self.sampled_tokens).max(1) as f64;
            self.learnt_share = sums.tokens as f64 / sampled;
        }
        if rollouts.used == 1 && !sums.old.is_empty() {
            rollouts.old = vec![Vec::new(); rollouts.advantages.len()];
            let of_places = sums.old.iter().cloned();
            of_places.for_each(|(place, logps)| rollouts.old[place] = logps);
        }
        let mut metrics = std::mem::take(&mut rollouts.metrics);
        let seconds = started.elapsed().as_secs_f64();
        metrics.extend(self.metrics(&sums, update).with(Fold::Mean, "time/train", seconds));
        if rollouts.used < self.config.grpo.num_iterations {
            rollouts.groups.iter_mut().for_each(Group::forget);
            self.pending = Some(rollouts);
        }
        let step = self.learner.state().global_step;
        Ok(StepReport { step, tokens, metrics })
    }

    /// A step's metrics of the loss, under TRL's names.
    fn metrics(&self, sums: &Sums, update: Update) -> StepMetrics {
        let (state, tokens) = (self.learner.state(), sums.tokens.max(1) as f64);
        let (low, high) = (sums.clipped_low as f64 / tokens, sums.clipped_high as f64 / tokens);
        let mut metrics = StepMetrics::new()
            .with(Fold::Mean, "loss", sums.loss)
            .with(Fold::Last, "grad_norm", update.grad_norm)
            .with(Fold::Last, "learning_rate", update.learning_rate);
        if sums.tokens > 0 {
            let ratio = "sampling/importance_sampling_ratio";
            metrics.push(Fold::Min, format!("{ratio}/min"), sums.ratio_min);
            metrics.push(Fold::Mean, format!("{ratio}/mean"), sums.ratio / tokens);
            metrics.push(Fold::Max, format!("{ratio}/max"), sums.ratio_max);
            metrics.push(Fold::Mean, "clip_ratio/low_mean", low);
            metrics.push(Fold::Mean, "clip_ratio/high_mean", high);
            metrics.push(Fold::Mean, "clip_ratio/region_mean", low + high);
        }
        if self.config.grpo.kl_in_loss() {
            metrics.push(Fold::Mean, "kl", sums.kl / tokens);
        }
        if self.sampler.is_some() && sums.tokens > 0 {
            metrics.push(Fold::Mean, "sampling/correction_mean", sums.correction / tokens);
        }
        metrics.with(Fold::Last, "num_tokens", state.num_tokens as f64).with(
            Fold::Last,
            "epoch",
            state.epoch,
        )
    }

    /// The completions of a step as rows of a table.
    ///
    /// # Errors
    /// If a prompt's tokens are no text.
    pub fn rows(&self, collection: &Collection, names: &[&str]) -> Result<Vec<CompletionRow>> {
        let step = self.learner.state().global_step + 1;
        collection.rows(step, names, |group| {
            let PromptTokens { row, input_ids } = &self.prompts[group.row];
            Ok((self.text.tokenizer.decode(input_ids, false)?, row.columns.clone()))
        })
    }
}

impl<'a> Trainer<'a> for GrpoTrainer<'a> {
    fn learner(&self) -> &Learner<'a> {
        &self.learner
    }

    fn learner_mut(&mut self) -> &mut Learner<'a> {
        &mut self.learner
    }

    fn fit(&mut self, before: Option<&OptimArgs>) -> Result<Plan> {
        let grpo = &self.config.grpo;
        let prompt = self.prompts.iter().map(|prompt| prompt.input_ids.len()).max().unwrap_or(0);
        let context = self.learner.policy().config().max_position_embeddings;
        let completion = self.options.max_new_tokens.min(context - prompt);
        let group = prompt + grpo.num_generations * completion;
        let case = LongestCase {
            sequence: prompt + completion,
            family: group,
            step: grpo.prompts_per_step * group,
        };
        self.plan = self.learner.plan(case, before)?;
        let wanted = self.options.max_batch.min(grpo.prompts_per_step * grpo.num_generations);
        let rounds = if grpo.dynamic_sampling { 1 + grpo.dynamic_sampling_rounds } else { 1 };
        let (learner, sampler) = (&self.learner, self.sampler());
        let wanted = Sampling {
            sequences: wanted,
            kv_bytes: sampler.engine().kv_bytes(),
            rounded: sampler.rounded_bytes(),
            kept: if grpo.reuse_activations { rounds * case.step } else { 0 },
            kept_sequences: rounds * grpo.prompts_per_step * grpo.num_generations,
            ..Sampling::default()
        };
        let fitting = |with| learner.plan_sampling(&self.plan, case.sequence, with);
        let mut sampling = fitting(wanted);
        if grpo.reuse_activations {
            let plain = self.options.sampling.is_plain() && self.objective.entropy_coef == 0.0;
            let head = if plain { sampler.transposed_head_bytes() } else { 0 };
            // more than the outputs of blocks is kept where that costs nothing else its room
            for (head, attention) in [(head, true), (head, false), (0, true)] {
                let with = Sampling { head, attention, ..sampling };
                let fits = fitting(Sampling { head, attention, ..wanted }) == with;
                if fits && learner.plan_reuse(self.plan, case, with).is_ok() {
                    sampling = with;
                    break;
                }
            }
            self.plan = learner.plan_reuse(self.plan, case, sampling)?;
        }
        self.room_for = Record { head: sampling.head > 0, attention: sampling.attention };
        self.options.max_batch = sampling.sequences;
        self.options.keep_rounded = sampling.rounded > 0;
        Ok(self.plan)
    }

    fn save_more(&self, folder: &Path) -> Result<()> {
        self.pending.as_ref().map_or(Ok(()), |rollouts| rollouts.save(folder))
    }

    fn resume_more(&mut self, folder: &Path) -> Result<()> {
        self.pending = Rollouts::load(folder)?;
        Ok(())
    }
}
