//! Where cached keys and values lie: pages of [`PAGE`] positions, in the order that attention reads.
//!
//! A page holds, for each layer and key head, the keys `[PAGE / 16, head_dim, 16]` (transposed, as
//! attention multiplies them; what is there of a page lies in one piece) and then the values
//! `[PAGE, padded head_dim]`. Pages start at multiples of `PAGE` in the chain, as tiles do.

use std::ops::Range;

use super::attention_tile::{KEYS, padded};
use super::lanes::LANES;
use super::parallel::for_each;

/// Positions in a page: the keys of one tile.
pub const PAGE: usize = KEYS;

/// How a page is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    /// Number of layers.
    pub layers: usize,
    /// Key heads of a layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl PageShape {
    /// Floats in a page.
    pub fn len(&self) -> usize {
        self.layers * self.kv_heads * self.head_len()
    }

    /// Whether a page holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn head_len(&self) -> usize {
        PAGE * (self.head_dim + padded(self.head_dim))
    }

    /// Where the keys of a head of a layer lie, `[PAGE / 16, head_dim, 16]`.
    pub(super) fn keys(&self, layer: usize, head: usize) -> Range<usize> {
        let start = (layer * self.kv_heads + head) * self.head_len();
        start..start + PAGE * self.head_dim
    }

    /// Where the values of a head of a layer lie, `[PAGE, padded]`.
    pub(super) fn values(&self, layer: usize, head: usize) -> Range<usize> {
        let start = self.keys(layer, head).end;
        start..start + PAGE * padded(self.head_dim)
    }

    /// Writes rows of `k` and `v`, `[rows, kv_heads * head_dim]`, to a layer of a page from the
    /// position `at` of the page on. Panics if they do not fit.
    pub fn write(&self, page: &mut [f32], layer: usize, at: usize, k: &[f32], v: &[f32]) {
        let (d, width) = (self.head_dim, padded(self.head_dim));
        assert!(k.len() == v.len() && at + k.len() / (self.kv_heads * d) <= PAGE);
        for head in 0..self.kv_heads {
            let of_head = |x| rows_of(x, self.kv_heads * d, head * d..(head + 1) * d);
            let keys = &mut page[self.keys(layer, head)];
            for (i, row) in of_head(k).enumerate() {
                let (vector, lane) = ((at + i) / LANES, (at + i) % LANES);
                let column = keys[vector * LANES * d + lane..].iter_mut().step_by(LANES);
                column.zip(row).for_each(|(to, x)| *to = *x);
            }
            let values = page[self.values(layer, head)].chunks_exact_mut(width).skip(at);
            values.zip(of_head(v)).for_each(|(to, row)| to[..d].copy_from_slice(row));
        }
    }
}

/// Rows of keys and values that go to one page.
#[derive(Clone, Debug)]
pub struct PageRows {
    /// Number of the page.
    pub page: u32,
    /// Position in the page of the first row.
    pub at: usize,
    /// The rows.
    pub rows: Range<usize>,
}

/// Writes rows of `k` and `v`, `[N, kv_heads * head_dim]`, to a layer of their pages, in parallel.
///
/// # Panics
/// If a page is missing or named twice, or rows do not fit.
pub fn write_rows(
    pages: &mut [Box<[f32]>],
    shape: PageShape,
    layer: usize,
    mut parts: Vec<PageRows>,
    (k, v): (&[f32], &[f32]),
) {
    parts.sort_unstable_by_key(|part| part.page);
    let width = shape.kv_heads * shape.head_dim;
    let mut rest = pages.iter_mut().enumerate();
    let mut page = |number: u32| rest.find(|(i, _)| *i == number as usize).map(|(_, page)| page);
    let parts: Vec<_> = parts.into_iter().map(|part| (page(part.page), part)).collect();
    for_each(parts.into_iter(), |(page, part)| {
        let rows = part.rows.start * width..part.rows.end * width;
        let Some(page) = page else { panic!("page {} is missing or named twice", part.page) };
        shape.write(page, layer, part.at, &k[rows.clone()], &v[rows]);
    });
}

/// The columns `part` of each row of `x`.
fn rows_of(x: &[f32], width: usize, part: Range<usize>) -> impl Iterator<Item = &[f32]> {
    x.chunks_exact(width).map(move |row| &row[part.clone()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_land_in_their_layer_head_and_position() {
        let shape = PageShape { layers: 2, kv_heads: 2, head_dim: 3 };
        let mut page = vec![0.0; shape.len()];
        let k: Vec<f32> = (1..=12).map(|i| i as f32).collect();
        let v: Vec<f32> = k.iter().map(|x| x + 100.0).collect();
        shape.write(&mut page, 1, PAGE - 2, &k, &v);
        let keys = &page[shape.keys(1, 1)];
        let last = &keys[(PAGE - LANES) * 3..];
        assert_eq!([last[LANES - 2], last[2 * LANES - 2], last[3 * LANES - 1]], [4.0, 5.0, 12.0]);
        let values = &page[shape.values(1, 0)];
        assert_eq!(values[(PAGE - 1) * 16..][..4], [107.0, 108.0, 109.0, 0.0]);
        assert_eq!(page.iter().filter(|x| **x != 0.0).count(), 24);
    }
}
