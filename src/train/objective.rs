//! The supervised objective: mean negative log-likelihood of the targets of a step.
//!
//! loss = - (1 / n) sum over all targets t of the step of log p(token t | tokens before it)
//!
//! n counts the targets of the whole optimizer step, as TRL's `num_items_in_batch`, so that the
//! micro-batch changes memory and nothing else.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::example::PackedExamples;
use crate::adapter::Adapter;
use crate::model::{Batch, Policy};
use crate::ops::{GradientSums, Logps, Tape, Target, Value};
use crate::random::Stream;
use crate::{Error, Result};

/// Sums over targets, from which means are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// Sum of negative log-likelihoods, in nats.
    pub nll: f64,
    /// Sum of the entropies of the predicting distributions, in nats.
    pub entropy: f64,
    /// Number of targets that were the most likely token.
    pub correct: usize,
    /// Number of targets.
    pub targets: usize,
    /// Number of tokens that went through the model.
    pub tokens: usize,
}

impl Totals {
    /// Mean negative log-likelihood.
    pub fn loss(&self) -> f64 {
        self.nll / self.targets.max(1) as f64
    }

    /// Mean entropy.
    pub fn mean_entropy(&self) -> f64 {
        self.entropy / self.targets.max(1) as f64
    }

    /// Share of targets that were the most likely token.
    pub fn mean_token_accuracy(&self) -> f64 {
        self.correct as f64 / self.targets.max(1) as f64
    }

    fn count(&mut self, tokens: usize, targets: &[Target], said: &Logps) {
        self.tokens += tokens;
        self.targets += targets.len();
        self.nll -= said.logps.iter().map(|logp| *logp as f64).sum::<f64>();
        let (mut place, mut row) = (0, targets.first().map(|target| target.row));
        for target in targets {
            if row != Some(target.row) {
                place += 1;
                row = Some(target.row);
            }
            self.entropy += said.entropy[place] as f64;
            self.correct += usize::from(said.argmax[place] == target.token);
        }
    }
}

/// Noise on the embeddings while training (NEFTune, arXiv:2310.05914).
#[derive(Clone, Copy, Debug)]
pub struct Neftune {
    /// Strength: the noise is uniform within alpha / sqrt(T D).
    pub alpha: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
}

/// How a step's gradients are computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Passes {
    /// Compute blocks again in the backward pass instead of keeping their activations.
    pub gradient_checkpointing: bool,
    /// Noise on the embeddings.
    pub neftune: Option<Neftune>,
}

/// Adds the gradients of one micro-batch to `sums`, for a step of `n` targets.
///
/// # Errors
/// If the loss is not a finite number.
pub fn accumulate_gradients(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    packed: &PackedExamples,
    n: usize,
    passes: Passes,
    sums: &mut GradientSums,
) -> Result<Totals> {
    let (batch, targets) = (&packed.batch, &packed.targets);
    let mut embedded = policy.embed(&batch.input_ids)?;
    if let Some(neftune) = passes.neftune {
        embedded = (embedded + noise(policy, batch, neftune)?)?;
    }
    let trace = policy.trace(batch, embedded, adapters, passes.gradient_checkpointing)?;
    let tape = Tape::recording(policy.engine());
    let h = tape.input(trace.output());
    let weights = vec![-1.0 / n as f32; targets.len()];
    let (loss, said) = policy.weighted_logps(&tape, &h, targets, &weights)?;
    let mut totals = Totals::default();
    totals.count(batch.len(), targets, &said);
    if !totals.nll.is_finite() {
        return Err(Error::failure(format!("the loss became {}", totals.loss())));
    }
    let one = Tensor::ones(1, DType::F32, policy.engine().device())?;
    let (dh, _) = tape.backward_to_input(&loss, one, &h)?;
    drop(h);
    if let Some(dh) = dh {
        trace.backward_into(dh, sums)?;
    }
    Ok(totals)
}

/// The sums over one batch without gradients, for evaluation.
///
/// # Errors
/// If a tensor operation fails.
pub fn evaluate(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    packed: &PackedExamples,
) -> Result<Totals> {
    let tape = Tape::off(policy.engine());
    let h = Value::constant(policy.hidden(&packed.batch, adapters)?);
    let weights = vec![0.0; packed.targets.len()];
    let (_, said) = policy.weighted_logps(&tape, &h, &packed.targets, &weights)?;
    let mut totals = Totals::default();
    totals.count(packed.batch.len(), &packed.targets, &said);
    Ok(totals)
}

impl std::ops::AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.nll += other.nll;
        self.entropy += other.entropy;
        self.correct += other.correct;
        self.targets += other.targets;
        self.tokens += other.tokens;
    }
}

/// Uniform noise [N, D] within alpha / sqrt(T D), T the token's sequence length; each token's is a
/// function of (seed, step, sample, position).
fn noise(policy: &Policy, batch: &Batch, neftune: Neftune) -> Result<Tensor> {
    let width = policy.config().hidden_size;
    let mut values = Vec::with_capacity(batch.len() * width);
    for segment in batch.segments() {
        let bound = (neftune.alpha / ((segment.len * width) as f64).sqrt()) as f32;
        for row in segment.start..segment.start + segment.len {
            let address = [neftune.seed, neftune.step, batch.token_keys[row]];
            let mut stream = Stream::new(&address);
            values.extend((0..width).map(|_| (2.0 * stream.unit() - 1.0) * bound));
        }
    }
    Ok(Tensor::from_vec(values, (batch.len(), width), policy.engine().device())?)
}
