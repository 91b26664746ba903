//! A packed batch: one axis of N tokens and the segments that it consists of.

use std::sync::Arc;

use crate::ops::Segment;

/// Tokens without padding; which of them belong together is said by the segments.
///
/// Packed sequences are segments without parents; a group of completions is one prompt segment and
/// its children; in cached decoding the ancestors are in the cache.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, `[N]`.
    pub input_ids: Vec<u32>,
    /// Position of each token in its own chain, `[N]`.
    pub positions: Vec<u32>,
    /// Length of the prompt of each token's chain, `[N]`; positions below it are prompt.
    pub prompt_lengths: Vec<u32>,
    /// Key of each token's random numbers, `[N]`: its sample and its position.
    pub token_keys: Vec<u64>,
    segments: Vec<Segment>,
    sample: u64,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a sequence, or with `parent` the continuation of an earlier segment; returns the
    /// segment's number. `prompt_len` counts from the start of the chain.
    pub fn push(&mut self, ids: &[u32], prompt_len: usize, parent: Option<usize>) -> usize {
        let position0 = parent.map_or(0, |parent| {
            let parent = &self.segments[parent];
            parent.position0 + parent.len
        });
        self.push_at(ids, prompt_len, position0, parent)
    }

    /// Appends tokens that continue a cached sequence of `position0` tokens.
    pub fn push_cached(&mut self, ids: &[u32], prompt_len: usize, position0: usize) -> usize {
        self.push_at(ids, prompt_len, position0, None)
    }

    fn push_at(
        &mut self,
        ids: &[u32],
        prompt_len: usize,
        position0: usize,
        parent: Option<usize>,
    ) -> usize {
        let start = self.input_ids.len();
        self.input_ids.extend_from_slice(ids);
        self.positions.extend((position0..position0 + ids.len()).map(|p| p as u32));
        let key = |p: usize| self.sample << 32 | p as u64;
        self.token_keys.extend((position0..position0 + ids.len()).map(key));
        self.prompt_lengths.extend(ids.iter().map(|_| prompt_len as u32));
        self.segments.push(Segment { start, len: ids.len(), position0, parent });
        self.segments.len() - 1
    }

    /// Says which sample of the step the tokens pushed from now on belong to, so that their random
    /// numbers do not depend on what else is in the batch.
    pub fn begin_sample(&mut self, sample: u64) {
        self.sample = sample;
    }

    /// Number of packed tokens N.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Whether the batch holds no token.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// The segments in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The last row of each segment.
    pub fn last_rows(&self) -> Vec<u32> {
        self.segments.iter().map(|s| (s.start + s.len - 1) as u32).collect()
    }

    pub(super) fn shared_segments(&self) -> Arc<[Segment]> {
        self.segments.clone().into()
    }
}
