//! Attention of new tokens over cached keys and values that lie in pages.
//!
//! Neighbouring sequences that share a page, such as the samples of one prompt, read it together.
//! The bits are those of [`forward`](super::attention::forward): the same tiles in the same order.

use std::ops::Range;

use super::attention::AttentionShape;
use super::attention_forward::{BLOCK_ROWS, Running, weigh};
use super::attention_tile::{KEYS, ROWS, padded, whole_vectors, within_tile};
use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::pages::{PAGE, PageShape};
use super::parallel::{SharedMut, for_each_index};
use super::product::{Old, Product};

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
    pub pages: &'a [Box<[f32]>],
    /// How they are divided.
    pub shape: PageShape,
    /// The layer.
    pub layer: usize,
}

/// Softmax attention of the packed queries `q` to the pages of their sequences, into `out`, both
/// `[N, heads * head_dim]`. Rows of no segment stay as they are.
///
/// # Panics
/// If segments overlap in rows, or a page is missing.
pub fn forward_cached(
    q: &[f32],
    segments: &[CachedSegment],
    layer: LayerPages,
    shape: &AttentionShape,
    out: &mut [f32],
) {
    forward_cached_at(CpuLevel::detect(), q, segments, layer, shape, out);
}

/// [`forward_cached`] on a given instruction set.
pub(super) fn forward_cached_at(
    level: CpuLevel,
    q: &[f32],
    segments: &[CachedSegment],
    layer: LayerPages,
    shape: &AttentionShape,
    out: &mut [f32],
) {
    shape.check();
    assert!(q.len() == out.len(), "queries and result differ in size");
    assert!(segments.is_sorted_by(|a, b| a.start + a.len <= b.start), "segments overlap in rows");
    let queries = queries(segments);
    let tasks = tasks(&queries, shape);
    let rows = tasks.iter().map(|(task, _)| task.len() * shape.group()).max().unwrap_or(0);
    let out = SharedMut::new(out);
    let make = || Scratch::new(shape, rows);
    for_each_index(tasks.len(), make, |scratch, i| {
        let (task, head) = tasks[i].clone();
        let (queries, out) = (&queries[task], &out);
        level.run(Forward { q, queries, head, layer, shape, scratch, out });
    });
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
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (queries, shape) = (self.queries, self.shape);
        self.begin();
        let first = queries.iter().map(|query| shape.visible(query.position).start).min();
        let last = queries.iter().map(|query| query.position).max().unwrap_or(0);
        for page in first.unwrap_or(0) / PAGE..last / PAGE + 1 {
            let mut start = 0;
            while start < queries.len() {
                let number = queries[start].pages.get(page);
                let same = queries[start..].iter().take_while(|q| q.pages.get(page) == number);
                let end = start + same.count();
                if let Some(number) = number {
                    self.page(s, page * PAGE, *number, start..end);
                }
                start = end;
            }
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

    /// Takes a page, whose keys begin at position `tile`, into the softmax of some queries.
    #[inline(always)]
    fn page<S: Simd>(&mut self, s: S, tile: usize, number: u32, queries: Range<usize>) {
        let group = self.shape.group();
        let rows = queries.start * group..queries.end * group;
        for first in rows.clone().step_by(ROWS) {
            self.rows(s, tile, number, first..rows.end.min(first + ROWS));
        }
    }

    #[inline(always)]
    fn rows<S: Simd>(&mut self, s: S, tile: usize, number: u32, rows: Range<usize>) {
        let (shape, group, width) = (self.shape, self.shape.group(), padded(self.shape.head_dim));
        let visible =
            |row: usize| within_tile(&shape.visible(self.queries[row / group].position), tile);
        let seen = rows.clone().map(visible).filter(|seen| !seen.is_empty());
        let Some(seen) = seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)) else {
            return;
        };
        let LayerPages { pages, shape: parts, layer } = self.layer;
        let page = &pages[number as usize];
        let (keys, values) =
            (&page[parts.keys(layer, self.head)], &page[parts.values(layer, self.head)]);
        let (scratch, cols) = (&mut *self.scratch, whole_vectors(&seen));
        s.run(Product {
            a: &scratch.q[rows.start * width..],
            a_row: width,
            a_step: 1,
            b: &keys[cols.start * shape.head_dim..],
            b_row: LANES,
            b_vector: LANES * shape.head_dim,
            c: &mut scratch.scores[cols.start..],
            c_row: KEYS,
            rows: rows.len(),
            cols: cols.len(),
            depth: shape.head_dim,
            old: Old::Drop,
        });
        for (row, scores) in rows.clone().zip(scratch.scores.chunks_exact_mut(KEYS)) {
            let sums = &mut scratch.sums[row * width..(row + 1) * width];
            weigh(s, shape, scores, &cols, &visible(row), &mut scratch.state[row], sums);
        }
        s.run(Product {
            a: &scratch.scores[seen.start..],
            a_row: KEYS,
            a_step: 1,
            b: &values[seen.start * width..],
            b_row: width,
            b_vector: LANES,
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
            // SAFETY: segments do not overlap, and a task's queries and head are its own.
            let out = unsafe { self.out.part(query.source(self.head, self.shape)) };
            for (j, head) in out.chunks_exact_mut(d).enumerate() {
                let row = i * self.shape.group() + j;
                let sums = &mut self.scratch.sums[row * width..(row + 1) * width];
                self.scratch.state[row].divide(s, sums);
                head.copy_from_slice(&sums[..d]);
            }
        }
    }
}
