//! Attention, backward: weights are recomputed by tiles from the softmax's denominators.
//!
//! A task is a piece of a segment and one key head. It owns the gradients of its queries and of
//! its own keys; what it adds to its ancestors' keys is kept apart and summed afterwards in the
//! order of the pieces, so that the result does not depend on the number of threads.

use super::attention::{AttentionShape, Chain, Segment, chains};
use super::attention_forward::capped;
use super::attention_tile::{
    KEYS, KeyHead, QueryBlock, ROWS, Side, fill_hidden, padded, transpose, whole_vectors,
    within_tile,
};
use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::lanes_math::exp;
use super::parallel::{SharedMut, for_each_index};
use super::prefetch::Lines;
use super::product::{Old, Product};
use super::slices::room;
use std::ops::Range;

/// Rows of scratch whose weights are kept at a time, about.
const PART_ROWS: usize = 96;
/// Keys whose gradients skip the same queries before them.
const KEY_STEP: usize = 4 * ROWS;

/// What the backward pass reads: the forward pass's inputs and results, and `dout`.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInput<'a> {
    /// Queries, `[N, heads * head_dim]`.
    pub q: &'a [f32],
    /// Keys, `[N, kv_heads * head_dim]`.
    pub k: &'a [f32],
    /// Values, `[N, kv_heads * head_dim]`.
    pub v: &'a [f32],
    /// Result of the forward pass, `[N, heads * head_dim]`.
    pub out: &'a [f32],
    /// Logarithm of each softmax's denominator, `[N, heads]`.
    pub lse: &'a [f32],
    /// Gradient of the loss to `out`, `[N, heads * head_dim]`.
    pub dout: &'a [f32],
}

/// Where the backward pass writes the rows of all segments; old contents do not matter.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Gradient to the queries, `[N, heads * head_dim]`.
    pub dq: &'a mut [f32],
    /// Gradient to the keys, `[N, kv_heads * head_dim]`.
    pub dk: &'a mut [f32],
    /// Gradient to the values, `[N, kv_heads * head_dim]`.
    pub dv: &'a mut [f32],
}

/// Gradients of [`forward`](super::attention::forward) over a packed batch, to queries, keys and
/// values. A parent's keys gather the gradients of all segments that continue it, in the order of
/// their indices.
///
/// # Panics
/// If segments overlap in rows, or one does not start at the position where its parent ends.
pub fn backward(
    input: &BackwardInput,
    segments: &[Segment],
    shape: &AttentionShape,
    grads: Gradients,
) {
    backward_at(CpuLevel::detect(), input, segments, shape, grads);
}

/// [`backward`] on a given instruction set.
pub(super) fn backward_at(
    level: CpuLevel,
    input: &BackwardInput,
    segments: &[Segment],
    shape: &AttentionShape,
    grads: Gradients,
) {
    shape.check();
    check(segments);
    let pieces = pieces(segments);
    let chains = chains(&pieces, input.k, input.v, shape.kv_width());
    let grads = SharedGradients {
        dq: SharedMut::new(grads.dq),
        dk: SharedMut::new(grads.dk),
        dv: SharedMut::new(grads.dv),
    };
    let inherited = Inherited::of(&pieces, shape);
    let size = inherited.last().map_or(0, Inherited::end);
    let (mut dk, mut dv) = (room(size), room(size));
    let kept = (SharedMut::new(&mut dk), SharedMut::new(&mut dv));
    let rows = pieces.iter().map(|piece| piece.len * shape.group()).max().unwrap_or(0);
    let work = |scratch: &mut Scratch, task: usize| {
        let (piece, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let Segment { start, len, position0, .. } = pieces[piece];
        let block = QueryBlock { start, len, position0, kv_head };
        let (chain, grads, inherited) = (&chains[piece], &grads, (&inherited[task], &kept));
        level.run(Backward { input, chain, block, shape, grads, inherited, scratch });
    };
    for_each_index(inherited.len(), || Scratch::new(shape, rows), work);
    let heirs = heirs(&pieces);
    let gather = |piece: usize| {
        for &heir in &heirs[piece] {
            for kv_head in 0..shape.kv_heads {
                let from = &inherited[heir * shape.kv_heads + kv_head];
                from.give(&kept, &pieces[piece], kv_head, shape, &grads);
            }
        }
    };
    for_each_index(pieces.len(), || (), |(), piece| gather(piece));
}

fn check(segments: &[Segment]) {
    let mut rows: Vec<_> = segments.iter().map(|s| (s.start, s.start + s.len)).collect();
    rows.sort_unstable();
    assert!(rows.windows(2).all(|w| w[0].1 <= w[1].0), "segments overlap in rows");
    for (i, segment) in segments.iter().enumerate() {
        assert!(segment.parent.is_none_or(|p| p < i), "a parent must come before its children");
        let end = segment.parent.map_or(0, |p| segments[p].position0 + segments[p].len);
        assert!(segment.position0 == end, "a segment must start where its parent ends");
    }
}

/// Cuts long segments into pieces, each the parent of the next: of 256 rows, or of an eighth of
/// the segment if that is more, so that what the pieces keep apart for each other stays below four
/// times the segment's keys.
fn pieces(segments: &[Segment]) -> Vec<Segment> {
    let mut all: Vec<Segment> = Vec::with_capacity(segments.len());
    let mut last = Vec::with_capacity(segments.len());
    for segment in segments {
        let size = segment.len.div_ceil(8).next_multiple_of(KEYS).max(4 * KEYS);
        let mut parent = segment.parent.map(|p: usize| last[p]);
        for first in (0..segment.len.max(1)).step_by(size) {
            let (start, position0) = (segment.start + first, segment.position0 + first);
            all.push(Segment { start, len: size.min(segment.len - first), position0, parent });
            parent = Some(all.len() - 1);
        }
        last.push(all.len() - 1);
    }
    all
}

/// For each piece those that have it as an ancestor, in ascending order.
fn heirs(pieces: &[Segment]) -> Vec<Vec<usize>> {
    let mut heirs = vec![Vec::new(); pieces.len()];
    for (i, piece) in pieces.iter().enumerate() {
        let mut parent = piece.parent;
        while let Some(p) = parent {
            heirs[p].push(i);
            parent = pieces[p].parent;
        }
    }
    heirs
}

struct SharedGradients<'a> {
    dq: SharedMut<'a>,
    dk: SharedMut<'a>,
    dv: SharedMut<'a>,
}

/// Where lies what one task adds to the keys and values of its ancestors, `[positions, head_dim]` from `start` on.
struct Inherited {
    positions: Range<usize>,
    start: usize,
    head_dim: usize,
}

/// What all tasks add to keys and to values.
type KeptApart<'a> = (SharedMut<'a>, SharedMut<'a>);

impl Inherited {
    /// Those of the tasks of all pieces, one for each key head, one after the other.
    fn of(pieces: &[Segment], shape: &AttentionShape) -> Vec<Self> {
        let (mut start, head_dim) = (0, shape.head_dim);
        let heads = pieces.iter().flat_map(|piece| (0..shape.kv_heads).map(move |_| piece));
        let of_task = |piece: &Segment| {
            // an empty piece adds nothing
            let first =
                if piece.len == 0 { piece.position0 } else { shape.visible(piece.position0).start };
            let positions = first..piece.position0;
            let inherited = Inherited { positions, start, head_dim };
            start = inherited.end();
            inherited
        };
        heads.map(of_task).collect()
    }

    fn end(&self) -> usize {
        self.start + self.positions.len() * self.head_dim
    }

    fn at(&self, position: usize) -> Range<usize> {
        let start = self.start + (position - self.positions.start) * self.head_dim;
        start..start + self.head_dim
    }

    /// Adds the part that belongs to an ancestor.
    fn give(
        &self,
        (kept_dk, kept_dv): &KeptApart,
        to: &Segment,
        kv_head: usize,
        shape: &AttentionShape,
        grads: &SharedGradients,
    ) {
        let (d, width) = (shape.head_dim, shape.kv_width());
        for position in to.position0.max(self.positions.start)..to.position0 + to.len {
            let at = (to.start + position - to.position0) * width + kv_head * d;
            // SAFETY: each ancestor's rows are summed by one task, the only one that reads what others kept for
            // them; all of those have ended.
            unsafe {
                let (dk, dv) = (grads.dk.part(at..at + d), grads.dv.part(at..at + d));
                let from = self.at(position);
                let (from_dk, from_dv) = (kept_dk.part(from.clone()), kept_dv.part(from));
                dk.iter_mut().zip(from_dk).for_each(|(sum, x)| *sum += *x);
                dv.iter_mut().zip(from_dv).for_each(|(sum, x)| *sum += *x);
            }
        }
    }
}

struct Backward<'a> {
    input: &'a BackwardInput<'a>,
    chain: &'a Chain<'a>,
    block: QueryBlock,
    shape: &'a AttentionShape,
    grads: &'a SharedGradients<'a>,
    inherited: (&'a Inherited, &'a KeptApart<'a>),
    scratch: &'a mut Scratch,
}

/// The buffers of one thread, for tasks of so many rows at most. Names are the matrices' in FlashAttention.
struct Scratch {
    q: Vec<f32>,
    dout: Vec<f32>,
    dq: Vec<f32>,
    /// For each row the sum of `dout * out`.
    delta: Vec<f32>,
    lse: Vec<f32>,
    k: Vec<f32>,
    kt: Vec<f32>,
    v: Vec<f32>,
    vt: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
}

impl Scratch {
    fn new(shape: &AttentionShape, rows: usize) -> Self {
        let width = padded(shape.head_dim);
        let part = PART_ROWS.max(shape.group()).min(rows) * KEYS;
        let [q, dout, dq] = std::array::from_fn(|_| vec![0.0; rows * width]);
        let [k, kt, v, vt, dk, dv] = std::array::from_fn(|_| vec![0.0; KEYS * width]);
        let [p, ds] = std::array::from_fn(|_| vec![0.0; part]);
        let (delta, lse) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        Scratch { q, dout, dq, delta, lse, k, kt, v, vt, dk, dv, p, ds }
    }
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (shape, block) = (self.shape, self.block);
        let (rows, width) = (block.rows(shape), padded(shape.head_dim));
        if rows == 0 {
            return;
        }
        self.gather(s);
        let part = (PART_ROWS / shape.group()).max(1) * shape.group();
        let head = KeyHead { spans: &self.chain.spans, shape, index: block.kv_head };
        let seen = block.seen(shape, 0..rows);
        for tile in (seen.start / KEYS * KEYS..seen.end).step_by(KEYS) {
            let Scratch { k, kt, v, vt, dk, dv, .. } = &mut *self.scratch;
            head.gather(Side::K, tile..tile + KEYS, k);
            head.gather(Side::V, tile..tile + KEYS, v);
            transpose(s, k, width, kt);
            transpose(s, v, width, vt);
            dk.fill(0.0);
            dv.fill(0.0);
            for first in (0..rows).step_by(part) {
                self.part(s, tile, first..rows.min(first + part));
            }
            self.store_keys(tile);
        }
        self.store_queries();
    }
}

impl Backward<'_> {
    /// Copies the task's queries, and what belongs to them, to scratch.
    #[inline(always)]
    fn gather<S: Simd>(&mut self, s: S) {
        let (shape, block, input) = (self.shape, self.block, self.input);
        let (d, group, rows) = (shape.head_dim, shape.group(), block.rows(shape));
        let Scratch { q, dout, dq, delta, lse, .. } = &mut *self.scratch;
        block.gather(shape, input.q, q);
        block.gather(shape, input.dout, dout);
        dq[..rows * padded(d)].fill(0.0);
        delta.clear();
        lse.clear();
        for row in 0..rows {
            let at = block.source(shape, row / group).start / d + row % group;
            let range = at * d..at * d + d;
            delta.push(dot(s, &input.dout[range.clone()], &input.out[range]));
            lse.push(input.lse[at]);
        }
    }

    /// Adds what some rows and a tile of keys have to do with each other to all three gradients.
    #[inline(always)]
    fn part<S: Simd>(&mut self, s: S, tile: usize, rows: Range<usize>) {
        if within_tile(&self.block.seen(self.shape, rows.clone()), tile).is_empty() {
            return;
        }
        for first in rows.clone().step_by(ROWS) {
            let some = first..rows.end.min(first + ROWS);
            self.weights(s, tile, some, first - rows.start);
        }
        let scratch = &mut *self.scratch;
        let (group, width) = (self.shape.group(), padded(self.shape.head_dim));
        for key in (0..KEYS).step_by(KEY_STEP) {
            let early = (tile + key).saturating_sub(self.block.position0) * group;
            let first = early.max(rows.start);
            if first >= rows.end {
                break;
            }
            let weights = [
                (&scratch.p, &scratch.dout, &mut scratch.dv),
                (&scratch.ds, &scratch.q, &mut scratch.dk),
            ];
            for (a, b, c) in weights {
                s.run(Product {
                    a: &a[(first - rows.start) * KEYS + key..],
                    a_row: 1,
                    a_step: KEYS,
                    b: &b[first * width..],
                    b_row: width,
                    b_vector: LANES,
                    fetch: &mut Lines::none(),
                    c: &mut c[key * width..],
                    c_row: width,
                    rows: KEY_STEP.min(KEYS - key),
                    cols: width,
                    depth: rows.end - first,
                    old: Old::First,
                });
            }
        }
    }

    /// Recomputes the weights of a few rows and their scores' gradients, and adds to `dq`; `at` is
    /// the first row's place in `p` and `ds`.
    #[inline(always)]
    fn weights<S: Simd>(&mut self, s: S, tile: usize, rows: Range<usize>, at: usize) {
        let (shape, width) = (self.shape, padded(self.shape.head_dim));
        let seen = within_tile(&self.block.seen(shape, rows.clone()), tile);
        let cols = if seen.is_empty() { 0..0 } else { whole_vectors(&seen) };
        let scratch = &mut *self.scratch;
        let place = at * KEYS..(at + rows.len()) * KEYS;
        let (p, ds) = (&mut scratch.p[place.clone()], &mut scratch.ds[place]);
        for row in p.chunks_exact_mut(KEYS).chain(ds.chunks_exact_mut(KEYS)) {
            row[..cols.start].fill(0.0);
            row[cols.end..].fill(0.0);
        }
        if seen.is_empty() {
            return;
        }
        let products = [(&scratch.q, &scratch.kt, &mut *p), (&scratch.dout, &scratch.vt, &mut *ds)];
        for (a, b, c) in products {
            s.run(Product {
                a: &a[rows.start * width..],
                a_row: width,
                a_step: 1,
                b: &b[cols.start..],
                b_row: KEYS,
                b_vector: LANES,
                fetch: &mut Lines::none(),
                c: &mut c[cols.start..],
                c_row: KEYS,
                rows: rows.len(),
                cols: cols.len(),
                depth: shape.head_dim,
                old: Old::Drop,
            });
        }
        for (i, row) in rows.clone().enumerate() {
            let visible = within_tile(&self.block.visible(shape, row), tile);
            let range = i * KEYS + cols.start..i * KEYS + cols.end;
            let (p, ds) = (&mut p[range.clone()], &mut ds[range]);
            slopes(s, shape, p, ds, scratch.lse[row], scratch.delta[row]);
            fill_hidden(p, &cols, &visible, 0.0);
            fill_hidden(ds, &cols, &visible, 0.0);
        }
        s.run(Product {
            a: &ds[seen.start..],
            a_row: KEYS,
            a_step: 1,
            b: &scratch.k[seen.start * width..],
            b_row: width,
            b_vector: LANES,
            fetch: &mut Lines::none(),
            c: &mut scratch.dq[rows.start * width..],
            c_row: width,
            rows: rows.len(),
            cols: width,
            depth: seen.len(),
            old: Old::First,
        });
    }

    /// Writes the gradients of a tile's keys: own ones to the result, ancestors' ones apart.
    fn store_keys(&mut self, tile: usize) {
        let (shape, block, scratch) = (self.shape, self.block, &*self.scratch);
        let (d, width) = (shape.head_dim, padded(shape.head_dim));
        let (inherited, (kept_dk, kept_dv)) = self.inherited;
        let (first, end) = (inherited.positions.start, block.position0 + block.len);
        for position in tile.max(first)..end.min(tile + KEYS) {
            let from = (position - tile) * width;
            let (dk, dv) = (&scratch.dk[from..from + d], &scratch.dv[from..from + d]);
            if position < block.position0 {
                let to = inherited.at(position);
                // SAFETY: what tasks keep apart does not overlap.
                unsafe {
                    kept_dk.part(to.clone()).copy_from_slice(dk);
                    kept_dv.part(to).copy_from_slice(dv);
                }
            } else {
                let row = block.start + position - block.position0;
                let to = row * shape.kv_width() + block.kv_head * d;
                // SAFETY: a piece's own keys belong to its tasks, one for each head.
                unsafe {
                    self.grads.dk.part(to..to + d).copy_from_slice(dk);
                    self.grads.dv.part(to..to + d).copy_from_slice(dv);
                }
            }
        }
    }

    fn store_queries(&self) {
        let (shape, block) = (self.shape, self.block);
        let (d, group) = (shape.head_dim, shape.group());
        let rows = self.scratch.dq.chunks_exact(padded(d)).take(block.rows(shape));
        for (row, dq) in rows.enumerate() {
            let at = block.source(shape, row / group).start + row % group * d;
            // SAFETY: a piece's queries belong to its tasks, one for each key head.
            unsafe { self.grads.dq.part(at..at + d) }.copy_from_slice(&dq[..d]);
        }
    }
}

/// From dot products of queries and keys in `p`, and of `dout` and values in `ds`, to weights and
/// gradients of the dot products.
#[inline(always)]
fn slopes<S: Simd>(
    s: S,
    shape: &AttentionShape,
    p: &mut [f32],
    ds: &mut [f32],
    lse: f32,
    delta: f32,
) {
    let scale = s.splat(shape.scale);
    let (p, ds) = (p.as_chunks_mut::<LANES>().0, ds.as_chunks_mut::<LANES>().0);
    for (p, ds) in p.iter_mut().zip(ds) {
        let mut score = s.mul(s.load(p), scale);
        let mut slope = scale;
        if let Some(cap) = shape.softcap {
            let (bounded, derivative) = capped(s, score, cap);
            score = bounded;
            slope = s.mul(scale, derivative);
        }
        let weight = exp(s, s.sub(score, s.splat(lse)));
        let change = s.mul(weight, s.sub(s.load(ds), s.splat(delta)));
        s.store(p, weight);
        s.store(ds, s.mul(change, slope));
    }
}

/// Sum of products over lanes, then over the sixteen sums.
#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sum = s.fma(s.load_part(a), s.load_part(b), sum);
    }
    s.sum(sum)
}
