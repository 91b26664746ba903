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

    /// The batch cut into parts of about `tokens` tokens, or more where segments that belong
    /// together are longer; a part's rows are those of the batch from where the last part ended.
    pub fn parts(&self, tokens: usize) -> Vec<Batch> {
        let count = self.len().div_ceil(tokens.max(1)).max(1);
        let wanted = self.len().div_ceil(count);
        let mut parts = Vec::new();
        let mut first = 0;
        for end in self.cuts() {
            let rows = |segment: usize| self.segments.get(segment).map_or(self.len(), |s| s.start);
            if rows(end) - rows(first) >= wanted || end == self.segments.len() {
                parts.push(self.part(first, end));
                first = end;
            }
        }
        parts
    }

    /// The numbers of segments, the end included, before which the batch can be cut: no segment
    /// from there on continues one before.
    fn cuts(&self) -> Vec<usize> {
        let mut lowest = self.segments.len();
        let mut cuts = vec![lowest];
        for (i, segment) in self.segments.iter().enumerate().rev() {
            lowest = lowest.min(segment.parent.unwrap_or(i));
            if lowest == i && i > 0 {
                cuts.push(i);
            }
        }
        cuts.reverse();
        cuts
    }

    /// The segments `first..end`.
    fn part(&self, first: usize, end: usize) -> Batch {
        let start = self.segments.get(first).map_or(0, |segment| segment.start);
        let stop = self.segments.get(end).map_or(self.len(), |segment| segment.start);
        let moved = |segment: &Segment| Segment {
            start: segment.start - start,
            parent: segment.parent.map(|parent| parent - first),
            ..*segment
        };
        Batch {
            input_ids: self.input_ids[start..stop].to_vec(),
            positions: self.positions[start..stop].to_vec(),
            prompt_lengths: self.prompt_lengths[start..stop].to_vec(),
            token_keys: self.token_keys[start..stop].to_vec(),
            segments: self.segments[first..end].iter().map(moved).collect(),
            sample: self.sample,
        }
    }

    pub(super) fn shared_segments(&self) -> Arc<[Segment]> {
        self.segments.clone().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_are_the_batch_in_order_and_keep_families_together(
            pushes in prop::collection::vec((1usize..9, prop::option::of(0usize..9)), 0..20),
            tokens in 1usize..40,
        ) {
            let mut batch = Batch::new();
            for (i, (len, back)) in pushes.iter().enumerate() {
                let parent = back.filter(|back| *back < i).map(|back| i - 1 - back);
                batch.begin_sample(i as u64);
                batch.push(&vec![i as u32; *len], i, parent);
            }
            let parts = batch.parts(tokens);
            let (mut rows, mut segments) = (0, 0);
            for part in &parts {
                let range = rows..rows + part.len();
                prop_assert_eq!(&part.input_ids, &batch.input_ids[range.clone()]);
                prop_assert_eq!(&part.positions, &batch.positions[range.clone()]);
                prop_assert_eq!(&part.prompt_lengths, &batch.prompt_lengths[range.clone()]);
                prop_assert_eq!(&part.token_keys, &batch.token_keys[range]);
                for (own, of_batch) in part.segments().iter().zip(&batch.segments()[segments..]) {
                    let parent = own.parent.map(|parent| parent + segments);
                    let moved = Segment { start: own.start + rows, parent, ..*own };
                    prop_assert_eq!(moved, *of_batch);
                }
                rows += part.len();
                segments += part.segments().len();
            }
            prop_assert_eq!((rows, segments), (batch.len(), pushes.len()));
        }
    }

    #[test]
    fn parts_have_about_the_wanted_size() {
        let mut batch = Batch::new();
        (0..9).for_each(|_| {
            batch.push(&[0; 100], 0, None);
        });
        let sizes = |tokens| batch.parts(tokens).iter().map(Batch::len).collect::<Vec<_>>();
        assert_eq!(sizes(1000), [900]);
        assert_eq!(sizes(500), [500, 400]);
        assert_eq!(sizes(100), [100; 9]);
        assert_eq!(sizes(10), [100; 9]);
    }
}
