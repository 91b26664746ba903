//! The parts that both passes of attention are made of: tiles of keys, blocks of queries.

use super::attention::{AttentionShape, KeySpan};
use super::lanes::{LANES, Simd};
use std::ops::Range;

/// Keys in a tile; tiles start at multiples of it in the chain.
pub const KEYS: usize = 64;

/// Rows of queries that go over a tile together.
pub const ROWS: usize = 6;

/// `head_dim` rounded up to whole vectors: the length of a row in scratch, zeros at its end.
pub fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Transposes a tile `[KEYS, width]` to `[width, KEYS]`; `width` is a multiple of eight.
#[inline(always)]
pub fn transpose<S: Simd>(s: S, tile: &[f32], width: usize, to: &mut [f32]) {
    for row in (0..KEYS).step_by(8) {
        for col in (0..width).step_by(8) {
            s.transpose8(&tile[row * width + col..], width, &mut to[col * KEYS + row..], KEYS);
        }
    }
}

/// Which of the two matrices of a span to read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Keys.
    K,
    /// Values.
    V,
}

/// The rows of one head at consecutive positions of one span.
pub struct Run<'a> {
    /// Starts with the first row.
    pub x: &'a [f32],
    /// Distance of the rows.
    pub stride: usize,
    /// Position of the first row.
    pub position: usize,
    /// Number of rows.
    pub len: usize,
}

/// The keys and values of one head along a chain.
#[derive(Clone, Copy)]
pub struct KeyHead<'a> {
    /// Spans of the chain.
    pub spans: &'a [KeySpan<'a>],
    /// Sizes of the layer.
    pub shape: &'a AttentionShape,
    /// The key head.
    pub index: usize,
}

impl<'a> KeyHead<'a> {
    /// The runs that make up some positions, as far as the chain goes.
    pub fn runs(self, side: Side, positions: Range<usize>) -> impl Iterator<Item = Run<'a>> {
        let (stride, offset) = (self.shape.kv_width(), self.index * self.shape.head_dim);
        let from = self.spans.partition_point(|s| s.position0 + s.len <= positions.start);
        let spans = self.spans[from..].iter().take_while(move |s| s.position0 < positions.end);
        spans.filter(|span| span.len > 0).map(move |span| {
            let position = span.position0.max(positions.start);
            let len = (span.position0 + span.len).min(positions.end) - position;
            let source = if side == Side::K { span.k } else { span.v };
            let x = &source[(position - span.position0) * stride + offset..];
            Run { x, stride, position, len }
        })
    }

    /// Copies rows to `tile`, `[rows, padded]`, the first being the one of `positions.start`.
    pub fn gather(self, side: Side, positions: Range<usize>, tile: &mut [f32]) {
        let (d, width) = (self.shape.head_dim, padded(self.shape.head_dim));
        for run in self.runs(side, positions.clone()) {
            for i in 0..run.len {
                let to = (run.position - positions.start + i) * width;
                tile[to..to + d].copy_from_slice(&run.x[i * run.stride..i * run.stride + d]);
            }
        }
    }

    /// Writes the keys from position `tile` on as columns of `kt`, `[padded, KEYS]`: the columns
    /// `cols`, whole vectors. `eight` is scratch for eight rows.
    #[inline(always)]
    pub fn transpose<S: Simd>(
        self,
        s: S,
        tile: usize,
        cols: Range<usize>,
        kt: &mut [f32],
        eight: &mut [f32],
    ) {
        let d = self.shape.head_dim;
        for col in cols.step_by(8) {
            let positions = tile + col..tile + col + 8;
            let run = self.runs(Side::K, positions.clone()).next();
            let whole = run.filter(|run| run.len == 8 && d.is_multiple_of(8));
            let (x, stride) = match whole {
                Some(run) => (run.x, run.stride),
                None => {
                    self.gather(Side::K, positions, eight);
                    (&*eight, padded(d))
                }
            };
            for i in (0..d).step_by(8) {
                s.transpose8(&x[i..], stride, &mut kt[i * KEYS + col..], KEYS);
            }
        }
    }
}

/// Consecutive queries and the query heads of one key head: scratch holds one row for each
/// (query, head), heads fastest.
#[derive(Clone, Copy, Debug)]
pub struct QueryBlock {
    /// Row of the first query in the packed batch.
    pub start: usize,
    /// Number of queries.
    pub len: usize,
    /// Position of the first query.
    pub position0: usize,
    /// The key head.
    pub kv_head: usize,
}

impl QueryBlock {
    /// Number of rows in scratch.
    pub fn rows(&self, shape: &AttentionShape) -> usize {
        self.len * shape.group()
    }

    /// The positions that a row sees.
    pub fn visible(&self, shape: &AttentionShape, row: usize) -> Range<usize> {
        shape.visible(self.position0 + row / shape.group())
    }

    /// The positions that any of some rows see.
    pub fn seen(&self, shape: &AttentionShape, rows: Range<usize>) -> Range<usize> {
        self.visible(shape, rows.start).start..self.visible(shape, rows.end - 1).end
    }

    /// Where a query's heads lie in a row of queries.
    pub fn source(&self, shape: &AttentionShape, query: usize) -> Range<usize> {
        let width = shape.group() * shape.head_dim;
        let at = ((self.start + query) * shape.kv_heads + self.kv_head) * width;
        at..at + width
    }

    /// Copies the block's part of `x`, `[N, heads * head_dim]`, to rows in scratch.
    pub fn gather(&self, shape: &AttentionShape, x: &[f32], rows: &mut [f32]) {
        let (d, stride) = (shape.head_dim, padded(shape.head_dim));
        let mut rows = rows.chunks_exact_mut(stride);
        for query in 0..self.len {
            let heads = x[self.source(shape, query)].chunks_exact(d);
            heads.zip(&mut rows).for_each(|(head, row)| row[..d].copy_from_slice(head));
        }
    }
}

/// The part of a tile that some rows see, from the tile's first key on; empty if none.
pub fn within_tile(seen: &Range<usize>, tile: usize) -> Range<usize> {
    let start = seen.start.saturating_sub(tile).min(KEYS);
    start..seen.end.saturating_sub(tile).min(KEYS).max(start)
}

/// Widens a part of a tile to whole vectors.
pub fn whole_vectors(part: &Range<usize>) -> Range<usize> {
    part.start / LANES * LANES..part.end.next_multiple_of(LANES)
}

/// Overwrites what a row does not see in the columns `cols` of a tile.
pub fn fill_hidden(x: &mut [f32], cols: &Range<usize>, visible: &Range<usize>, value: f32) {
    let from = visible.start.clamp(cols.start, cols.end) - cols.start;
    let to = visible.end.clamp(cols.start, cols.end) - cols.start;
    x[..from].fill(value);
    x[to..].fill(value);
}
