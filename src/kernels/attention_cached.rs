//! Attention of new tokens over cached keys and values that lie in pages.
//!
//! Neighbouring sequences that share a page, such as the samples of one prompt, read it together.
//! The bits are those of [`forward`](super::attention::forward): the same tiles in the same order.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::attention::AttentionShape;
use super::attention_forward::{Running, weigh};
use super::attention_tile::{KEYS, ROWS, padded, whole_vectors};
use super::attention_visits::{Ahead, Place, Plan, Query, Visit, seen, visible};
use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::pages::{Page, PageShape};
use super::parallel::{SharedMut, for_each_index};
use super::product::{Old, Product, Right};

/// New tokens of one sequence, whose own keys and values are in its pages already.
#[derive(Clone, Copy, Debug)]
pub struct CachedSegment<'a> {
    /// First row in the packed queries.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row.
    pub position0: usize,
    /// Numbers of the pages that hold positions `0..position0 + len`.
    pub pages: &'a [u32],
}

/// One layer of all pages.
#[derive(Clone, Copy, Debug)]
pub struct LayerPages<'a> {
    /// The pages by number.
    pub pages: &'a [Page],
    /// How they are divided.
    pub shape: PageShape,
    /// The layer.
    pub layer: usize,
}

/// Softmax attention of the packed queries `q` to the pages of their sequences, into `out`, both
/// `[N, heads * head_dim]`; `lse`, `[N, heads]`, as in [`forward`](super::attention::forward). Rows of no segment
/// stay as they are.
///
/// # Panics
/// If segments overlap in rows, or a page is missing.
pub fn forward_cached(
    q: &[f32],
    segments: &[CachedSegment],
    layer: LayerPages,
    shape: &AttentionShape,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    forward_cached_at(CpuLevel::detect(), q, segments, layer, shape, (out, lse));
}

/// [`forward_cached`] on a given instruction set.
pub(super) fn forward_cached_at(
    level: CpuLevel,
    q: &[f32],
    segments: &[CachedSegment],
    layer: LayerPages,
    shape: &AttentionShape,
    (out, lse): (&mut [f32], Option<&mut [f32]>),
) {
    shape.check();
    assert!(q.len() == out.len(), "queries and result differ in size");
    assert!(segments.is_sorted_by(|a, b| a.start + a.len <= b.start), "segments overlap in rows");
    let plan = &Plan::new(segments, layer, shape);
    let (rows, out, lse) = (plan.most_rows(), SharedMut::new(out), lse.map(SharedMut::new));
    for_each_index(
        plan.tasks.len(),
        || Scratch::new(shape, rows),
        |scratch, task| {
            let (group, head) = plan.tasks[task];
            let queries = &plan.queries[plan.groups[group].queries.clone()];
            let (out, lse) = (&out, lse.as_ref());
            level.run(Forward { q, plan, task, queries, head, scratch, out, lse });
        },
    );
}

/// The buffers of one thread.
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    state: Vec<Running>,
    sums: Vec<f32>,
    ahead: Ahead,
}

impl Scratch {
    fn new(shape: &AttentionShape, rows: usize) -> Self {
        let width = padded(shape.head_dim);
        Self {
            q: vec![0.0; rows * width],
            scores: vec![0.0; ROWS * KEYS],
            state: vec![Running::START; rows],
            sums: vec![0.0; rows * width],
            ahead: Ahead::new(),
        }
    }
}

/// The queries of a task and one key head; rows in scratch are (query, head), heads fastest.
struct Forward<'a> {
    q: &'a [f32],
    plan: &'a Plan<'a>,
    task: usize,
    queries: &'a [Query<'a>],
    head: usize,
    scratch: &'a mut Scratch,
    out: &'a SharedMut<'a>,
    lse: Option<&'a SharedMut<'a>>,
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.begin();
        let visits = &self.plan.groups[self.plan.tasks[self.task].0].visits;
        for (i, visit) in visits.iter().enumerate() {
            self.page(s, i, visit);
        }
        self.finish(s);
    }
}

impl Forward<'_> {
    fn begin(&mut self) {
        let (d, width) = (self.plan.shape.head_dim, padded(self.plan.shape.head_dim));
        let mut rows = self.scratch.q.chunks_exact_mut(width);
        for query in self.queries {
            let heads = self.q[query.source(self.head, self.plan.shape)].chunks_exact(d);
            heads.zip(&mut rows).for_each(|(head, row)| row[..d].copy_from_slice(head));
        }
        let rows = self.queries.len() * self.plan.shape.group();
        self.scratch.sums[..rows * width].fill(0.0);
        self.scratch.state[..rows].fill(Running::START);
    }

    /// Takes a page into the softmax of the rows that read it.
    #[inline(always)]
    fn page<S: Simd>(&mut self, s: S, i: usize, visit: &Visit) {
        let LayerPages { pages, shape, layer } = self.plan.layer;
        let (keys, values) = (shape.keys(layer, self.head), shape.values(layer, self.head));
        match &pages[visit.number as usize] {
            Page::F32(page) => self.all_rows(s, (i, visit), (&page[keys], &page[values])),
            Page::Bf16(page) => {
                let page: &[u16] = page.reinterpret_cast();
                self.all_rows(s, (i, visit), (&page[keys], &page[values]));
            }
        }
    }

    /// Takes keys and values of a page into the softmax of the rows that read it.
    #[inline(always)]
    fn all_rows<S: Simd, B: Right>(
        &mut self,
        s: S,
        (i, visit): (usize, &Visit),
        page: (&[B], &[B]),
    ) {
        for first in visit.rows.clone().step_by(ROWS) {
            self.rows(s, (i, visit.tile), page, first..visit.rows.end.min(first + ROWS));
        }
    }

    #[inline(always)]
    fn rows<S: Simd, B: Right>(
        &mut self,
        s: S,
        (visit, tile): (usize, usize),
        (keys, values): (&[B], &[B]),
        rows: Range<usize>,
    ) {
        let (plan, shape, width) = (self.plan, self.plan.shape, padded(self.plan.shape.head_dim));
        let Some(seen) = seen(self.queries, shape, &rows, tile) else { return };
        let Scratch { q, scores, state, sums, ahead } = &mut *self.scratch;
        let (cols, task) = (whole_vectors(&seen), self.task);
        let key_len = plan.layer.shape.key_len();
        // values that lie together are read together; a hidden one has the weight zero
        let seen = seen.start / B::TOGETHER * B::TOGETHER..seen.end;
        s.run(Product {
            a: &q[rows.start * width..],
            a_row: width,
            a_step: 1,
            b: &keys[cols.start * key_len..],
            b_row: LANES * B::TOGETHER,
            b_vector: LANES * key_len,
            fetch: ahead.lines(plan, Place { task, visit, values: false }),
            c: &mut scores[cols.start..],
            c_row: KEYS,
            rows: rows.len(),
            cols: cols.len(),
            depth: shape.head_dim,
            old: Old::Drop,
        });
        for (row, scores) in rows.clone().zip(scores.chunks_exact_mut(KEYS)) {
            let visible = visible(self.queries, shape, row, tile);
            let sums = &mut sums[row * width..(row + 1) * width];
            weigh(s, shape, scores, &cols, &visible, &mut state[row], sums);
        }
        s.run(Product {
            a: &scores[seen.start..],
            a_row: KEYS,
            a_step: 1,
            b: &values[seen.start * width..],
            b_row: width * B::TOGETHER,
            b_vector: LANES * B::TOGETHER,
            fetch: ahead.lines(plan, Place { task, visit, values: true }),
            c: &mut sums[rows.start * width..],
            c_row: width,
            rows: rows.len(),
            cols: width,
            depth: seen.len(),
            old: Old::First,
        });
    }

    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S) {
        let (d, width) = (self.plan.shape.head_dim, padded(self.plan.shape.head_dim));
        for (i, query) in self.queries.iter().enumerate() {
            let source = query.source(self.head, self.plan.shape);
            for j in 0..self.plan.shape.group() {
                let row = i * self.plan.shape.group() + j;
                let sums = &mut self.scratch.sums[row * width..(row + 1) * width];
                let denominator = self.scratch.state[row].divide(s, sums, self.plan.shape.rounded);
                let at = source.start / d + j;
                // SAFETY: segments do not overlap, and a task's queries and head are its own.
                unsafe {
                    self.out.part(at * d..(at + 1) * d).copy_from_slice(&sums[..d]);
                    if let Some(lse) = self.lse {
                        lse.part(at..at + 1)[0] = denominator;
                    }
                }
            }
        }
    }
}
