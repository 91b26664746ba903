//! A forward pass whose gradients are taken block by block.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;
use tracing::debug_span;

use super::batch::Batch;
use super::block::Pass;
use super::policy::{Policy, part_tokens};
use super::recording::{Recorded, outputs};
use crate::adapter::{Adapter, Site};
use crate::ops::{GradientSums, Gradients, Place, Tape, Value, equal_bits};
use crate::{Error, Result};

/// What is kept of one block for the backward pass.
enum Kept {
    /// All that its operations captured.
    Activations { tape: Tape, input: Place, output: Place },
    /// Its input; the block is computed again.
    Input(Tensor),
}

/// A forward pass of a [`Policy`]: the last block's output and the way back.
///
/// Nothing is kept of the blocks below the lowest layer that has an adapter. Long batches go through
/// the blocks in parts, so that the memory of a block at work does not grow with the batch.
pub struct Trace<'a> {
    policy: &'a Policy,
    lowest: usize,
    parts: Vec<Part<'a>>,
    output: Tensor,
}

/// Some rows of the batch on their way through all blocks.
struct Part<'a> {
    rows: Range<usize>,
    pass: Pass<'a>,
    kept: Vec<Kept>,
    recorded: Option<Outputs>,
}

/// The blocks' outputs of a part's tokens, where a pass over them was recorded.
struct Outputs {
    segments: Vec<Recorded>,
    /// The layer whose output is computed again and compared.
    checked: usize,
}

impl<'a> Trace<'a> {
    pub(super) fn new(
        policy: &'a Policy,
        embedded: Tensor,
        batch: &Batch,
        adapters: &'a [Box<dyn Adapter>],
        checkpointing: bool,
    ) -> Result<Self> {
        let lowest = lowest(policy, adapters);
        let (mut parts, mut outputs) = (Vec::new(), Vec::new());
        for (rows, part) in parts_of(batch) {
            let whole = rows.len() == batch.len();
            let h = if whole {
                embedded.clone()
            } else {
                embedded.narrow(0, rows.start, rows.len())?
            };
            let pass = policy.pass(Cow::Owned(part), adapters);
            let mut part = Part { rows, pass, kept: Vec::new(), recorded: None };
            outputs.push(part.forward(policy, h, lowest, checkpointing)?);
            parts.push(part);
        }
        Ok(Trace { policy, lowest, parts, output: one(outputs)? })
    }

    pub(super) fn recorded(
        policy: &'a Policy,
        batch: &Batch,
        adapters: &'a [Box<dyn Adapter>],
        segments: &[Recorded],
        checked: usize,
    ) -> Result<Self> {
        let _phase = debug_span!("recorded", tokens = batch.len()).entered();
        let (mut segments, mut parts, mut outputs) = (segments.iter(), Vec::new(), Vec::new());
        for (rows, part) in parts_of(batch) {
            let of_part = segments.by_ref().take(part.segments().len()).cloned().collect();
            let recorded = Some(Outputs { segments: of_part, checked });
            let pass = policy.pass(Cow::Owned(part), adapters);
            let part = Part { rows, pass, kept: Vec::new(), recorded };
            let layers = policy.blocks.len();
            outputs.push(part.stream(policy, layers, part.output(policy, layers)?)?);
            parts.push(part);
        }
        Ok(Trace { policy, lowest: lowest(policy, adapters), parts, output: one(outputs)? })
    }

    /// The last block's output [N, D], before the final norm.
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// Gradients of the adapters' parameters, given that of the output [N, D].
    pub fn backward(self, gradient: Tensor) -> Result<Gradients> {
        let (engine, mut sums) = (self.policy.engine(), GradientSums::new());
        self.backward_into(gradient, &mut sums)?;
        sums.finish(engine)
    }

    /// [`Trace::backward`], the gradients added to `sums`.
    pub fn backward_into(self, gradient: Tensor, sums: &mut GradientSums) -> Result<()> {
        let tokens: usize = self.parts.iter().map(|part| part.rows.len()).sum();
        let _phase = debug_span!("backward", tokens).entered();
        drop(self.output);
        for part in self.parts {
            let gradient = gradient.narrow(0, part.rows.start, part.rows.len())?;
            match part.recorded.is_some() {
                true => part.backward_recorded(self.policy, self.lowest, gradient, sums)?,
                false => part.backward(self.policy, self.lowest, gradient, sums)?,
            }
        }
        Ok(())
    }
}

/// The lowest layer that has an adapter; that above the last one without any.
fn lowest(policy: &Policy, adapters: &[Box<dyn Adapter>]) -> usize {
    let layers = adapters.iter().filter_map(|adapter| adapter.lowest_layer());
    layers.min().unwrap_or(policy.blocks.len())
}

/// The parts that a batch goes through the blocks in, with their rows.
fn parts_of(batch: &Batch) -> impl Iterator<Item = (Range<usize>, Batch)> {
    batch.parts(part_tokens()).into_iter().scan(0, |end, part| {
        let start = std::mem::replace(end, *end + part.len());
        Some((start..*end, part))
    })
}

/// The rows of all parts.
fn one(outputs: Vec<Tensor>) -> Result<Tensor> {
    match <[Tensor; 1]>::try_from(outputs) {
        Ok([output]) => Ok(output),
        Err(outputs) => Ok(Tensor::cat(&outputs, 0)?),
    }
}

impl Part<'_> {
    /// The last block's output for the first one's input h.
    fn forward(
        &mut self,
        policy: &Policy,
        h: Tensor,
        lowest: usize,
        checkpointing: bool,
    ) -> Result<Tensor> {
        let mut h = Value::constant(h);
        for (layer, block) in policy.blocks.iter().enumerate() {
            let record = layer >= lowest && !checkpointing;
            let tape = if record { Tape::recording } else { Tape::off }(policy.engine());
            let input = if layer > lowest { tape.input_from(&h) } else { h };
            h = block.forward(&tape, layer, &input, &mut self.pass)?;
            if record {
                let (input, output) = (input.place(), h.place());
                self.kept.push(Kept::Activations { tape, input, output });
            } else if layer >= lowest {
                self.kept.push(Kept::Input(input.tensor().clone()));
            }
        }
        Ok(h.tensor().clone())
    }

    /// Adds the parameters' gradients to `sums`, given that of the last block's output.
    fn backward(
        mut self,
        policy: &Policy,
        lowest: usize,
        gradient: Tensor,
        sums: &mut GradientSums,
    ) -> Result<()> {
        let mut gradient = Some(gradient);
        while let (Some(kept), Some(dy)) = (self.kept.pop(), gradient.take()) {
            let layer = lowest + self.kept.len();
            let (tape, input, output) = match kept {
                Kept::Activations { tape, input, output } => (tape, input, output),
                Kept::Input(h) => {
                    let _phase = debug_span!("recompute", layer).entered();
                    let tape = Tape::recording(policy.engine());
                    let input = if layer > lowest { tape.input(&h) } else { Value::constant(h) };
                    let block = &policy.blocks[layer];
                    let output = block.forward(&tape, layer, &input, &mut self.pass)?.place();
                    (tape, input.place(), output)
                }
            };
            gradient = tape.backward_into(output, dy, input, sums)?;
        }
        Ok(())
    }

    /// What the blocks below `layer` are recorded to put out, before what adapters add to it.
    fn output(&self, policy: &Policy, layer: usize) -> Result<Option<Tensor>> {
        let segments = self.recorded.as_ref().map_or(&[][..], |recorded| &recorded.segments);
        layer.checked_sub(1).map(|below| outputs(policy.engine(), segments, below)).transpose()
    }

    /// The stream into a layer's block, or with the number of layers out of the last one, given what
    /// the blocks below put out.
    fn stream(&self, policy: &Policy, layer: usize, output: Option<Tensor>) -> Result<Tensor> {
        let Some(output) = output else { return policy.embed(&self.pass.batch.input_ids) };
        let (off, output) = (Tape::off(policy.engine()), Value::constant(output));
        Ok(self.pass.shift(&off, layer - 1, Site::PostBlock, output)?.tensor().clone())
    }

    /// [`Part::backward`] from recorded outputs.
    fn backward_recorded(
        mut self,
        policy: &Policy,
        lowest: usize,
        gradient: Tensor,
        sums: &mut GradientSums,
    ) -> Result<()> {
        let (mut gradient, layers) = (Some(gradient), policy.blocks.len());
        let mut output = self.output(policy, layers)?;
        for layer in (lowest..layers).rev() {
            let (Some(dy), Some(out)) = (gradient.take(), output) else { break };
            let phase = debug_span!("recompute", layer).entered();
            output = self.output(policy, layer)?;
            let h = self.stream(policy, layer, output.clone())?;
            let tape = Tape::recording(policy.engine());
            let input = if layer > lowest { tape.input(&h) } else { Value::constant(h) };
            let result = self.forward_known(policy, &tape, layer, (&input, &out))?.place();
            drop(phase);
            gradient = tape.backward_into(result, dy, input.place(), sums)?;
        }
        Ok(())
    }

    /// A block's way forward to a known output; the checked one's is computed and compared.
    fn forward_known(
        &mut self,
        policy: &Policy,
        tape: &Tape,
        layer: usize,
        (h, out): (&Value, &Tensor),
    ) -> Result<Value> {
        let block = &policy.blocks[layer];
        if self.recorded.as_ref().is_none_or(|recorded| recorded.checked != layer) {
            return block.forward_known(tape, layer, (h, out), &mut self.pass);
        }
        self.pass.outputs = Some(Vec::new());
        let result = block.forward(tape, layer, h, &mut self.pass)?;
        let computed = self.pass.outputs.take().unwrap_or_default();
        for computed in computed {
            if !equal_bits(&computed, out)? {
                return Err(Error::failure(format!(
                    "layer {layer} puts out in training what it did not put out while sampling, with \
                     the same adapters; this is a bug"
                )));
            }
        }
        Ok(result)
    }
}
