//! What a generation's passes computed, kept for the update that learns from the completions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::group::Group;
use crate::model::{Recorded, RecordedRow, Recording};

/// Takes up the passes of a generation, and where each sequence's tokens went.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// The passes.
    pub recording: Recording,
    /// The tokens of each prompt.
    prompts: BTreeMap<Vec<u32>, Vec<RecordedRow>>,
    /// The tokens of each request's completion, the last one excepted, which no pass takes up.
    completions: BTreeMap<usize, Vec<RecordedRow>>,
}

impl Recorder {
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

    /// Hands the passes over groups' tokens to them.
    pub fn give(mut self, groups: &mut [Group]) {
        let recording = Arc::new(self.recording);
        let recorded = |rows| Recorded { recording: recording.clone(), rows };
        let mut requests = 0..;
        for group in groups {
            group.recorded = self.prompts.get(&group.prompt).cloned().map(recorded);
            for (completion, request) in group.completions.iter_mut().zip(requests.by_ref()) {
                let rows = self.completions.remove(&request).unwrap_or_default();
                completion.recorded = Some(recorded(rows));
            }
        }
    }
}
