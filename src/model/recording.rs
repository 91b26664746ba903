//! What passes over a cache computed, so that a later pass over the same tokens need not.

use std::sync::Arc;

use candle_core::Tensor;

use crate::ops::{Engine, pick_rows};
use crate::{Error, Result};

/// The outputs of blocks in some passes of a policy, before what adapters add after a block: of all that the
/// way back reads, from the block below the lowest adapter on.
#[derive(Debug, Default)]
pub struct Recording {
    /// Of each pass and layer, [N, D].
    passes: Vec<Vec<(usize, Tensor)>>,
    /// What [`Policy::drawn_gradients`](super::Policy::drawn_gradients) gave each time, [rows, D], and D.
    drawn: Vec<(Vec<f32>, usize)>,
}

/// A token in a [`Recording`]: its pass, and its row there.
pub type RecordedRow = (u32, u32);

/// Tokens of a sequence in a recording.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The recording.
    pub recording: Arc<Recording>,
    /// The tokens, one after the other.
    pub rows: Vec<RecordedRow>,
    /// The gradients of a completion's drawn tokens, the last one too; empty where they were not taken.
    pub drawn: Vec<RecordedRow>,
}

impl Recorded {
    /// The gradient of the log-prob of the completion's token `t` in what the head read, `[D]`, if it was taken.
    pub fn gradient(&self, t: usize) -> Option<&[f32]> {
        let (time, row) = *self.drawn.get(t)?;
        let (gradients, d) = self.recording.drawn.get(time as usize)?;
        gradients.get(row as usize * d..(row as usize + 1) * d)
    }
}

/// Recordings are equal if they name the same rows of passes: what they hold follows from tokens and adapters, and
/// whether gradients were taken changes no result.
impl PartialEq for Recorded {
    fn eq(&self, other: &Self) -> bool {
        self.rows == other.rows
    }
}

impl Recording {
    /// Passes that were taken in: the number of the next one.
    pub fn passes(&self) -> u32 {
        self.passes.len() as u32
    }

    /// Takes in gradients of drawn tokens, [rows, D]: the number of what names them.
    pub fn push_drawn(&mut self, gradients: Vec<f32>, d: usize) -> u32 {
        self.drawn.push((gradients, d));
        self.drawn.len() as u32 - 1
    }

    /// Takes in `rows` of the outputs of a pass's blocks, each with its layer and [N, D], the lowest first.
    pub(super) fn push(
        &mut self,
        engine: &Engine,
        outputs: Vec<(usize, Tensor)>,
        rows: &[u32],
    ) -> Result<()> {
        let some = |(layer, output): (usize, Tensor)| -> Result<(usize, Tensor)> {
            if output.dim(0)? == rows.len() {
                return Ok((layer, output));
            }
            let places: Vec<_> = rows.iter().map(|row| (&output, *row as usize)).collect();
            Ok((layer, pick_rows(engine, &places)?))
        };
        if !rows.is_empty() {
            self.passes.push(outputs.into_iter().map(some).collect::<Result<_>>()?);
        }
        Ok(())
    }

    fn output(&self, pass: u32, layer: usize) -> Result<&Tensor> {
        let mut outputs = self.passes.get(pass as usize).into_iter().flatten();
        let output = outputs.find(|(of, _)| *of == layer).map(|(_, output)| output);
        output.ok_or_else(|| Error::failure(format!("layer {layer} was not recorded")))
    }
}

/// The output of a layer's block at the tokens of these segments, one after the other, [N, D].
pub(super) fn outputs(engine: &Engine, segments: &[&Recorded], layer: usize) -> Result<Tensor> {
    let mut rows = Vec::new();
    for Recorded { recording, rows: of_segment, .. } in segments {
        for (pass, row) in of_segment {
            rows.push((recording.output(*pass, layer)?, *row as usize));
        }
    }
    pick_rows(engine, &rows)
}
