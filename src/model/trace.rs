//! A forward pass whose gradients are taken block by block.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;
use tracing::debug_span;

use super::batch::Batch;
use super::block::Pass;
use super::policy::{Policy, part_tokens};
use crate::Result;
use crate::adapter::Adapter;
use crate::ops::{GradientSums, Gradients, Place, Tape, Value};

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
}

impl<'a> Trace<'a> {
    pub(super) fn new(
        policy: &'a Policy,
        embedded: Tensor,
        batch: &Batch,
        adapters: &'a [Box<dyn Adapter>],
        checkpointing: bool,
    ) -> Result<Self> {
        let lowest = adapters.iter().filter_map(|adapter| adapter.lowest_layer()).min();
        let lowest = lowest.unwrap_or(policy.blocks.len());
        let (mut parts, mut outputs, mut end) = (Vec::new(), Vec::new(), 0);
        for part in batch.parts(part_tokens()) {
            let rows = end..end + part.len();
            end = rows.end;
            let whole = rows.len() == batch.len();
            let h = if whole {
                embedded.clone()
            } else {
                embedded.narrow(0, rows.start, rows.len())?
            };
            let pass = policy.pass(Cow::Owned(part), adapters);
            let mut part = Part { rows, pass, kept: Vec::new() };
            outputs.push(part.forward(policy, h, lowest, checkpointing)?);
            parts.push(part);
        }
        let output = match <[Tensor; 1]>::try_from(outputs) {
            Ok([output]) => output,
            Err(outputs) => Tensor::cat(&outputs, 0)?,
        };
        Ok(Trace { policy, lowest, parts, output })
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
            part.backward(self.policy, self.lowest, gradient, sums)?;
        }
        Ok(())
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
}
