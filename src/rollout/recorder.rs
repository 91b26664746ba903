//! What a generation's passes computed, kept for the update that learns from the completions.

use std::collections::BTreeMap;
use std::sync::Arc;

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

/// The passes over a group's tokens.
#[derive(Clone, Debug)]
pub struct RecordedGroup {
    /// Over its prompt.
    pub prompt: Recorded,
    /// Over each completion, its last token excepted.
    pub completions: Vec<Recorded>,
}

/// What a group's completions are does not depend on what was kept of their computation.
impl PartialEq for RecordedGroup {
    fn eq(&self, _: &Self) -> bool {
        true
    }
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

    /// The passes over groups of `size` requests each, given their prompts.
    pub(super) fn groups<'p>(
        mut self,
        prompts: impl Iterator<Item = &'p [u32]>,
        size: usize,
    ) -> Vec<Option<RecordedGroup>> {
        let recording = Arc::new(std::mem::take(&mut self.recording));
        let recorded = |rows: Option<RecordedRows>| Recorded {
            recording: recording.clone(),
            rows: rows.unwrap_or_default(),
        };
        let mut group = |(g, prompt): (usize, &[u32])| {
            let rows = self.prompts.get(prompt).filter(|rows| rows.len() == prompt.len())?;
            let completions = (g * size..(g + 1) * size).map(|i| self.completions.remove(&i));
            let completions = completions.map(recorded).collect();
            Some(RecordedGroup { prompt: recorded(Some(rows.clone())), completions })
        };
        prompts.enumerate().map(|of| group(of)).collect()
    }
}
