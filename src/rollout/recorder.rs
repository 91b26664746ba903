//! What a generation's passes computed, kept for the update that learns from the completions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::group::Group;
use crate::model::{Recorded, RecordedRow, Recording};

/// What of a generation's computation is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Nothing.
    Nothing,
    /// The outputs of the blocks, 4 D bytes a token and block from below the lowest adapter on.
    Blocks,
    /// Those, and the gradient of each drawn token's log-prob in what the head reads, 4 D bytes a token and a
    /// product with the head; not where sampling changes more than the temperature.
    BlocksAndHead,
}

/// Takes up the passes of a generation, and where each sequence's tokens went.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// Whether gradients at the head are wanted.
    pub head: bool,
    /// The passes.
    pub recording: Recording,
    /// The tokens of each prompt.
    prompts: BTreeMap<Vec<u32>, Vec<RecordedRow>>,
    /// The tokens of each request's completion, the last one excepted, which no pass takes up.
    completions: BTreeMap<usize, Vec<RecordedRow>>,
    /// The gradients of each request's drawn tokens.
    drawn: BTreeMap<usize, Vec<RecordedRow>>,
}

impl Recorder {
    /// A recorder of what is wanted, if anything is.
    pub fn new(record: Record) -> Option<Self> {
        let head = record == Record::BlocksAndHead;
        (record != Record::Nothing).then(|| Recorder { head, ..Self::default() })
    }

    /// Whether the next pass takes up tokens of a prompt, `len` from its token `first` on, that are wanted:
    /// none before did. They will be its kept rows from `row` on.
    pub fn wants_prompt(
        &mut self,
        prompt: &[u32],
        (first, len): (usize, usize),
        row: usize,
    ) -> bool {
        let pass = self.recording.passes();
        let rows = self.prompts.entry(prompt.to_vec()).or_default();
        let wanted = rows.len() == first;
        if wanted {
            rows.extend((row..row + len).map(|row| (pass, row as u32)));
        }
        wanted
    }

    /// The next pass takes up the next token of a request's completion, its kept row `row`.
    pub fn takes_token(&mut self, request: usize, row: usize) {
        let place = (self.recording.passes(), row as u32);
        self.completions.entry(request).or_default().push(place);
    }

    /// Takes the gradients [rows, D] of the next token of each request.
    pub fn take_gradients(
        &mut self,
        requests: impl Iterator<Item = usize>,
        gradients: Vec<f32>,
        d: usize,
    ) {
        let time = self.recording.push_drawn(gradients, d);
        for (row, request) in (0..).zip(requests) {
            self.drawn.entry(request).or_default().push((time, row));
        }
    }

    /// Hands the passes over groups' tokens to them.
    pub fn give(mut self, groups: &mut [Group]) {
        let recording = Arc::new(self.recording);
        let recorded = |rows, drawn| Recorded { recording: recording.clone(), rows, drawn };
        let mut requests = 0..;
        for group in groups {
            let of_prompt = self.prompts.get(&group.prompt).cloned();
            group.recorded = of_prompt.map(|rows| recorded(rows, Vec::new()));
            for (completion, request) in group.completions.iter_mut().zip(requests.by_ref()) {
                let rows = self.completions.remove(&request).unwrap_or_default();
                let drawn = self.drawn.remove(&request).unwrap_or_default();
                completion.recorded = Some(recorded(rows, drawn));
            }
        }
    }
}
