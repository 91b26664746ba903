//! What every trainer has: adapters with their optimizer, and where the run stands.

use std::path::Path;

use tracing::debug_span;

use crate::adapter::{Adapter, BaseModel};
use crate::config::{LearningRates, OptimArgs};
use crate::model::Policy;
use crate::ops::Gradients;
use crate::{Error, Result};

use super::checkpoint::{DataIdentity, OPTIMIZER_FILE, TrainerState};
use super::memory::{MemoryModel, Sampling};
use super::optimizer::{AdamW, AdamWConfig, clip_grad_norm};
use super::plan::{Budget, LongestCase, Plan};
use super::schedule::LrScheduler;
use super::update::apply;

/// Adapters on a frozen policy, and all that moves them.
pub struct Learner<'a> {
    policy: &'a Policy,
    optim: OptimArgs,
    adapters: Vec<Box<dyn Adapter>>,
    scheduler: LrScheduler,
    optimizer: AdamW,
    rates: LearningRates,
    total_steps: u64,
    state: TrainerState,
}

/// What an update did.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step (steering's, if both are trained).
    pub learning_rate: f64,
}

impl<'a> Learner<'a> {
    /// A learner at the start of a run of `total_steps` steps on `data`.
    pub fn new(
        policy: &'a Policy,
        adapters: Vec<Box<dyn Adapter>>,
        (optim, rates): (&OptimArgs, LearningRates),
        total_steps: u64,
        (seed, data): (u64, DataIdentity),
    ) -> Self {
        Learner {
            policy,
            adapters,
            scheduler: LrScheduler::new(optim, total_steps),
            optimizer: AdamW::new(AdamWConfig::from(optim)),
            rates,
            total_steps,
            state: TrainerState { seed, data, ..Default::default() },
            optim: optim.clone(),
        }
    }

    /// The frozen model.
    pub fn policy(&self) -> &'a Policy {
        self.policy
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Whether all steps are made.
    pub fn is_done(&self) -> bool {
        self.state.global_step >= self.total_steps
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

    /// Gives up the learner for its adapters.
    pub fn into_adapters(self) -> Vec<Box<dyn Adapter>> {
        self.adapters
    }

    /// Says that gradients of the next step are computed, or with `false` that they are: adapters
    /// with dropout care.
    pub fn set_training(&mut self, training: bool) {
        let key = training.then_some((self.state.seed, self.state.global_step));
        self.adapters.iter_mut().for_each(|adapter| adapter.set_training(key));
    }

    /// How steps fit into the memory that the configuration allows. Keys of `before`, the
    /// configuration of the run that goes on here, stand for unset ones: a plan is made once.
    ///
    /// # Errors
    /// Usage, if no plan fits.
    pub fn plan(&self, case: LongestCase, before: Option<&OptimArgs>) -> Result<Plan> {
        let mut optim = self.optim.clone();
        if let Some(before) = before {
            let (tokens, again) = (before.micro_batch_tokens, before.gradient_checkpointing);
            optim.micro_batch_tokens = optim.micro_batch_tokens.or(tokens);
            optim.gradient_checkpointing = optim.gradient_checkpointing.or(again);
        }
        let budget = match self.policy.engine().device().is_cpu() {
            true => Budget::new(optim.memory_budget),
            false => Budget::default(),
        };
        Plan::choose(&optim, case, &self.memory(), budget)
    }

    /// The plan with what sampling computes kept for the updates.
    ///
    /// # Errors
    /// Usage, if that does not fit, or the policy is not on the CPU.
    pub fn plan_reuse(&self, plan: Plan, case: LongestCase, sampling: Sampling) -> Result<Plan> {
        let memory = self.memory();
        if !self.policy.engine().device().is_cpu() {
            return Err(Error::usage("reuse_activations works on the cpu only: leave it unset"));
        }
        plan.reusing(case, &memory, sampling).ok_or_else(|| {
            Error::usage(format!(
                "reuse_activations would keep {} bytes of each of {} tokens, which memory_budget has no \
                 room for: leave it unset, or sample fewer or shorter completions",
                memory.recorded(1),
                sampling.kept,
            ))
        })
    }

    fn memory(&self) -> MemoryModel<'_> {
        MemoryModel::new(self.policy.config(), &self.adapters, self.policy.bytes())
    }

    /// How the sampling of sequences of `tokens` tokens fits into the plan's memory ([`Plan::sampling`]).
    pub fn plan_sampling(&self, plan: &Plan, tokens: usize, wanted: Sampling) -> Sampling {
        plan.sampling(tokens, &self.memory(), wanted)
    }

    /// One optimizer step by `gradients`, in which `tokens` tokens went through the model.
    ///
    /// # Errors
    /// If a gradient is not finite.
    pub fn update(&mut self, gradients: Gradients, tokens: usize) -> Result<Update> {
        let _phase = debug_span!("optimizer").entered();
        let mut flat = gradients
            .into_iter()
            .map(|(key, tensor)| Ok((key, tensor.flatten_all()?.to_vec1()?)))
            .collect::<Result<_>>()?;
        let grad_norm = clip_grad_norm(&mut flat, self.optim.max_grad_norm)?;
        let factor = self.scheduler.factor(self.state.global_step);
        let rates = LearningRates {
            steering: self.rates.steering * factor,
            lora: self.rates.lora * factor,
        };
        let decay = self.optim.weight_decay;
        apply(&mut self.optimizer, &mut self.adapters, &flat, rates, decay)?;
        self.state.global_step += 1;
        self.state.num_tokens += tokens as u64;
        let first = self.adapters.first().map_or("lora", |adapter| adapter.group());
        let learning_rate = if first == "steering" { rates.steering } else { rates.lora };
        Ok(Update { grad_norm, learning_rate })
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
        self.optimizer = AdamW::from_safetensors(AdamWConfig::from(&self.optim), &bytes)?;
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
        "the run was started on {then}, not {now}: resume it with the data, tokenizer, max_length, \
         truncation_mode and batch sizes that it began with, or start another in a new output_dir"
    )))
}
