//! Causal attention over chains of segments, for grouped query heads, without padding.
//!
//! A query at position `p` sees the keys of its chain at positions `j <= p`, in a windowed layer
//! those with `p - j < window`. The softmax runs over tiles of keys as in FlashAttention
//! (arXiv:2205.14135, arXiv:2307.08691) and is never materialised.
//!
//! The bits of a query's result depend on the query and on its chain's keys and values by
//! position, and on nothing else: neither on its row in the batch, nor on other queries, the cuts
//! between spans, the instruction set or the number of threads. For that, tiles start at multiples
//! of a fixed number of positions, each sum runs in the order of positions, and a masked key adds
//! an exact zero. Keys and values must be finite.

pub use super::attention_backward::{BackwardInput, Gradients, backward};
pub use super::attention_forward::forward;

use std::ops::Range;

/// One contiguous run of the keys and values of a chain.
#[derive(Clone, Copy, Debug)]
pub struct KeySpan<'a> {
    /// Keys, `[len, kv_heads * head_dim]`.
    pub k: &'a [f32],
    /// Values, `[len, kv_heads * head_dim]`.
    pub v: &'a [f32],
    /// Position in the chain of the first key.
    pub position0: usize,
    /// Number of keys.
    pub len: usize,
}

/// The queries of one segment and all the keys they may see.
#[derive(Clone, Debug)]
pub struct Chain<'a> {
    /// First row of the segment in the packed queries.
    pub start: usize,
    /// Number of queries.
    pub len: usize,
    /// Position in the chain of the first query.
    pub position0: usize,
    /// The keys at positions `0..position0 + len` in order, the segment's own keys last.
    pub spans: Vec<KeySpan<'a>>,
}

/// Sizes and options of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Number of query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Number of key and value heads; query head `h` reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the dot products of queries and keys.
    pub scale: f32,
    /// A query sees only keys less than this many positions back; at least 1.
    pub window: Option<usize>,
    /// Bounds a score `s` to `softcap * tanh(s / softcap)`.
    pub softcap: Option<f32>,
    /// Results are rounded to the nearest bf16. Gradients pass as if they were not, but for the sum of `dout * out`
    /// of a row, which reads them rounded as FlashAttention's does.
    pub rounded: bool,
}

impl AttentionShape {
    /// Query heads that share a key head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Floats in a row of keys.
    pub(super) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The positions that a query at `position` sees.
    pub(super) fn visible(&self, position: usize) -> Range<usize> {
        let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        first..position + 1
    }

    /// FLOPs of a forward pass over `segments`: two products of each query with the keys it sees.
    pub fn flops(&self, segments: &[Segment]) -> usize {
        let queries = segments.iter().flat_map(|s| s.position0..s.position0 + s.len);
        let pairs: usize = queries.map(|position| self.visible(position).len()).sum();
        4 * pairs * self.heads * self.head_dim
    }

    /// Checks the sizes that every loop relies on.
    pub(super) fn check(&self) {
        assert!(self.kv_heads > 0 && self.head_dim > 0, "attention without heads");
        assert!(self.heads.is_multiple_of(self.kv_heads), "heads must be a multiple of kv_heads");
        assert!(self.window != Some(0), "a window of 0 sees no key");
    }
}

/// A run of rows of a packed batch and the segment it continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row in the packed batch.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Position in the chain of the first row: where the parent ends, or 0.
    pub position0: usize,
    /// Index of the segment that this one continues, smaller than its own.
    pub parent: Option<usize>,
}

/// The chain of each segment of a packed batch whose keys and values are rows of `k` and `v`,
/// `[N, kv_width]` with `kv_width = kv_heads * head_dim`.
pub fn chains<'a>(
    segments: &[Segment],
    k: &'a [f32],
    v: &'a [f32],
    kv_width: usize,
) -> Vec<Chain<'a>> {
    let span = |s: &Segment| {
        let rows = s.start * kv_width..(s.start + s.len) * kv_width;
        KeySpan { k: &k[rows.clone()], v: &v[rows], position0: s.position0, len: s.len }
    };
    let mut all: Vec<Chain<'a>> = Vec::with_capacity(segments.len());
    for s in segments {
        let mut spans = s.parent.map_or_else(Vec::new, |p| all[p].spans.clone());
        spans.push(span(s));
        all.push(Chain { start: s.start, len: s.len, position0: s.position0, spans });
    }
    all
}
