//! What a generation's passes computed, kept for the update that learns from the completions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::group::Group;
use crate::Result;
use crate::model::{Policy, Recorded, RecordedRows, Recording};

/// What a generation keeps of its passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Record {
    /// Nothing.
    #[default]
    Nothing,
    /// The outputs of all blocks.
    Outputs,
    /// The outputs of all blocks, and the gradient of each drawn token's log-prob to the row that it was
    /// predicted from: a product with the head more for every token, and one less for those that are
    /// learnt from.
    OutputsAndPulls,
}

/// Rows of gradients that are multiplied with the head at once.
const PULLED_ROWS: usize = 128;

/// Takes up the passes of a generation, and where each sequence's tokens went.
#[derive(Debug, Default)]
pub struct Recorder {
    pub(super) recording: Recording,
    /// Whether it wants gradients of log-probs.
    pub(super) pulls: bool,
    /// The tokens of each prompt.
    prompts: BTreeMap<Vec<u32>, RecordedRows>,
    /// The tokens of each request's completion, the last one excepted, which no pass has taken up.
    completions: BTreeMap<usize, RecordedRows>,
    /// The gradients of each request's tokens.
    pulled: BTreeMap<usize, RecordedRows>,
    /// The requests of gradients that the head has yet to be multiplied with.
    waiting: Vec<usize>,
}

impl Recorder {
    /// A recorder of what is asked for, if that is anything.
    pub(super) fn new(record: Record) -> Option<Self> {
        let pulls = record == Record::OutputsAndPulls;
        (record != Record::Nothing).then(|| Recorder { pulls, ..Self::default() })
    }

    /// The last pass took up tokens of a prompt from its token `first` on, in rows `start..start + len`.
    pub(super) fn took_prompt(
        &mut self,
        prompt: &[u32],
        first: usize,
        (start, len): (usize, usize),
    ) {
        let rows = self.prompts.entry(prompt.to_vec()).or_default();
        if rows.len() == first {
            rows.extend(self.recording.last_outputs(start, len));
        }
    }

    /// The last pass took up the next token of a request's completion, in row `row`.
    pub(super) fn took_token(&mut self, request: usize, row: usize) {
        let next = self.recording.last_outputs(row, 1);
        self.completions.entry(request).or_default().extend(next);
    }

    /// How many rows of gradients wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// `rows` [N, V] are the gradients that wait and those of the next token of `requests`; multiplies them
    /// with the head if they are enough, or if they are the last ones.
    pub(super) fn drew(
        &mut self,
        requests: impl Iterator<Item = usize>,
        rows: &[f32],
        policy: &Policy,
    ) -> Result<()> {
        self.waiting.extend(requests);
        if self.waiting.len() >= PULLED_ROWS {
            self.pull(rows, policy)?;
        }
        Ok(())
    }

    /// Multiplies the gradients that wait, the first rows of `rows` [N, V], with the head.
    pub(super) fn pull(&mut self, rows: &[f32], policy: &Policy) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let rows = &rows[..self.waiting.len() * policy.config().vocab_size];
        policy.record_pulls(rows, &mut self.recording)?;
        for (row, request) in self.waiting.drain(..).enumerate() {
            let next = self.recording.last_pull(row);
            self.pulled.entry(request).or_default().extend(next);
        }
        Ok(())
    }

    /// Hands what was recorded of groups' tokens to them.
    pub(super) fn give(mut self, groups: &mut [Group]) {
        let recording = Arc::new(std::mem::take(&mut self.recording));
        let recorded = |outputs, pulls| Recorded { recording: recording.clone(), outputs, pulls };
        let mut requests = 0..;
        for group in groups {
            let outputs = self.prompts.get(&group.prompt);
            group.recorded =
                outputs.map(|outputs| recorded(outputs.clone(), RecordedRows::default()));
            for (completion, request) in group.completions.iter_mut().zip(requests.by_ref()) {
                let outputs = self.completions.remove(&request).unwrap_or_default();
                let pulls = self.pulled.remove(&request).unwrap_or_default();
                completion.recorded = Some(recorded(outputs, pulls));
            }
        }
    }
}
