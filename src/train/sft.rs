//! The supervised trainer: which examples a step takes, and its gradients.

use tracing::debug_span;

use crate::adapter::Adapter;
use crate::config::{OptimArgs, SftConfig};
use crate::model::Policy;
use crate::ops::{GradientSums, Gradients};
use crate::report::{Fold, StepMetrics};
use crate::{Error, Result};

use super::batching::{Schedule, micro_batches};
use super::checkpoint::{DataCursor, DataIdentity, TrainerState};
use super::example::{PackedExamples, TokenExample, digest};
use super::learner::{Learner, Update};
use super::objective::{Neftune, Passes, Totals, accumulate_gradients, evaluate};
use super::plan::{LongestCase, Plan};
use super::run::{StepReport, Trainer};

/// Tokens that are evaluated in one pass.
const EVALUATION_TOKENS: usize = 4096;

/// Supervised tuning of adapters on a frozen policy.
pub struct SftTrainer<'a> {
    config: &'a SftConfig,
    examples: &'a [TokenExample],
    learner: Learner<'a>,
    schedule: Schedule,
    plan: Plan,
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

impl<'a> SftTrainer<'a> {
    /// A trainer at the start of its run.
    ///
    /// # Errors
    /// If there is no example.
    pub fn new(
        config: &'a SftConfig,
        policy: &'a Policy,
        adapters: Vec<Box<dyn Adapter>>,
        examples: &'a [TokenExample],
    ) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::usage("the training split holds no row"));
        }
        let (optim, train) = (&config.optim, &config.train);
        let lengths = examples.iter().map(|example| example.input_ids.len()).collect();
        let pack_to = config.sequence.packing.then_some(config.sequence.max_length);
        let schedule =
            Schedule::new(lengths, train.seed, config.batch.sequences_per_step(), pack_to);
        let steps_per_epoch = schedule.steps_per_epoch() as u64;
        let by_epochs = (train.num_train_epochs * steps_per_epoch as f64).ceil() as u64;
        let data = DataIdentity {
            examples: examples.len() as u64,
            steps_per_epoch,
            sha256: digest(examples),
        };
        let total_steps = train.step_limit().unwrap_or(by_epochs);
        let rates = config.adapter.learning_rates(optim.learning_rate);
        let learner =
            Learner::new(policy, adapters, (optim, rates), total_steps, (train.seed, data));
        let plan = Plan::unbounded(optim);
        Ok(SftTrainer { config, examples, learner, schedule, plan, epoch: None })
    }

    /// Gives up the trainer for its adapters.
    pub fn into_adapters(self) -> Vec<Box<dyn Adapter>> {
        self.learner.into_adapters()
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// If the loss or a gradient is not finite: the message names the step and its rows.
    pub fn step(&mut self) -> Result<StepReport> {
        let chosen = self.next_examples()?;
        let step = self.learner.state().global_step + 1;
        let _phase = debug_span!("step", step).entered();
        self.learner.set_training(true);
        let result = self.gradients(&chosen);
        self.learner.set_training(false);
        let (totals, gradients) = result.map_err(|error| self.located(step, error, &chosen))?;
        let update = self.learner.update(gradients, totals.tokens);
        let update = update.map_err(|error| self.located(step, error, &chosen))?;
        self.advance();
        Ok(StepReport { step, tokens: totals.tokens, metrics: self.metrics(totals, update) })
    }

    /// A step's metrics, under TRL's names.
    fn metrics(&self, totals: Totals, update: Update) -> StepMetrics {
        let state = self.learner.state();
        StepMetrics::new()
            .with(Fold::Mean, "loss", totals.loss())
            .with(Fold::Last, "grad_norm", update.grad_norm)
            .with(Fold::Last, "learning_rate", update.learning_rate)
            .with(Fold::Mean, "entropy", totals.mean_entropy())
            .with(Fold::Mean, "mean_token_accuracy", totals.mean_token_accuracy())
            .with(Fold::Last, "num_tokens", state.num_tokens as f64)
            .with(Fold::Last, "epoch", state.epoch)
    }

    /// Sums over held-out examples.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn evaluate(&self, examples: &[TokenExample]) -> Result<Totals> {
        evaluate_examples(self.learner.policy(), self.learner.adapters(), examples)
    }

    /// The examples of the next step, by number.
    fn next_examples(&mut self) -> Result<Vec<usize>> {
        let cursor = self.learner.state().cursor;
        let order = match self.epoch.take().filter(|(epoch, _)| *epoch == cursor.epoch) {
            Some((_, order)) => order,
            None => self.schedule.epoch(cursor.epoch),
        };
        let chosen = order.get(cursor.row as usize).cloned();
        let DataCursor { epoch, row } = cursor;
        self.epoch = Some((epoch, order));
        chosen.ok_or_else(|| Error::failure(format!("epoch {epoch} has no step {}", row + 1)))
    }

    fn gradients(&self, chosen: &[usize]) -> Result<(Totals, Gradients)> {
        let n = chosen.iter().map(|example| self.examples[*example].targets()).sum();
        let alpha = self.config.batch.neftune_noise_alpha;
        let TrainerState { seed, global_step: step, .. } = *self.learner.state();
        let neftune = (alpha > 0.0).then_some(Neftune { alpha, seed, step });
        let Plan { micro_batch_tokens, gradient_checkpointing, .. } = self.plan;
        let passes = Passes { gradient_checkpointing, neftune };
        let places: Vec<usize> = (0..chosen.len()).collect();
        let lengths: Vec<usize> =
            chosen.iter().map(|example| self.examples[*example].input_ids.len()).collect();
        let (policy, adapters) = (self.learner.policy(), self.learner.adapters());
        let (mut totals, mut sums) = (Totals::default(), GradientSums::new());
        for places in micro_batches(&places, &lengths, micro_batch_tokens) {
            let packed = PackedExamples::new(
                places.iter().map(|place| (*place as u64, &self.examples[chosen[*place]])),
            );
            totals += accumulate_gradients(policy, adapters, &packed, n, passes, &mut sums)?;
        }
        Ok((totals, sums.finish(policy.engine())?))
    }

    /// Moves the cursor past the rows of the step that was made.
    fn advance(&mut self) {
        let state = self.learner.state_mut();
        let per_epoch = state.data.steps_per_epoch;
        state.cursor.row += 1;
        if state.cursor.row == per_epoch {
            state.cursor.epoch += 1;
            state.cursor.row = 0;
        }
        state.epoch = state.cursor.epoch as f64 + state.cursor.row as f64 / per_epoch as f64;
    }

    fn located(&self, step: u64, error: Error, chosen: &[usize]) -> Error {
        let rows: Vec<String> =
            chosen.iter().map(|example| self.examples[*example].row.to_string()).collect();
        let rows = rows.join(", ");
        Error::failure(format!("step {step} (training rows {rows}): {error}"))
    }
}

impl<'a> Trainer<'a> for SftTrainer<'a> {
    fn learner(&self) -> &Learner<'a> {
        &self.learner
    }

    fn learner_mut(&mut self) -> &mut Learner<'a> {
        &mut self.learner
    }

    fn fit(&mut self, before: Option<&OptimArgs>) -> Result<Plan> {
        let schedule = &self.schedule;
        let (longest, step) = (schedule.longest(), schedule.largest_step());
        let case = LongestCase { sequence: longest, family: longest, step };
        self.plan = self.learner.plan(case, before)?;
        Ok(self.plan)
    }
}

/// Sums over examples without gradients.
///
/// # Errors
/// If a tensor operation fails.
pub fn evaluate_examples(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    examples: &[TokenExample],
) -> Result<Totals> {
    let _phase = debug_span!("evaluate").entered();
    let order: Vec<usize> = (0..examples.len()).collect();
    let lengths: Vec<usize> = examples.iter().map(|example| example.input_ids.len()).collect();
    let mut totals = Totals::default();
    for chosen in micro_batches(&order, &lengths, EVALUATION_TOKENS) {
        let packed = PackedExamples::new(chosen.iter().map(|i| (*i as u64, &examples[*i])));
        totals += evaluate(policy, adapters, &packed)?;
    }
    Ok(totals)
}
