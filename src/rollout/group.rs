//! Groups of completions: what a policy-gradient step learns from.

use serde::{Deserialize, Serialize};

use super::generate::{Completion, Generator, Request};
use super::recorder::{Record, Recorder};
use crate::Result;
use crate::model::Recorded;

/// Completions of one prompt, sampled by the same adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Number of the prompt in the run, from 0: what its random numbers belong to.
    pub prompt_id: u64,
    /// Its row among the training rows, from 0.
    pub row: usize,
    /// Optimizer steps that had been made when it was sampled: the adapter's version.
    pub version: u64,
    /// The completions.
    pub completions: Vec<Completion>,
    /// What was computed of its prompt, if that was kept.
    #[serde(skip)]
    pub recorded: Option<Recorded>,
}

impl Group {
    /// Frees what was kept of its computation.
    pub fn forget(&mut self) {
        self.recorded = None;
        for completion in &mut self.completions {
            (completion.recorded, completion.stats) = (None, Vec::new());
        }
    }
}

/// Samples `num_generations` completions of each prompt, given as (number in the run, row, token ids).
/// The prompt is computed once for its group; `on_done` sees how many completions are finished. With
/// `record` the groups keep what was computed: the outputs of blocks, and what it names.
///
/// # Errors
/// As [`Generator::run`].
pub fn sample_groups(
    generator: &Generator,
    prompts: Vec<(u64, usize, Vec<u32>)>,
    (num_generations, version): (usize, u64),
    record: Option<Record>,
    on_done: &mut dyn FnMut(usize),
) -> Result<Vec<Group>> {
    let of_prompt = |(prompt_id, _, prompt): &(u64, usize, Vec<u32>)| -> Vec<Request> {
        let request = |sample| Request { prompt: prompt.clone(), prompt_id: *prompt_id, sample };
        (0..num_generations as u64).map(request).collect()
    };
    let requests: Vec<Request> = prompts.iter().flat_map(of_prompt).collect();
    let mut recorder = record.map(Recorder::new);
    let completions = generator.run_recorded(&requests, on_done, recorder.as_mut())?;
    let mut completions = completions.into_iter();
    let group = |(prompt_id, row, prompt)| {
        let completions = completions.by_ref().take(num_generations).collect();
        Group { prompt, prompt_id, row, version, completions, recorded: None }
    };
    let mut groups: Vec<Group> = prompts.into_iter().map(group).collect();
    if let Some(recorder) = recorder {
        recorder.give(&mut groups);
    }
    Ok(groups)
}
