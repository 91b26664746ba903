//! What passes over a cache computed, so that a later pass over the same tokens need not.

use std::sync::Arc;

use candle_core::Tensor;

use crate::ops::{Engine, pick_rows};
use crate::{Error, Result};

/// What some passes of a policy computed.
#[derive(Debug, Default)]
pub struct Recording {
    /// The outputs of all blocks before what adapters add after a block, [N, D] of each pass and layer.
    outputs: Vec<Vec<Tensor>>,
    /// Gradients of drawn tokens' log-probs to the normed rows that predicted them, [N, D] each.
    pulls: Vec<Tensor>,
}

/// Tokens in a [`Recording`]: the pass of each, and its row there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedRows(Vec<(u32, u32)>);

/// What was recorded of some tokens of a sequence.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The recording.
    pub recording: Arc<Recording>,
    /// Where the blocks' outputs are.
    pub outputs: RecordedRows,
    /// Where the gradients of the log-probs are; empty if there are none.
    pub pulls: RecordedRows,
}

/// One row of a recording.
pub type RecordedRow<'a> = (&'a Recording, (u32, u32));

/// What tokens are does not depend on what was kept of their computation.
impl PartialEq for Recorded {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Recorded {
    /// The gradients of the log-probs, one for each token.
    pub fn pulls(&self) -> impl Iterator<Item = RecordedRow<'_>> {
        self.pulls.0.iter().map(|place| (&*self.recording, *place))
    }
}

impl Recording {
    /// Takes in the outputs of a pass's blocks, the lowest first.
    pub(super) fn push_outputs(&mut self, outputs: Vec<Tensor>) {
        self.outputs.push(outputs);
    }

    /// Takes in gradients of log-probs.
    pub(super) fn push_pulls(&mut self, pulls: Tensor) {
        self.pulls.push(pulls);
    }

    /// Tokens `start..start + len` of the last pass.
    pub fn last_outputs(&self, start: usize, len: usize) -> RecordedRows {
        last(self.outputs.len(), start, len)
    }

    /// Row `row` of the gradients that were taken in last.
    pub fn last_pull(&self, row: usize) -> RecordedRows {
        last(self.pulls.len(), row, 1)
    }
}

fn last(count: usize, start: usize, len: usize) -> RecordedRows {
    let pass = count.saturating_sub(1) as u32;
    RecordedRows((start..start + len).map(|row| (pass, row as u32)).collect())
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
    for Recorded { recording, outputs, .. } in tokens {
        for (pass, row) in &outputs.0 {
            let output = recording.outputs.get(*pass as usize).and_then(|pass| pass.get(layer));
            let missing = || Error::failure(format!("layer {layer} was not recorded"));
            rows.push((output.ok_or_else(missing)?, *row as usize));
        }
    }
    pick_rows(engine, &rows)
}

/// The recorded gradients named by `places`, one after the other, [places, D].
pub(super) fn pulls(engine: &Engine, places: &[RecordedRow]) -> Result<Tensor> {
    let mut rows = Vec::with_capacity(places.len());
    for (recording, (pass, row)) in places {
        let missing = || Error::failure("a gradient of a log-prob was not recorded");
        rows.push((recording.pulls.get(*pass as usize).ok_or_else(missing)?, *row as usize));
    }
    pick_rows(engine, &rows)
}
