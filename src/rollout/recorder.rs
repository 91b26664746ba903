//! What a generation's passes computed, kept for the update that learns from the completions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::group::Group;
use crate::model::{Recorded, RecordedRows, Recording};

/// Takes up the passes of a generation, and where each sequence's tokens went.
#[derive(Debug, Default)]
pub struct Recorder {
    pub(super) recording: Recording,
    /// The tokens of each prompt.
    prompts: BTreeMap<Vec<u32>, RecordedRows>,
    /// The tokens of each request's completion, the last one excepted, which no pass has taken up.
    completions: BTreeMap<usize, RecordedRows>,
}

impl Recorder {
    /// The last pass took up tokens of a prompt from its token `first` on, in rows `start..start + len`.
    pub(super) fn took_prompt(
        &mut self,
        prompt: &[u32],
        first: usize,
        (start, len): (usize, usize),
    ) {
        let rows = self.prompts.entry(prompt.to_vec()).or_default();
        if rows.len() == first {
            rows.extend(self.recording.last_rows(start, len));
        }
    }

    /// The last pass took up the next token of a request's completion, in row `row`.
    pub(super) fn took_token(&mut self, request: usize, row: usize) {
        let next = self.recording.last_rows(row, 1);
        self.completions.entry(request).or_default().extend(next);
    }

    /// Hands the passes over groups' tokens to them.
    pub(super) fn give(mut self, groups: &mut [Group]) {
        let recording = Arc::new(std::mem::take(&mut self.recording));
        let recorded = |rows| Recorded { recording: recording.clone(), rows };
        let mut requests = 0..;
        for group in groups {
            let rows = self.prompts.get(&group.prompt);
            group.recorded = rows.cloned().map(recorded);
            for (completion, request) in group.completions.iter_mut().zip(requests.by_ref()) {
                let rows = self.completions.remove(&request).unwrap_or_default();
                completion.recorded = Some(recorded(rows));
            }
        }
    }
}
