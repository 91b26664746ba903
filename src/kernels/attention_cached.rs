//! Attention of new tokens over cached keys and values that lie in pages.
//!
//! Neighbouring sequences that share a page, such as the samples of one prompt, read it together.
//! The bits are those of [`forward`](super::attention::forward): the same tiles in the same order.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::attention::AttentionShape;
use super::attention_forward::{BLOCK_ROWS, Running, weigh};
use super::attention_tile::{KEYS, ROWS, padded, whole_vectors, within_tile};
use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::pages::{PAGE, Page, PageShape};
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
    let queries = queries(segments);
    let tasks = tasks(&queries, shape);
    let rows = tasks.iter().map(|(task, _)| task.len() * shape.group()).max().unwrap_or(0);
    let (out, lse) = (SharedMut::new(out), lse.map(SharedMut::new));
    for_each_index(
        tasks.len(),
        || Scratch::new(shape, rows),
        |scratch, i| {
            let (task, head) = tasks[i].clone();
            let (queries, out, lse) = (&queries[task], &out, lse.as_ref());
            level.run(Forward { q, queries, head, layer, shape, scratch, out, lse });
        },
    );
}

/// One new token.
#[derive(Clone, Copy)]
struct Query<'a> {
    row: usize,
    position: usize,
    pages: &'a [u32],
}

impl Query<'_> {
    /// Where its heads that read key head `head` lie.
    fn source(&self, head: usize, shape: &AttentionShape) -> Range<usize> {
        let width = shape.group() * shape.head_dim;
        let at = (self.row * shape.kv_heads + head) * width;
        at..at + width
    }
}

fn queries<'a>(segments: &[CachedSegment<'a>]) -> Vec<Query<'a>> {
    let of = |segment: &CachedSegment<'a>| {
        let CachedSegment { start, len, position0, pages } = *segment;
        assert!(pages.len() * PAGE >= position0 + len, "a page is missing");
        (0..len).map(move |i| Query { row: start + i, position: position0 + i, pages })
    };
    segments.iter().flat_map(of).collect()
}

/// Cuts the queries where the first page changes or a block is full, once for each key head.
fn tasks(queries: &[Query], shape: &AttentionShape) -> Vec<(Range<usize>, usize)> {
    let most = (BLOCK_ROWS / shape.group()).max(1);
    let mut all = Vec::new();
    let mut start = 0;
    for end in 1..=queries.len() {
        let first = queries[start].pages[0];
        let goes_on = queries.get(end).is_some_and(|query| query.pages[0] == first);
        if !goes_on || end - start == most {
            all.extend((0..shape.kv_heads).map(|head| (start..end, head)));
            start = end;
        }
    }
    all
}

/// A page that rows of a task read.
struct Visit {
    number: u32,
    /// Position of its first key.
    tile: usize,
    rows: Range<usize>,
    /// What any of the rows sees of it.
    seen: Range<usize>,
}

/// The positions that a row of a task sees of the page whose keys begin at position `tile`.
fn visible(queries: &[Query], shape: &AttentionShape, row: usize, tile: usize) -> Range<usize> {
    within_tile(&shape.visible(queries[row / shape.group()].position), tile)
}

/// The buffers of one thread.
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    state: Vec<Running>,
    sums: Vec<f32>,
}

impl Scratch {
    fn new(shape: &AttentionShape, rows: usize) -> Self {
        let width = padded(shape.head_dim);
        Self {
            q: vec![0.0; rows * width],
            scores: vec![0.0; ROWS * KEYS],
            state: vec![Running::START; rows],
            sums: vec![0.0; rows * width],
        }
    }
}

/// The queries of a task and one key head; rows in scratch are (query, head), heads fastest.
struct Forward<'a> {
    q: &'a [f32],
    queries: &'a [Query<'a>],
    head: usize,
    layer: LayerPages<'a>,
    shape: &'a AttentionShape,
    scratch: &'a mut Scratch,
    out: &'a SharedMut<'a>,
    lse: Option<&'a SharedMut<'a>>,
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.begin();
        let visits = self.visits();
        for (i, visit) in visits.iter().enumerate() {
            let wanted = |next: &&Visit| {
                next.seen.start <= visit.seen.start && visit.seen.end <= next.seen.end
            };
            let next = visits.get(i + 1).filter(wanted);
            self.page(s, visit, next.map_or(visit.number, |next| next.number));
        }
        self.finish(s);
    }
}

impl Forward<'_> {
    fn begin(&mut self) {
        let (d, width) = (self.shape.head_dim, padded(self.shape.head_dim));
        let mut rows = self.scratch.q.chunks_exact_mut(width);
        for query in self.queries {
            let heads = self.q[query.source(self.head, self.shape)].chunks_exact(d);
            heads.zip(&mut rows).for_each(|(head, row)| row[..d].copy_from_slice(head));
        }
        let rows = self.queries.len() * self.shape.group();
        self.scratch.sums[..rows * width].fill(0.0);
        self.scratch.state[..rows].fill(Running::START);
    }

    /// The pages in ascending order, each with the neighbouring queries that read it.
    fn visits(&self) -> Vec<Visit> {
        let (queries, shape) = (self.queries, self.shape);
        let first = queries.iter().map(|query| shape.visible(query.position).start).min();
        let last = queries.iter().map(|query| query.position).max().unwrap_or(0);
        let pages = first.unwrap_or(0) / PAGE..last / PAGE + 1;
        let mut visits = Vec::with_capacity(queries.len() + pages.len());
        for page in pages {
            let mut rest = 0..queries.len();
            while let Some(number) = queries[rest.clone()].first().map(|q| q.pages.get(page)) {
                let same = queries[rest.clone()].iter().take_while(|q| q.pages.get(page) == number);
                let of = rest.start..rest.start + same.count();
                rest.start = of.end;
                let rows = of.start * shape.group()..of.end * shape.group();
                let tile = page * PAGE;
                if let (Some(&number), Some(seen)) = (number, self.seen(&rows, tile)) {
                    visits.push(Visit { number, tile, rows, seen });
                }
            }
        }
        visits
    }

    /// Takes a page into the softmax of the rows that read it; meanwhile the same places of the page `next` are
    /// fetched.
    #[inline(always)]
    fn page<S: Simd>(&mut self, s: S, visit: &Visit, next: u32) {
        let LayerPages { pages, shape, layer } = self.layer;
        let (keys, values) = (shape.keys(layer, self.head), shape.values(layer, self.head));
        let (page, next) = (&pages[visit.number as usize], &pages[next as usize]);
        let ahead = next.address().wrapping_sub(page.address());
        match page {
            Page::F32(page) => self.all_rows(s, visit, (&page[keys], &page[values]), ahead),
            Page::Bf16(page) => {
                let page: &[u16] = page.reinterpret_cast();
                self.all_rows(s, visit, (&page[keys], &page[values]), ahead);
            }
        }
    }

    /// Takes keys and values of a page into the softmax of the rows that read it.
    #[inline(always)]
    fn all_rows<S: Simd, B: Right>(
        &mut self,
        s: S,
        visit: &Visit,
        page: (&[B], &[B]),
        ahead: usize,
    ) {
        for first in visit.rows.clone().step_by(ROWS) {
            let ahead = if first == visit.rows.start { ahead } else { 0 };
            self.rows(s, visit.tile, page, first..visit.rows.end.min(first + ROWS), ahead);
        }
    }

    /// The positions that any of some rows sees of the page whose keys begin at position `tile`.
    fn seen(&self, rows: &Range<usize>, tile: usize) -> Option<Range<usize>> {
        let visible = |row| visible(self.queries, self.shape, row, tile);
        let seen = rows.clone().map(visible).filter(|seen| !seen.is_empty());
        seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
    }

    #[inline(always)]
    fn rows<S: Simd, B: Right>(
        &mut self,
        s: S,
        tile: usize,
        (keys, values): (&[B], &[B]),
        rows: Range<usize>,
        ahead: usize,
    ) {
        let (shape, width) = (self.shape, padded(self.shape.head_dim));
        let Some(seen) = self.seen(&rows, tile) else { return };
        let (scratch, cols) = (&mut *self.scratch, whole_vectors(&seen));
        let key_len = self.layer.shape.key_len();
        // values that lie together are read together; a hidden one has the weight zero
        let seen = seen.start / B::TOGETHER * B::TOGETHER..seen.end;
        s.run(Product {
            a: &scratch.q[rows.start * width..],
            a_row: width,
            a_step: 1,
            b: &keys[cols.start * key_len..],
            b_row: LANES * B::TOGETHER,
            b_vector: LANES * key_len,
            ahead,
            c: &mut scratch.scores[cols.start..],
            c_row: KEYS,
            rows: rows.len(),
            cols: cols.len(),
            depth: shape.head_dim,
            old: Old::Drop,
        });
        for (row, scores) in rows.clone().zip(scratch.scores.chunks_exact_mut(KEYS)) {
            let visible = visible(self.queries, shape, row, tile);
            let sums = &mut scratch.sums[row * width..(row + 1) * width];
            weigh(s, shape, scores, &cols, &visible, &mut scratch.state[row], sums);
        }
        s.run(Product {
            a: &scratch.scores[seen.start..],
            a_row: KEYS,
            a_step: 1,
            b: &values[seen.start * width..],
            b_row: width * B::TOGETHER,
            b_vector: LANES * B::TOGETHER,
            ahead,
            c: &mut scratch.sums[rows.start * width..],
            c_row: width,
            rows: rows.len(),
            cols: width,
            depth: seen.len(),
            old: Old::First,
        });
    }

    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S) {
        let (d, width) = (self.shape.head_dim, padded(self.shape.head_dim));
        for (i, query) in self.queries.iter().enumerate() {
            let source = query.source(self.head, self.shape);
            for j in 0..self.shape.group() {
                let row = i * self.shape.group() + j;
                let sums = &mut self.scratch.sums[row * width..(row + 1) * width];
                let denominator = self.scratch.state[row].divide(s, sums, self.shape.rounded);
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
