//! A forward pass whose gradients are taken block by block.

use candle_core::Tensor;
use tracing::debug_span;

use super::block::Pass;
use super::policy::Policy;
use crate::Result;
use crate::ops::{Gradients, Tape, Value, accumulate};

/// What is kept of one block for the backward pass.
enum Kept {
    /// All that its operations captured.
    Activations { tape: Tape, input: Value, output: Value },
    /// Its input; the block is computed again.
    Input(Tensor),
}

/// A forward pass of a [`Policy`]: the last block's output and the way back.
///
/// Nothing is kept of the blocks below the lowest layer that has an adapter.
pub struct Trace<'a> {
    policy: &'a Policy,
    pass: Pass<'a>,
    lowest: usize,
    kept: Vec<Kept>,
    output: Tensor,
}

impl<'a> Trace<'a> {
    pub(super) fn new(
        policy: &'a Policy,
        embedded: Tensor,
        mut pass: Pass<'a>,
        checkpointing: bool,
    ) -> Result<Self> {
        let layers = policy.blocks.len();
        let lowest = pass.adapters.iter().filter_map(|adapter| adapter.lowest_layer()).min();
        let lowest = lowest.unwrap_or(layers);
        let mut kept = Vec::with_capacity(layers - lowest);
        let mut h = embedded;
        for (layer, block) in policy.blocks.iter().enumerate() {
            let record = layer >= lowest && !checkpointing;
            let tape = if record { Tape::recording } else { Tape::off }(policy.engine());
            let input = if layer > lowest { tape.input(&h) } else { Value::constant(h.clone()) };
            let output = block.forward(&tape, layer, &input, &mut pass)?;
            h = output.tensor().clone();
            if record {
                kept.push(Kept::Activations { tape, input, output });
            } else if layer >= lowest {
                kept.push(Kept::Input(input.tensor().clone()));
            }
        }
        Ok(Trace { policy, pass, lowest, kept, output: h })
    }

    /// The last block's output [N, D], before the final norm.
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// Gradients of the adapters' parameters, given that of the output [N, D].
    pub fn backward(mut self, gradient: Tensor) -> Result<Gradients> {
        let _phase = debug_span!("backward", tokens = self.pass.batch.len()).entered();
        let mut sums = Gradients::new();
        let mut gradient = Some(gradient);
        drop(self.output);
        while let (Some(kept), Some(dy)) = (self.kept.pop(), gradient.take()) {
            let layer = self.lowest + self.kept.len();
            let (tape, input, output) = match kept {
                Kept::Activations { tape, input, output } => (tape, input, output),
                Kept::Input(h) => {
                    let _phase = debug_span!("recompute", layer).entered();
                    let tape = Tape::recording(self.policy.engine());
                    let first = layer == self.lowest;
                    let input = if first { Value::constant(h) } else { tape.input(&h) };
                    let block = &self.policy.blocks[layer];
                    let output = block.forward(&tape, layer, &input, &mut self.pass)?;
                    (tape, input, output)
                }
            };
            let (dx, params) = tape.backward_to_input(&output, dy, &input)?;
            for (key, gradient) in params {
                accumulate(self.policy.engine(), &mut sums, key, gradient)?;
            }
            gradient = dx;
        }
        Ok(sums)
    }
}
