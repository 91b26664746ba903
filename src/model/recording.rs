//! What passes over a cache computed, so that a later pass over the same tokens need not.

use std::sync::Arc;

use candle_core::Tensor;

use crate::ops::{Engine, pick_rows};
use crate::{Error, Result};

/// The outputs of all blocks in some passes of a policy, before what adapters add after a block.
#[derive(Debug, Default)]
pub struct Recording {
    /// Of each pass and layer, [N, D].
    passes: Vec<Vec<Tensor>>,
}

/// Tokens of a sequence in a [`Recording`]: the pass of each, and its row there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedRows(Vec<(u32, u32)>);

/// A recording and some tokens in it.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The recording.
    pub recording: Arc<Recording>,
    /// The tokens.
    pub rows: RecordedRows,
}

/// What tokens are does not depend on what was kept of their computation.
impl PartialEq for Recorded {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Recording {
    /// Takes in the outputs of a pass's blocks, the lowest first.
    pub(super) fn push(&mut self, outputs: Vec<Tensor>) {
        self.passes.push(outputs);
    }

    /// Tokens `start..start + len` of the last pass.
    pub fn last_rows(&self, start: usize, len: usize) -> RecordedRows {
        let pass = self.passes.len().saturating_sub(1) as u32;
        RecordedRows((start..start + len).map(|row| (pass, row as u32)).collect())
    }
}

impl RecordedRows {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends the tokens that come next.
    pub fn extend(&mut self, next: RecordedRows) {
        self.0.extend(next.0);
    }
}

/// The output of a layer's block at these tokens, one after the other, [N, D].
pub(super) fn outputs(engine: &Engine, tokens: &[Recorded], layer: usize) -> Result<Tensor> {
    let mut rows = Vec::new();
    for Recorded { recording, rows: of_segment } in tokens {
        for (pass, row) in &of_segment.0 {
            let output = recording.passes.get(*pass as usize).and_then(|pass| pass.get(layer));
            let missing = || Error::failure(format!("layer {layer} was not recorded"));
            rows.push((output.ok_or_else(missing)?, *row as usize));
        }
    }
    pick_rows(engine, &rows)
}
