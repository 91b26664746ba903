//! The supervised trainer: which examples a step takes, its gradients, the update, and everything
//! that a checkpoint must hold for the run to go on as if unbroken.

use std::path::Path;
use std::time::Duration;

use tracing::debug_span;

use crate::adapter::{Adapter, BaseModel};
use crate::config::{LearningRates, OptimArgs, SftConfig};
use crate::model::Policy;
use crate::ops::{GradientSums, Gradients};
use crate::report::{Event, MetricLine, Metrics};
use crate::{Error, Result};

use super::batching::{Schedule, micro_batches};
use super::checkpoint::{DataCursor, DataIdentity, OPTIMIZER_FILE, TrainerState};
use super::example::{PackedExamples, TokenExample, digest};
use super::memory::MemoryModel;
use super::objective::{Neftune, Passes, Totals, accumulate_gradients, evaluate};
use super::optimizer::{AdamW, AdamWConfig, clip_grad_norm};
use super::plan::{Budget, LongestCase, Plan};
use super::schedule::LrScheduler;
use super::update::apply;

/// Tokens that are evaluated in one pass.
const EVALUATION_TOKENS: usize = 4096;

/// What one optimizer step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Sums over the step's targets.
    pub totals: Totals,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step (steering's, if both are trained).
    pub learning_rate: f64,
}

impl StepReport {
    /// The step for the progress bar, given the time that it took.
    pub fn event(&self, taken: Duration) -> Event {
        let tokens = self.totals.tokens as u64;
        Event::Step { step: self.step, tokens, seconds: taken.as_secs_f64() }
    }

    /// The step's line of metrics, under TRL's names.
    pub fn line(&self, state: &TrainerState, taken: Duration) -> MetricLine {
        let metrics = Metrics::new()
            .with("loss", self.totals.loss())
            .with("grad_norm", self.grad_norm)
            .with("learning_rate", self.learning_rate)
            .with("entropy", self.totals.mean_entropy())
            .with("mean_token_accuracy", self.totals.mean_token_accuracy())
            .with("num_tokens", state.num_tokens as f64)
            .with("epoch", state.epoch)
            .with("step_time", taken.as_secs_f64());
        MetricLine::new(self.step, metrics)
    }
}

/// Supervised tuning of adapters on a frozen policy.
pub struct SftTrainer<'a> {
    config: &'a SftConfig,
    policy: &'a Policy,
    examples: &'a [TokenExample],
    adapters: Vec<Box<dyn Adapter>>,
    schedule: Schedule,
    scheduler: LrScheduler,
    optimizer: AdamW,
    rates: LearningRates,
    total_steps: u64,
    plan: Plan,
    state: TrainerState,
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
        let pack_to = config.data.packing.then_some(config.data.max_length);
        let schedule = Schedule::new(lengths, train.seed, optim.sequences_per_step(), pack_to);
        let steps_per_epoch = schedule.steps_per_epoch() as u64;
        let by_epochs = (train.num_train_epochs * steps_per_epoch as f64).ceil() as u64;
        let data = DataIdentity {
            examples: examples.len() as u64,
            steps_per_epoch,
            sha256: digest(examples),
        };
        let total_steps = train.step_limit().unwrap_or(by_epochs);
        Ok(SftTrainer {
            plan: Plan::unbounded(optim),
            rates: config.adapter.learning_rates(optim.learning_rate),
            optimizer: AdamW::new(AdamWConfig::from(optim)),
            scheduler: LrScheduler::new(optim, total_steps),
            state: TrainerState { seed: train.seed, data, ..Default::default() },
            config,
            policy,
            examples,
            adapters,
            schedule,
            total_steps,
            epoch: None,
        })
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Where the run stands.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// Where the run stands, to note evaluations in.
    pub fn state_mut(&mut self) -> &mut TrainerState {
        &mut self.state
    }

    /// What is trained.
    pub fn adapters(&self) -> &[Box<dyn Adapter>] {
        &self.adapters
    }

    /// Fits the steps into the memory that the configuration allows. Keys of `before`, the
    /// configuration of the run that goes on here, stand for unset ones: a plan is made once.
    ///
    /// # Errors
    /// Usage, if no plan fits.
    pub fn fit(&mut self, before: Option<&OptimArgs>) -> Result<Plan> {
        let mut optim = self.config.optim.clone();
        if let Some(before) = before {
            let (tokens, again) = (before.micro_batch_tokens, before.gradient_checkpointing);
            optim.micro_batch_tokens = optim.micro_batch_tokens.or(tokens);
            optim.gradient_checkpointing = optim.gradient_checkpointing.or(again);
        }
        let (policy, schedule) = (self.policy, &self.schedule);
        let memory = MemoryModel::new(policy.config(), &self.adapters, policy.bytes());
        let case = LongestCase { sequence: schedule.longest(), step: schedule.largest_step() };
        let budget = match policy.engine().device().is_cpu() {
            true => Budget::new(optim.memory_budget),
            false => Budget::default(),
        };
        self.plan = Plan::choose(&optim, case, &memory, budget)?;
        Ok(self.plan)
    }

    /// Gives up the trainer for its adapters.
    pub fn into_adapters(self) -> Vec<Box<dyn Adapter>> {
        self.adapters
    }

    /// The next optimizer step; nothing when the run is over.
    ///
    /// # Errors
    /// If the loss or a gradient is not finite: the message names the step and its rows.
    pub fn step(&mut self) -> Result<Option<StepReport>> {
        if self.state.global_step >= self.total_steps {
            return Ok(None);
        }
        let chosen = self.next_examples()?;
        let step = self.state.global_step;
        let _phase = debug_span!("step", step = step + 1).entered();
        self.adapters.iter_mut().for_each(|a| a.set_training(Some((self.state.seed, step))));
        let result = self.gradients(&chosen);
        self.adapters.iter_mut().for_each(|adapter| adapter.set_training(None));
        let (totals, gradients) = result.map_err(|error| self.located(error, &chosen))?;
        let report = self.update(totals, gradients);
        let report = report.map_err(|error| self.located(error, &chosen))?;
        Ok(Some(report))
    }

    /// Sums over held-out examples.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn evaluate(&self, examples: &[TokenExample]) -> Result<Totals> {
        evaluate_examples(self.policy, &self.adapters, examples)
    }

    /// Puts adapter, optimizer and state into `folder`.
    ///
    /// # Errors
    /// If a file cannot be written whole.
    pub fn save(&self, folder: &Path, base: &BaseModel) -> Result<()> {
        let _phase = debug_span!("save").entered();
        crate::adapter::save(folder, &self.adapters, base)?;
        let optimizer = self.optimizer.to_safetensors()?;
        crate::files::write_atomic(&folder.join(OPTIMIZER_FILE), &optimizer)?;
        self.state.save(folder)
    }

    /// Takes up the run where `folder` left it.
    ///
    /// # Errors
    /// If a file is missing, damaged or of another run: another seed, other rows or batches.
    pub fn resume(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(OPTIMIZER_FILE);
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let state = TrainerState::load(folder)?;
        if state.seed != self.state.seed {
            let (then, now) = (state.seed, self.state.seed);
            return Err(Error::usage(format!("the run was started with seed {then}, not {now}")));
        }
        same_data(&state.data, &self.state.data)?;
        self.optimizer = AdamW::from_safetensors(AdamWConfig::from(&self.config.optim), &bytes)?;
        self.restore_adapters(folder)?;
        self.state = state;
        Ok(())
    }

    /// Puts the adapter of a checkpoint in the place of the current one, as for the best one at the
    /// end.
    ///
    /// # Errors
    /// If it is missing, damaged or has other settings than the current one.
    pub fn restore_adapters(&mut self, folder: &Path) -> Result<()> {
        let device = self.policy.engine().device();
        let saved = crate::adapter::load(folder, self.policy.config(), device)?;
        let all = |adapters: &[Box<dyn Adapter>]| {
            adapters.iter().map(|adapter| settings(&**adapter)).collect::<Result<Vec<_>>>()
        };
        if all(&saved)? != all(&self.adapters)? {
            let folder = folder.display();
            return Err(Error::usage(format!(
                "{folder}: the adapter here has other settings than this run's: resume the run \
                 with what it began with, or start another in a new output_dir"
            )));
        }
        for (adapter, saved) in self.adapters.iter_mut().zip(saved) {
            adapter.set_parameters(saved.parameters().clone());
        }
        Ok(())
    }

    /// The examples of the next step, by number.
    fn next_examples(&mut self) -> Result<Vec<usize>> {
        let cursor = &mut self.state.cursor;
        let order = match self.epoch.take().filter(|(epoch, _)| *epoch == cursor.epoch) {
            Some((_, order)) => order,
            None => self.schedule.epoch(cursor.epoch),
        };
        let chosen = order.get(cursor.row as usize).cloned();
        let DataCursor { epoch, row } = *cursor;
        self.epoch = Some((epoch, order));
        chosen.ok_or_else(|| Error::failure(format!("epoch {epoch} has no step {}", row + 1)))
    }

    fn gradients(&self, chosen: &[usize]) -> Result<(Totals, Gradients)> {
        let optim = &self.config.optim;
        let n = chosen.iter().map(|example| self.examples[*example].targets()).sum();
        let alpha = optim.neftune_noise_alpha;
        let (seed, step) = (self.state.seed, self.state.global_step);
        let neftune = (alpha > 0.0).then_some(Neftune { alpha, seed, step });
        let Plan { micro_batch_tokens, gradient_checkpointing, .. } = self.plan;
        let passes = Passes { gradient_checkpointing, neftune };
        let places: Vec<usize> = (0..chosen.len()).collect();
        let lengths: Vec<usize> =
            chosen.iter().map(|example| self.examples[*example].input_ids.len()).collect();
        let (mut totals, mut sums) = (Totals::default(), GradientSums::new());
        for places in micro_batches(&places, &lengths, micro_batch_tokens) {
            let packed = PackedExamples::new(
                places.iter().map(|place| (*place as u64, &self.examples[chosen[*place]])),
            );
            totals +=
                accumulate_gradients(self.policy, &self.adapters, &packed, n, passes, &mut sums)?;
        }
        Ok((totals, sums.finish(self.policy.engine())?))
    }

    fn update(&mut self, totals: Totals, gradients: Gradients) -> Result<StepReport> {
        let _phase = debug_span!("optimizer").entered();
        let mut flat = gradients
            .into_iter()
            .map(|(key, tensor)| Ok((key, tensor.flatten_all()?.to_vec1()?)))
            .collect::<Result<_>>()?;
        let grad_norm = clip_grad_norm(&mut flat, self.config.optim.max_grad_norm)?;
        let factor = self.scheduler.factor(self.state.global_step);
        let rates = LearningRates {
            steering: self.rates.steering * factor,
            lora: self.rates.lora * factor,
        };
        let decay = self.config.optim.weight_decay;
        apply(&mut self.optimizer, &mut self.adapters, &flat, rates, decay)?;
        self.advance(totals.tokens);
        let first = self.adapters.first().map_or("lora", |adapter| adapter.group());
        let learning_rate = if first == "steering" { rates.steering } else { rates.lora };
        Ok(StepReport { step: self.state.global_step, totals, grad_norm, learning_rate })
    }

    fn advance(&mut self, tokens: usize) {
        let state = &mut self.state;
        let per_epoch = state.data.steps_per_epoch;
        state.global_step += 1;
        state.num_tokens += tokens as u64;
        state.cursor.row += 1;
        if state.cursor.row == per_epoch {
            state.cursor.epoch += 1;
            state.cursor.row = 0;
        }
        state.epoch = state.cursor.epoch as f64 + state.cursor.row as f64 / per_epoch as f64;
    }

    fn located(&self, error: Error, chosen: &[usize]) -> Error {
        let rows: Vec<String> =
            chosen.iter().map(|example| self.examples[*example].row.to_string()).collect();
        let (step, rows) = (self.state.global_step + 1, rows.join(", "));
        Error::failure(format!("step {step} (training rows {rows}): {error}"))
    }
}

/// What an adapter's configuration file says of it, dropout aside, which does not change what the
/// parameters mean.
fn settings(adapter: &dyn Adapter) -> Result<Option<serde_json::Value>> {
    let files = adapter.files(&BaseModel::default())?;
    let json = files.iter().find(|(name, _)| name.ends_with(".json"));
    let mut settings: Option<serde_json::Value> =
        json.and_then(|(_, bytes)| serde_json::from_slice(bytes).ok());
    if let Some(fields) = settings.as_mut().and_then(|json| json.as_object_mut()) {
        fields.remove("lora_dropout");
    }
    Ok(settings)
}

/// Refuses to go on with other data than the run began with.
fn same_data(then: &DataIdentity, now: &DataIdentity) -> Result<()> {
    if then == now {
        return Ok(());
    }
    let size = |data: &DataIdentity| {
        format!("{} rows in {} steps an epoch", data.examples, data.steps_per_epoch)
    };
    let (then, now) = match size(then) == size(now) {
        true => ("other rows".to_string(), format!("these {}", size(now))),
        false => (size(then), size(now)),
    };
    Err(Error::usage(format!(
        "the run was started on {then}, not {now}: resume it with the data, tokenizer, max_length and \
         batch sizes that it began with, or start another in a new output_dir"
    )))
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
