//! Continuous batching: a finished sequence makes room for the next prompt.

use std::collections::VecDeque;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use tracing::debug_span;

use crate::adapter::Adapter;
use crate::model::{Batch, Policy, Recorded};
use crate::ops::{KvCache, RowStats, Segment, SlotId, TransposedHead, parallel_map};
use crate::{Error, Result};

use super::recorder::Recorder;
use super::sampling::{RandomKey, Sampled, SamplingParams, distinct, sample};

/// A prompt that wants a completion.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids of the prompt; not empty.
    pub prompt: Vec<u32>,
    /// Number of the prompt, for its random numbers.
    pub prompt_id: u64,
    /// Number of the sample of that prompt.
    pub sample: u64,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// An end-of-sequence token was drawn.
    Eos,
    /// `max_new_tokens` were drawn, or the model's context is full.
    Length,
    /// The text so far holds a stop string.
    StopString,
}

impl StopReason {
    /// Every reason, in the order in which reports list them.
    pub const ALL: [StopReason; 3] = [StopReason::Eos, StopReason::Length, StopReason::StopString];

    /// The reason's name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            StopReason::Eos => "eos",
            StopReason::Length => "length",
            StopReason::StopString => "stop_string",
        }
    }
}

/// What was generated for a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// The new tokens, an ending EOS included.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the distribution that it was drawn from; 0 when greedy.
    pub logps: Vec<f32>,
    /// Entropy of that distribution, in nats; 0 when greedy.
    pub entropies: Vec<f32>,
    /// The tokens that could be drawn in place of each; empty where no filter is on.
    pub kept: Vec<Vec<u32>>,
    /// Why it ended.
    pub stop: StopReason,
    /// Statistics of the distribution that each was drawn from; empty when greedy, where sampling changes more
    /// than the temperature, in completions from a file, and once adapters have changed.
    #[serde(skip)]
    pub stats: Vec<RowStats>,
    /// What was computed of its tokens, by blocks of all but the last one, if that was kept.
    #[serde(skip)]
    pub recorded: Option<Recorded>,
}

/// What happens while generating; requests are named by their place.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// A request got this token.
    Token(usize, u32),
    /// A request is finished.
    Done(usize),
}

/// Settings of a generation.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// At most this many new tokens.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens that end a completion.
    pub eos_token_ids: Vec<u32>,
    /// Sequences that are decoded at once.
    pub max_batch: usize,
    /// Prompt tokens that are taken up in one pass.
    pub prefill_tokens: usize,
    /// Whether the policy's matrices stay rounded meanwhile ([`Policy::keep_rounded`]).
    pub keep_rounded: bool,
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step, for the random numbers.
    pub step: u64,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_new_tokens: 256,
            sampling: SamplingParams::greedy(),
            eos_token_ids: Vec::new(),
            max_batch: 64,
            prefill_tokens: 2048,
            keep_rounded: true,
            seed: 0,
            step: 0,
        }
    }
}

/// Passes from which on it is worth it to round all matrices, and transpose the head, beforehand.
const MANY_PASSES: usize = 8;

/// Tells from the new tokens whether their text holds a stop string.
pub type StopCheck<'a> = &'a dyn Fn(&[u32]) -> bool;

/// Generates with a policy and adapters, active at every position that they steer.
pub struct Generator<'a> {
    policy: &'a Policy,
    adapters: &'a [Box<dyn Adapter>],
    options: &'a GenerateOptions,
    stop_check: Option<StopCheck<'a>>,
}

/// A sequence that is being decoded.
struct Active<'r> {
    index: usize,
    request: &'r Request,
    slot: SlotId,
    drawn: Drawn,
}

/// What a sequence has so far.
#[derive(Default)]
struct Drawn {
    tokens: Vec<u32>,
    logps: Vec<f32>,
    entropies: Vec<f32>,
    kept: Vec<Vec<u32>>,
    stats: Vec<RowStats>,
}

impl Drawn {
    fn push(&mut self, sampled: Sampled, sampling: &SamplingParams) {
        self.tokens.push(sampled.token);
        self.logps.push(sampled.logp);
        self.entropies.push(sampled.entropy);
        if sampling.filters() {
            self.kept.push(sampled.kept);
        }
        if sampling.is_plain() {
            self.stats.push(sampled.stats);
        }
    }

    fn completion(self, stop: StopReason) -> Completion {
        let Drawn { tokens, logps, entropies, kept, stats } = self;
        Completion { tokens, logps, entropies, kept, stop, stats, recorded: None }
    }
}

/// A request whose prompt is taken up in this pass by another sequence, the `leader` of its place.
struct Follower<'r> {
    index: usize,
    request: &'r Request,
    leader: usize,
}

impl Active<'_> {
    /// The next token.
    fn draw(
        &self,
        logits: &mut [f32],
        sampling: &SamplingParams,
        seed: u64,
        step: u64,
    ) -> Result<Sampled> {
        let Request { prompt, prompt_id, sample: sample_id } = self.request;
        let position = (prompt.len() + self.drawn.tokens.len()) as u64;
        let (prompt_id, sample_id) = (*prompt_id, *sample_id);
        let key = RandomKey { seed, step, prompt: prompt_id, sample: sample_id, position };
        let seen = match sampling.repetition_penalty == 1.0 {
            true => Vec::new(),
            false => distinct(prompt.iter().chain(&self.drawn.tokens)),
        };
        sample(logits, seen, sampling, &key)
    }
}

impl<'a> Generator<'a> {
    /// A generator; `stop_check` ends a completion when its text holds a stop string.
    pub fn new(
        policy: &'a Policy,
        adapters: &'a [Box<dyn Adapter>],
        options: &'a GenerateOptions,
        stop_check: Option<StopCheck<'a>>,
    ) -> Self {
        Generator { policy, adapters, options, stop_check }
    }

    /// Completes every request; `on_done` sees how many are finished.
    ///
    /// # Errors
    /// If a prompt is empty or longer than the context, no new token is allowed, or the logits are
    /// not finite.
    pub fn run(
        &self,
        requests: &[Request],
        on_done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Completion>> {
        self.run_recorded(requests, on_done, None)
    }

    /// [`Generator::run`] whose passes are recorded, if a recorder is given.
    ///
    /// # Errors
    /// As [`Generator::run`].
    pub(super) fn run_recorded(
        &self,
        requests: &[Request],
        on_done: &mut dyn FnMut(usize),
        recorder: Option<&mut Recorder>,
    ) -> Result<Vec<Completion>> {
        let mut finished = 0;
        let mut on_event = |event| {
            if let Progress::Done(_) = event {
                finished += 1;
                on_done(finished);
            }
        };
        self.generate(requests, &mut on_event, recorder)
    }

    /// Like [`Generator::run`]; `on_event` sees each token as it is drawn.
    ///
    /// # Errors
    /// As [`Generator::run`].
    pub fn stream(
        &self,
        requests: &[Request],
        on_event: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Completion>> {
        self.generate(requests, on_event, None)
    }

    fn generate(
        &self,
        requests: &[Request],
        on_event: &mut dyn FnMut(Progress),
        mut recorder: Option<&mut Recorder>,
    ) -> Result<Vec<Completion>> {
        self.options.sampling.validate()?;
        self.check(requests)?;
        let many = self.options.max_new_tokens >= MANY_PASSES;
        let rounds = many && self.options.keep_rounded;
        let _rounded = rounds.then(|| self.policy.keep_rounded());
        let takes = recorder.as_deref().is_some_and(|recorder| recorder.head);
        let takes = takes && many && self.options.sampling.is_plain();
        let head = takes.then(|| self.policy.transposed_head(self.options.keep_rounded));
        let head = head.transpose()?;
        let mut cache = self.policy.kv_cache();
        let mut waiting: VecDeque<usize> = (0..requests.len()).collect();
        let mut active: Vec<Active> = Vec::new();
        let mut done: Vec<Option<Completion>> = vec![None; requests.len()];
        let mut logits = Vec::new();
        while !(waiting.is_empty() && active.is_empty()) {
            let known = (&mut cache, recorder.as_deref());
            let followers = self.admit(requests, &mut waiting, &mut active, known)?;
            let hidden = self.hidden(&active, &mut cache, recorder.as_deref_mut())?;
            let drawn = self.advance(&mut active, followers, (&mut cache, hidden), &mut logits)?;
            if let (Some(head), Some(recorder)) = (&head, recorder.as_deref_mut()) {
                self.take_gradients(head, &mut logits, (&active, &drawn), recorder);
            }
            let mut still = Vec::with_capacity(active.len());
            for (mut sequence, drawn) in active.into_iter().zip(drawn) {
                on_event(Progress::Token(sequence.index, drawn.token));
                sequence.drawn.push(drawn, &self.options.sampling);
                match self.stopped(&sequence) {
                    None => still.push(sequence),
                    Some(stop) => {
                        let (index, slot) = (sequence.index, sequence.slot);
                        let prompt = &sequence.request.prompt;
                        let stays = recorder.as_deref_mut();
                        if !stays.is_some_and(|r| r.take_sequence(index, prompt, slot)) {
                            cache.close(slot);
                        }
                        on_event(Progress::Done(sequence.index));
                        done[sequence.index] = Some(sequence.drawn.completion(stop));
                    }
                }
            }
            active = still;
        }
        if let Some(recorder) = recorder {
            recorder.recording.take_cache(cache);
        }
        Ok(done.into_iter().flatten().collect())
    }

    fn check(&self, requests: &[Request]) -> Result<()> {
        if self.options.max_new_tokens == 0 {
            return Err(Error::usage("max_new_tokens must be at least 1"));
        }
        let context = self.policy.config().max_position_embeddings;
        for request in requests {
            let (id, len) = (request.prompt_id, request.prompt.len());
            if len == 0 {
                return Err(Error::failure(format!("prompt {id} is empty")));
            }
            if len >= context {
                let what = format!("prompt {id} has {len} tokens");
                return Err(Error::failure(format!("{what}, the model's context is {context}")));
            }
        }
        Ok(())
    }

    /// Takes up waiting requests while there is room in the batch and in the pass. One whose prompt
    /// an active sequence has in the cache, or one that has stayed there, continues from there; one whose prompt
    /// is taken up in this pass follows that sequence. Sequences stay in the order of their requests, so that those
    /// with the same prompt are neighbours.
    fn admit<'r>(
        &self,
        requests: &'r [Request],
        waiting: &mut VecDeque<usize>,
        active: &mut Vec<Active<'r>>,
        (cache, recorder): (&mut KvCache, Option<&Recorder>),
    ) -> Result<Vec<Follower<'r>>> {
        active.sort_by_key(|sequence| sequence.index);
        let mut room = self.options.prefill_tokens;
        let mut followers = Vec::new();
        while active.len() + followers.len() < self.options.max_batch.max(1) {
            let Some(index) = waiting.front().copied() else { break };
            let (request, len) = (&requests[index], requests[index].prompt.len());
            let leader = active.iter().position(|other| other.request.prompt == request.prompt);
            if let Some(leader) = leader.filter(|leader| cache.len(active[*leader].slot) == 0) {
                followers.push(Follower { index, request, leader });
                waiting.pop_front();
                continue;
            }
            let stayed = || recorder?.sequence_of(&request.prompt);
            let known = leader.map(|leader| active[leader].slot);
            let slot = match known.or_else(stayed) {
                Some(slot) => cache.fork(slot, len - 1)?,
                None if len > room && room < self.options.prefill_tokens => break,
                None => {
                    room = room.saturating_sub(len);
                    cache.open()
                }
            };
            waiting.pop_front();
            active.push(Active { index, request, slot, drawn: Drawn::default() });
        }
        Ok(followers)
    }

    /// One pass through the blocks: every sequence goes on by its last token, or takes up what the cache
    /// lacks of its prompt. The last block's output, and the last row of each sequence.
    fn hidden(
        &self,
        active: &[Active],
        cache: &mut KvCache,
        recorder: Option<&mut Recorder>,
    ) -> Result<(Tensor, Vec<u32>)> {
        let mut batch = Batch::new();
        for sequence in active {
            let (prompt, cached) = (&sequence.request.prompt, cache.len(sequence.slot));
            let new = match sequence.drawn.tokens.last() {
                Some(last) => std::slice::from_ref(last),
                None => &prompt[cached..],
            };
            batch.push_cached(new, prompt.len(), cached);
        }
        let tokens = batch.len();
        let _phase = match tokens > active.len() {
            true => debug_span!("prefill", tokens).entered(),
            false => debug_span!("decode", tokens).entered(),
        };
        let slots: Vec<SlotId> = active.iter().map(|sequence| sequence.slot).collect();
        let hidden = match recorder {
            None => self.policy.hidden_cached(&batch, self.adapters, cache, &slots)?,
            Some(recorder) => {
                let rows = self.wanted(active, &batch, recorder);
                let recording = (&mut recorder.recording, &rows[..]);
                self.policy.hidden_recorded(&batch, self.adapters, (cache, &slots), recording)?
            }
        };
        Ok((hidden, batch.last_rows()))
    }

    /// The rows of the next pass that a recorder wants to have.
    fn wanted(&self, active: &[Active], batch: &Batch, recorder: &mut Recorder) -> Vec<u32> {
        let mut rows = Vec::new();
        for (sequence, segment) in active.iter().zip(batch.segments()) {
            let Segment { start, len, position0, .. } = *segment;
            let wanted = match sequence.drawn.tokens.is_empty() {
                true => {
                    let prompt = &sequence.request.prompt;
                    recorder.wants_prompt(prompt, (position0, len), rows.len())
                }
                false => {
                    recorder.takes_token(sequence.index, rows.len());
                    true
                }
            };
            if wanted {
                rows.extend(start as u32..(start + len) as u32);
            }
        }
        rows
    }

    /// The new token of every sequence after a pass, and of its followers.
    fn advance<'r>(
        &self,
        active: &mut Vec<Active<'r>>,
        followers: Vec<Follower<'r>>,
        (cache, (h, mut rows)): (&mut KvCache, (Tensor, Vec<u32>)),
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Sampled>> {
        for Follower { index, request, leader } in followers {
            let slot = cache.fork(active[leader].slot, request.prompt.len())?;
            rows.push(rows[leader]);
            active.push(Active { index, request, slot, drawn: Drawn::default() });
        }
        self.policy.logits_into(&h, &rows, logits)?;
        let _phase = debug_span!("sample", tokens = active.len()).entered();
        let rows = logits.chunks_exact_mut(self.policy.config().vocab_size);
        let (seed, step) = (self.options.seed, self.options.step);
        let sampling = &self.options.sampling;
        let draw =
            |(row, sequence): (&mut [f32], &Active)| sequence.draw(row, sampling, seed, step);
        parallel_map(rows.zip(&*active), draw).into_iter().collect()
    }

    /// Keeps the gradients of the drawn tokens, whose logits are given and overwritten.
    fn take_gradients(
        &self,
        head: &TransposedHead,
        logits: &mut [f32],
        (active, drawn): (&[Active], &[Sampled]),
        recorder: &mut Recorder,
    ) {
        let drawn: Vec<_> = drawn.iter().map(|drawn| (drawn.token, drawn.stats)).collect();
        let temperature = self.options.sampling.temperature;
        let gradients = self.policy.drawn_gradients(head, logits, &drawn, temperature);
        let requests = active.iter().map(|sequence| sequence.index);
        recorder.take_gradients(requests, gradients, self.policy.config().hidden_size);
    }

    fn stopped(&self, sequence: &Active) -> Option<StopReason> {
        let tokens = &sequence.drawn.tokens;
        let last = tokens.last()?;
        if self.options.eos_token_ids.contains(last) {
            return Some(StopReason::Eos);
        }
        if self.stop_check.is_some_and(|check| check(tokens)) {
            return Some(StopReason::StopString);
        }
        let length = sequence.request.prompt.len() + tokens.len();
        let full = length >= self.policy.config().max_position_embeddings;
        (full || tokens.len() >= self.options.max_new_tokens).then_some(StopReason::Length)
    }
}
