//! What a generation's passes computed, kept for the update that learns from the completions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::group::Group;
use crate::model::{Recorded, RecordedRow, Recording};
use crate::ops::SlotId;

/// What of a generation's computation is kept besides the outputs of the blocks, which take 4 D bytes a token and
/// block from below the lowest adapter on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Keys and values of all sequences, which stay in the cache, and where they are bf16 numbers, at `medium`, what
    /// attention makes: 2 bytes for each number of the heads, and 4 a head for its denominator.
    pub attention: bool,
    /// The gradient of each drawn token's log-prob in what the head reads, 4 D bytes a token and a product with
    /// the head; not where sampling changes more than the temperature.
    pub head: bool,
}

/// Takes up the passes of a generation, and where each sequence's tokens went.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// Whether gradients at the head are wanted.
    pub head: bool,
    /// The passes.
    pub recording: Recording,
    /// The sequence of each finished request in the cache, if it stays there, and one for each prompt.
    slots: BTreeMap<usize, SlotId>,
    of_prompts: BTreeMap<Vec<u32>, SlotId>,
    /// The tokens of each prompt.
    prompts: BTreeMap<Vec<u32>, Vec<RecordedRow>>,
    /// The tokens of each request's completion, the last one excepted, which no pass takes up.
    completions: BTreeMap<usize, Vec<RecordedRow>>,
    /// The gradients of each request's drawn tokens.
    drawn: BTreeMap<usize, Vec<RecordedRow>>,
}

impl Recorder {
    /// A recorder of what is wanted.
    pub fn new(record: Record) -> Self {
        let recording = Recording::new(record.attention);
        Recorder { head: record.head, recording, ..Self::default() }
    }

    /// Takes over a finished request's sequence in the cache if it is to stay there: whether it is.
    pub fn take_sequence(&mut self, request: usize, prompt: &[u32], slot: SlotId) -> bool {
        let keeps = self.recording.keeps_attention();
        if keeps {
            self.slots.insert(request, slot);
            self.of_prompts.insert(prompt.to_vec(), slot);
        }
        keeps
    }

    /// A sequence in the cache that has stayed there and begins with a prompt.
    pub fn sequence_of(&self, prompt: &[u32]) -> Option<SlotId> {
        self.of_prompts.get(prompt).copied()
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
        let (recording, slots) = (Arc::new(self.recording), self.slots);
        let recorded = |request: usize, rows, drawn| {
            let slot = slots.get(&request).copied().unwrap_or_default();
            Recorded { recording: recording.clone(), rows, slot, drawn }
        };
        let mut first = 0;
        for group in groups {
            let of_prompt = self.prompts.get(&group.prompt).cloned();
            group.recorded = of_prompt.map(|rows| recorded(first, rows, Vec::new()));
            for (completion, request) in group.completions.iter_mut().zip(first..) {
                let rows = self.completions.remove(&request).unwrap_or_default();
                let drawn = self.drawn.remove(&request).unwrap_or_default();
                completion.recorded = Some(recorded(request, rows, drawn));
            }
            first += group.completions.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_sequences_stay_and_are_found_by_their_prompt_only_where_attention_is_kept() {
        for attention in [true, false] {
            let mut recorder = Recorder::new(Record { attention, head: false });
            assert_eq!(recorder.sequence_of(&[7, 8]), None);
            assert_eq!(recorder.take_sequence(3, &[7, 8], 5), attention);
            assert_eq!(recorder.sequence_of(&[7, 8]), attention.then_some(5));
            assert_eq!(recorder.sequence_of(&[7]), None);
        }
    }
}
