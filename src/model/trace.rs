//! A forward pass whose gradients are taken block by block.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;
use tracing::debug_span;

use super::batch::Batch;
use super::block::{Known, Pass};
use super::hooks::Hooks;
use super::policy::{Policy, part_tokens};
use super::recording::{Recorded, outputs};
use crate::ops::{GradientSums, Gradients, Place, Tape, Value, equal_bits};
use crate::{Error, Result};

/// What is kept of one block for the backward pass.
enum Kept {
    /// All that its operations captured.
    Activations(Way),
    /// Its input; the block is computed again.
    Input(Tensor),
    /// Nothing: what it computes is recorded.
    Nothing,
}

/// The way through a block that gradients go back.
struct Way {
    tape: Tape,
    input: Place,
    output: Place,
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
    recorded: Option<RecordedPart<'a>>,
}

/// What blocks compute at a part's tokens, where passes over them were recorded.
struct RecordedPart<'a> {
    segments: Vec<&'a Recorded>,
    /// The layer that is computed whole and compared.
    checked: usize,
    /// The output of the highest layer that has not been gone back through.
    top: Tensor,
}

impl<'a> Trace<'a> {
    pub(super) fn new(
        policy: &'a Policy,
        embedded: Tensor,
        batch: &Batch,
        adapters: &'a [impl Hooks],
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
        Ok(Trace { policy, lowest, parts, output: whole(outputs)? })
    }

    pub(super) fn recorded(
        policy: &'a Policy,
        batch: &Batch,
        adapters: &'a [impl Hooks],
        segments: &[&'a Recorded],
        checked: usize,
    ) -> Result<Self> {
        let (lowest, layers) = (lowest(policy, adapters), policy.blocks.len());
        let checked = lowest + checked % (layers - lowest).max(1);
        let (mut segments, mut parts, mut streams) = (segments.iter(), Vec::new(), Vec::new());
        for (rows, part) in parts_of(batch) {
            let segments: Vec<_> = segments.by_ref().take(part.segments().len()).copied().collect();
            let top = outputs(policy.engine(), &segments, layers - 1)?;
            let pass = policy.pass(Cow::Owned(part), adapters);
            streams.push(stream(policy, &pass, layers, Some(&top))?);
            let kept = (lowest..layers).map(|_| Kept::Nothing).collect();
            let recorded = Some(RecordedPart { segments, checked, top });
            parts.push(Part { rows, pass, kept, recorded });
        }
        Ok(Trace { policy, lowest, parts, output: whole(streams)? })
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

/// The lowest layer that has an adapter; that above the last one without any.
pub(super) fn lowest(policy: &Policy, adapters: &[impl Hooks]) -> usize {
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
fn whole(parts: Vec<Tensor>) -> Result<Tensor> {
    match <[Tensor; 1]>::try_from(parts) {
        Ok([part]) => Ok(part),
        Err(parts) => Ok(Tensor::cat(&parts, 0)?),
    }
}

/// The stream into a layer's block, or with the number of layers out of the last one, given the output of
/// the block below before what adapters add to it.
fn stream(policy: &Policy, pass: &Pass, layer: usize, below: Option<&Tensor>) -> Result<Tensor> {
    let Some(below) = below else { return policy.embed(&pass.batch.input_ids) };
    let (off, below) = (Tape::off(policy.engine()), Value::constant(below.clone()));
    Ok(pass.after_block(&off, layer - 1, below)?.tensor().clone())
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
            let out = block.forward(&tape, layer, &input, &mut self.pass)?;
            h = self.pass.after_block(&tape, layer, out)?;
            if record {
                let (input, output) = (input.place(), h.place());
                self.kept.push(Kept::Activations(Way { tape, input, output }));
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
            let Way { tape, input, output } = match kept {
                Kept::Activations(way) => way,
                Kept::Input(h) => self.again(policy, (layer, lowest), h, None)?,
                Kept::Nothing => {
                    let (h, known) = self.recorded(policy, (layer, lowest))?;
                    self.again(policy, (layer, lowest), h, Some(known))?
                }
            };
            gradient = tape.backward_into(output, dy, input, sums)?;
        }
        Ok(())
    }

    /// Computes a block again from its input, as far as is needed where something is known of it.
    fn again(
        &mut self,
        policy: &Policy,
        (layer, lowest): (usize, usize),
        h: Tensor,
        known: Option<Known>,
    ) -> Result<Way> {
        let _phase = debug_span!("recompute", layer).entered();
        let tape = match known {
            None => Tape::recording(policy.engine()),
            Some(_) => Tape::keeping_all(policy.engine()),
        };
        let input = if layer > lowest { tape.input(&h) } else { Value::constant(h) };
        let (block, pass) = (&policy.blocks[layer], &mut self.pass);
        let checked = self.recorded.as_ref().is_some_and(|recorded| recorded.checked == layer);
        let (out, same) = match &known {
            None => (block.forward(&tape, layer, &input, pass)?, true),
            Some(known) if checked => block.forward_checked(&tape, layer, (&input, known), pass)?,
            Some(known) => {
                let out = block.forward_known(&tape, layer, (&input, known), pass)?;
                let computed = out.tensor().id() != known.out.id();
                let same = !computed || equal_bits(&known.out, out.tensor())?;
                (out, same)
            }
        };
        if !same {
            return Err(differs(layer));
        }
        let output = self.pass.after_block(&tape, layer, out)?.place();
        Ok(Way { input: input.place(), output, tape })
    }

    /// What is recorded of a layer, the highest that has not been asked for yet: its block's input, and the rest.
    fn recorded(
        &mut self,
        policy: &Policy,
        (layer, lowest): (usize, usize),
    ) -> Result<(Tensor, Known)> {
        let Some(recorded) = &mut self.recorded else {
            return Err(Error::failure(format!("nothing was kept of layer {layer}")));
        };
        let below = layer.checked_sub(1);
        let below = below.map(|below| outputs(policy.engine(), &recorded.segments, below));
        let below = below.transpose()?;
        let out = recorded.top.clone();
        recorded.top = below.clone().unwrap_or_else(|| out.clone());
        let of = (&recorded.segments[..], &self.pass.segments[..]);
        let attention = match layer > lowest || !self.pass.acts_last() {
            true => policy.blocks[layer].known_attention(policy.engine(), layer, of)?,
            false => None,
        };
        let h = stream(policy, &self.pass, layer, below.as_ref())?;
        Ok((h, Known { out, attention }))
    }
}

fn differs(layer: usize) -> Error {
    Error::failure(format!(
        "layer {layer} makes in training what it did not make while sampling, with the same adapters; this is \
         a bug"
    ))
}
