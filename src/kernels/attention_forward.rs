//! Attention, forward: blocks of queries go over tiles of keys with a running softmax.

use super::attention::{AttentionShape, Chain};
use super::attention_tile::{
    KEYS, KeyHead, QueryBlock, ROWS, Run, Side, fill_hidden, padded, whole_vectors, within_tile,
};
use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::lanes_math::{exp, tanh};
use super::parallel::{SharedMut, for_each_index};
use super::prefetch::Lines;
use super::product::{Old, Product};
use std::ops::Range;

/// Rows of a block of queries, about: what shares one transposed tile of keys.
pub(super) const BLOCK_ROWS: usize = 192;

/// Softmax attention of the packed queries `q` to the keys of their chains, into `out`, both
/// `[N, heads * head_dim]`; `lse`, `[N, heads]`, the logarithm of each softmax's denominator, is
/// what [`backward`](super::attention::backward) needs. Rows of no chain stay as they are.
///
/// # Panics
/// If chains overlap in rows, or spans do not cover the positions of their chain.
pub fn forward(
    q: &[f32],
    chains: &[Chain],
    shape: &AttentionShape,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    forward_at(CpuLevel::detect(), q, chains, shape, out, lse);
}

/// [`forward`] on a given instruction set.
pub(super) fn forward_at(
    level: CpuLevel,
    q: &[f32],
    chains: &[Chain],
    shape: &AttentionShape,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    shape.check();
    check(chains);
    assert!(q.len() == out.len(), "queries and result differ in size");
    let (out, lse) = (SharedMut::new(out), lse.map(SharedMut::new));
    let blocks = blocks(chains, shape);
    let rows = blocks.iter().map(|(_, block)| block.rows(shape)).max().unwrap_or(0);
    let make = || Scratch::new(shape, rows);
    for_each_index(blocks.len(), make, |scratch, i| {
        let (chain, block) = blocks[i];
        let (out, lse) = (&out, lse.as_ref());
        level.run(Forward { q, chain, block, shape, scratch, out, lse });
    });
}

fn check(chains: &[Chain]) {
    let mut rows: Vec<_> = chains.iter().map(|c| (c.start, c.start + c.len)).collect();
    rows.sort_unstable();
    assert!(rows.windows(2).all(|w| w[0].1 <= w[1].0), "chains overlap in rows");
    for chain in chains {
        let mut covered = 0;
        for span in &chain.spans {
            assert!(span.position0 == covered, "spans leave a gap or overlap");
            covered += span.len;
        }
        assert!(covered == chain.position0 + chain.len, "spans do not cover the chain");
    }
}

/// Cuts the chains into blocks of queries, one for each key head.
fn blocks<'a>(chains: &'a [Chain<'a>], shape: &AttentionShape) -> Vec<(&'a Chain<'a>, QueryBlock)> {
    let size = (BLOCK_ROWS / shape.group()).max(1);
    let mut all = Vec::new();
    for chain in chains {
        for first in (0..chain.len).step_by(size) {
            for kv_head in 0..shape.kv_heads {
                let (start, position0) = (chain.start + first, chain.position0 + first);
                let len = size.min(chain.len - first);
                all.push((chain, QueryBlock { start, len, position0, kv_head }));
            }
        }
    }
    all
}

/// The buffers of one thread.
struct Scratch {
    q: Vec<f32>,
    kt: Vec<f32>,
    /// Eight rows of keys.
    eight: Vec<f32>,
    v: Vec<f32>,
    /// Scores of `ROWS` rows in a tile, then their weights.
    scores: Vec<f32>,
    state: Vec<Running>,
    sums: Vec<f32>,
}

/// A row's softmax so far.
#[derive(Clone, Copy)]
pub(super) struct Running {
    top: f32,
    total: [f32; LANES],
}

impl Running {
    /// That of no key.
    pub(super) const START: Running = Running { top: f32::NEG_INFINITY, total: [0.0; LANES] };

    /// Divides the sums of weighted values by the sum of the weights, and returns the logarithm of the softmax's
    /// denominator. Adding 0 makes the sign of a zero the same whatever masked keys were skipped.
    #[inline(always)]
    pub(super) fn divide<S: Simd>(&self, s: S, sums: &mut [f32], rounded: bool) -> f32 {
        let total = s.sum(s.load(&self.total));
        for x in sums.as_chunks_mut::<LANES>().0 {
            let mean = s.add(s.div(s.load(x), s.splat(total)), s.splat(0.0));
            s.store(x, if rounded { s.round_bf16(mean) } else { mean });
        }
        self.top + total.ln()
    }
}

impl Scratch {
    fn new(shape: &AttentionShape, rows: usize) -> Self {
        let width = padded(shape.head_dim);
        let tile = vec![0.0; KEYS * width];
        Self {
            q: vec![0.0; rows * width],
            kt: tile.clone(),
            eight: vec![0.0; 8 * width],
            v: tile,
            scores: vec![0.0; ROWS * KEYS],
            state: vec![Running::START; rows],
            sums: vec![0.0; rows * width],
        }
    }
}

struct Forward<'a> {
    q: &'a [f32],
    chain: &'a Chain<'a>,
    block: QueryBlock,
    shape: &'a AttentionShape,
    scratch: &'a mut Scratch,
    out: &'a SharedMut<'a>,
    lse: Option<&'a SharedMut<'a>>,
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (shape, block) = (self.shape, self.block);
        let (rows, width) = (block.rows(shape), padded(shape.head_dim));
        block.gather(shape, self.q, &mut self.scratch.q);
        self.scratch.sums[..rows * width].fill(0.0);
        self.scratch.state[..rows].fill(Running::START);
        let seen = block.seen(shape, 0..rows);
        for tile in (seen.start / KEYS * KEYS..seen.end).step_by(KEYS) {
            self.load(s, tile, within_tile(&seen, tile));
            for first in (0..rows).step_by(ROWS) {
                self.rows(s, tile, first..rows.min(first + ROWS));
            }
        }
        self.finish(s);
    }
}

impl<'a> Forward<'a> {
    fn head(&self) -> KeyHead<'a> {
        KeyHead { spans: &self.chain.spans, shape: self.shape, index: self.block.kv_head }
    }

    /// Whether values are read in place: copying them pays from a few rows on.
    fn in_place(&self) -> bool {
        let (rows, d) = (self.block.rows(self.shape), self.shape.head_dim);
        rows <= 2 * ROWS && d.is_multiple_of(LANES)
    }

    /// Brings the part `seen` of a tile to scratch.
    #[inline(always)]
    fn load<S: Simd>(&mut self, s: S, tile: usize, seen: Range<usize>) {
        let (head, in_place) = (self.head(), self.in_place());
        let Scratch { kt, eight, v, .. } = &mut *self.scratch;
        head.transpose(s, tile, whole_vectors(&seen), kt, eight);
        if !in_place {
            head.gather(Side::V, tile..tile + seen.end, v);
        }
    }

    /// Takes the keys of a tile into the running softmax of a few rows.
    #[inline(always)]
    fn rows<S: Simd>(&mut self, s: S, tile: usize, rows: Range<usize>) {
        let (head, in_place, shape) = (self.head(), self.in_place(), self.shape);
        let (scratch, width) = (&mut *self.scratch, padded(self.shape.head_dim));
        let seen = within_tile(&self.block.seen(shape, rows.clone()), tile);
        if seen.is_empty() {
            return;
        }
        let cols = whole_vectors(&seen);
        s.run(Product {
            a: &scratch.q[rows.start * width..],
            a_row: width,
            a_step: 1,
            b: &scratch.kt[cols.start..],
            b_row: KEYS,
            b_vector: LANES,
            fetch: &mut Lines::none(),
            c: &mut scratch.scores[cols.start..],
            c_row: KEYS,
            rows: rows.len(),
            cols: cols.len(),
            depth: shape.head_dim,
            old: Old::Drop,
        });
        for (row, scores) in rows.clone().zip(scratch.scores.chunks_exact_mut(KEYS)) {
            let visible = within_tile(&self.block.visible(shape, row), tile);
            let sums = &mut scratch.sums[row * width..(row + 1) * width];
            weigh(s, shape, scores, &cols, &visible, &mut scratch.state[row], sums);
        }
        let mut add_values = |run: Run| {
            s.run(Product {
                a: &scratch.scores[run.position - tile..],
                a_row: KEYS,
                a_step: 1,
                b: run.x,
                b_row: run.stride,
                b_vector: LANES,
                fetch: &mut Lines::none(),
                c: &mut scratch.sums[rows.start * width..],
                c_row: width,
                rows: rows.len(),
                cols: width,
                depth: run.len,
                old: Old::First,
            });
        };
        let position = tile + seen.start;
        if in_place {
            head.runs(Side::V, position..tile + seen.end).for_each(add_values);
        } else {
            let (x, len) = (&scratch.v[seen.start * width..], seen.len());
            add_values(Run { x, stride: width, position, len });
        }
    }

    /// Divides the sums by the denominators and writes the results.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S) {
        let (shape, block, scratch) = (self.shape, self.block, &mut *self.scratch);
        let (d, group, width) = (shape.head_dim, shape.group(), padded(shape.head_dim));
        for row in 0..block.rows(shape) {
            let state = &scratch.state[row];
            let sums = &mut scratch.sums[row * width..(row + 1) * width];
            let denominator = state.divide(s, sums, shape.rounded);
            let at = block.source(shape, row / group).start / d + row % group;
            // SAFETY: chains do not overlap, and a block's rows and heads are its own.
            unsafe {
                self.out.part(at * d..(at + 1) * d).copy_from_slice(&sums[..d]);
                if let Some(lse) = self.lse {
                    lse.part(at..at + 1)[0] = denominator;
                }
            }
        }
    }
}

/// Turns the scores of a row in a tile into weights relative to the running maximum, and scales
/// what was summed before if the maximum has grown.
#[inline(always)]
pub(super) fn weigh<S: Simd>(
    s: S,
    shape: &AttentionShape,
    scores: &mut [f32],
    cols: &Range<usize>,
    visible: &Range<usize>,
    state: &mut Running,
    sums: &mut [f32],
) {
    let (scores, lost) = (&mut scores[cols.clone()], f32::NEG_INFINITY);
    for x in scores.as_chunks_mut::<LANES>().0 {
        let score = s.mul(s.load(x), s.splat(shape.scale));
        // a closure here would be called with its numbers in memory
        let score = match shape.softcap {
            None => score,
            Some(cap) => capped(s, score, cap).0,
        };
        s.store(x, score);
    }
    fill_hidden(scores, cols, visible, lost);
    let mut top = s.splat(state.top);
    for x in scores.as_chunks::<LANES>().0 {
        top = s.max(s.load(x), top);
    }
    let top = s.top(top);
    if top == lost {
        scores.fill(0.0);
        return;
    }
    let mut total = s.load(&state.total);
    if top != state.top {
        let factor = exp(s, s.splat(state.top - top));
        total = s.mul(total, factor);
        for x in sums.as_chunks_mut::<LANES>().0 {
            s.store(x, s.mul(s.load(x), factor));
        }
        state.top = top;
    }
    for x in scores.as_chunks_mut::<LANES>().0 {
        let weight = exp(s, s.sub(s.load(x), s.splat(top)));
        total = s.add(total, weight);
        s.store(x, weight);
    }
    s.store(&mut state.total, total);
}

/// The score bounded to `cap`, and its derivative.
#[inline(always)]
pub(super) fn capped<S: Simd>(s: S, score: S::V, cap: f32) -> (S::V, S::V) {
    let t = tanh(s, s.div(score, s.splat(cap)));
    (s.mul(t, s.splat(cap)), s.sub(s.splat(1.0), s.mul(t, t)))
}
