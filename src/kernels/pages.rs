//! Where cached keys and values lie: pages of [`PAGE`] positions, in the order that attention reads.
//!
//! A page holds, for each layer and key head, the keys `[PAGE / 16, head_dim, 16]` (transposed, as
//! attention multiplies them; what is there of a page lies in one piece) and then the values
//! `[PAGE, padded head_dim]`. In bf16 two rows lie together, column by column: keys `[PAGE / 16,
//! head_dim / 2, 16, 2]`, values `[PAGE / 2, padded head_dim, 2]`. A `head_dim` of keys is rounded up to whole
//! pairs. Pages start at multiples of `PAGE` in the chain, as tiles do.

use std::ops::Range;

use half::bf16;

use super::attention_tile::{KEYS, padded};
use super::lanes::LANES;
use super::parallel::for_each;
use super::slices::widened_bf16;

/// Positions in a page: the keys of one tile.
pub const PAGE: usize = KEYS;

/// The numbers of a page.
#[derive(Clone, Debug, PartialEq)]
pub enum Page {
    /// As they are computed.
    F32(Box<[f32]>),
    /// Rounded to the nearest bf16.
    Bf16(Box<[bf16]>),
}

/// How the numbers of a page are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageDtype {
    /// [`Page::F32`].
    #[default]
    F32,
    /// [`Page::Bf16`].
    Bf16,
}

impl PageDtype {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            PageDtype::F32 => size_of::<f32>(),
            PageDtype::Bf16 => size_of::<bf16>(),
        }
    }
}

impl Page {
    /// A page of zeros.
    pub fn new(shape: PageShape) -> Self {
        match shape.dtype {
            PageDtype::F32 => Page::F32(vec![0.0; shape.len()].into()),
            PageDtype::Bf16 => Page::Bf16(vec![bf16::ZERO; shape.len()].into()),
        }
    }

    /// Takes over the numbers of another page.
    pub fn copy_from(&mut self, from: &Self) {
        match (self, from) {
            (Page::F32(to), Page::F32(from)) => to.copy_from_slice(from),
            (Page::Bf16(to), Page::Bf16(from)) => to.copy_from_slice(from),
            (to, from) => to.clone_from(from),
        }
    }

    /// Writes rows of `k` and `v`, `[rows, kv_heads * head_dim]`, to a layer from the position `at`
    /// of the page on.
    ///
    /// # Panics
    /// If they do not fit, or the page is of another shape.
    pub fn write(&mut self, shape: PageShape, layer: usize, at: usize, k: &[f32], v: &[f32]) {
        match self {
            Page::F32(page) => shape.write::<_, 1>(page, layer, at, (k, v), |x| x),
            Page::Bf16(page) => shape.write::<_, 2>(page, layer, at, (k, v), bf16::from_f32),
        }
    }

    /// The rows that [`Page::write`] has written to a layer from the position `at` on, into `k` and `v`.
    ///
    /// # Panics
    /// If they are more than the page has, or it is of another shape.
    pub fn read(&self, shape: PageShape, layer: usize, at: usize, k: &mut [f32], v: &mut [f32]) {
        match self {
            Page::F32(page) => shape.read::<_, 1>(page, layer, at, (k, v), |x| x),
            Page::Bf16(page) => shape.read::<_, 2>(page, layer, at, (k, v), widened_bf16),
        }
    }

    /// Where its numbers lie in memory.
    pub(super) fn address(&self) -> usize {
        match self {
            Page::F32(page) => page.as_ptr().addr(),
            Page::Bf16(page) => page.as_ptr().addr(),
        }
    }
}

/// How a page is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    /// Number of layers.
    pub layers: usize,
    /// Key heads of a layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How its numbers are stored.
    pub dtype: PageDtype,
}

impl PageShape {
    /// Numbers in a page.
    pub fn len(&self) -> usize {
        self.layers * self.kv_heads * self.head_len()
    }

    /// Whether a page holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn head_len(&self) -> usize {
        PAGE * (self.key_len() + padded(self.head_dim))
    }

    /// Numbers of a key: `head_dim`, rounded up to whole pairs.
    pub(super) fn key_len(&self) -> usize {
        self.head_dim.next_multiple_of(2)
    }

    /// Where the keys of a head of a layer lie.
    pub(super) fn keys(&self, layer: usize, head: usize) -> Range<usize> {
        let start = (layer * self.kv_heads + head) * self.head_len();
        start..start + PAGE * self.key_len()
    }

    /// Where the values of a head of a layer lie.
    pub(super) fn values(&self, layer: usize, head: usize) -> Range<usize> {
        let start = self.keys(layer, head).end;
        start..start + PAGE * padded(self.head_dim)
    }

    /// Writes rows to a page in which `TOGETHER` rows lie together.
    fn write<T: Copy, const TOGETHER: usize>(
        &self,
        page: &mut [T],
        layer: usize,
        at: usize,
        (k, v): (&[f32], &[f32]),
        stored: impl Fn(f32) -> T,
    ) {
        let (d, width) = (self.head_dim, padded(self.head_dim));
        assert!(k.len() == v.len() && at + k.len() / (self.kv_heads * d) <= PAGE);
        for head in 0..self.kv_heads {
            let of_head = |x| rows_of(x, self.kv_heads * d, head * d..(head + 1) * d);
            let keys = &mut page[self.keys(layer, head)];
            for (position, row) in (at..).zip(of_head(k)) {
                let vector = &mut keys[position / LANES * LANES * self.key_len()..];
                for (i, x) in row.iter().enumerate() {
                    vector[place::<TOGETHER>(i, position % LANES, LANES)] = stored(*x);
                }
            }
            let values = &mut page[self.values(layer, head)];
            for (position, row) in (at..).zip(of_head(v)) {
                for (i, x) in row.iter().enumerate() {
                    values[place::<TOGETHER>(position, i, width)] = stored(*x);
                }
            }
        }
    }

    /// Reads what [`PageShape::write`] has written.
    fn read<T: Copy, const TOGETHER: usize>(
        &self,
        page: &[T],
        layer: usize,
        at: usize,
        (k, v): (&mut [f32], &mut [f32]),
        widened: impl Fn(T) -> f32,
    ) {
        let (d, width) = (self.head_dim, padded(self.head_dim));
        let all = self.kv_heads * d;
        assert!(k.len() == v.len() && at + k.len() / all <= PAGE);
        for head in 0..self.kv_heads {
            let (keys, values) = (&page[self.keys(layer, head)], &page[self.values(layer, head)]);
            let rows = k.chunks_exact_mut(all).zip(v.chunks_exact_mut(all));
            for (position, (k, v)) in (at..).zip(rows) {
                let vector = &keys[position / LANES * LANES * self.key_len()..];
                for (i, x) in k[head * d..(head + 1) * d].iter_mut().enumerate() {
                    *x = widened(vector[place::<TOGETHER>(i, position % LANES, LANES)]);
                }
                for (i, x) in v[head * d..(head + 1) * d].iter_mut().enumerate() {
                    *x = widened(values[place::<TOGETHER>(position, i, width)]);
                }
            }
        }
    }
}

/// Where a number lies among rows of `width` numbers of which `TOGETHER` lie together, column by column.
#[inline(always)]
fn place<const TOGETHER: usize>(row: usize, column: usize, width: usize) -> usize {
    row / TOGETHER * TOGETHER * width + column * TOGETHER + row % TOGETHER
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
    pages: &mut [Page],
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
        page.write(shape, layer, part.at, &k[rows.clone()], &v[rows]);
    });
}

/// Reads rows of a layer from their pages into `k` and `v`, `[N, kv_heads * head_dim]`, in parallel: `parts` lie one
/// after the other there.
///
/// # Panics
/// If a part does not follow the one before, its page has not so many rows, or rows are missing at the end.
pub fn read_rows(
    parts: Vec<(&Page, PageRows)>,
    shape: PageShape,
    layer: usize,
    (k, v): (&mut [f32], &mut [f32]),
) {
    let width = shape.kv_heads * shape.head_dim;
    let (mut rest, mut done) = ((k, v), 0);
    let parts = parts.into_iter().map(|(page, part)| {
        assert!(part.rows.start == done, "rows leave a gap or overlap");
        done = part.rows.end;
        let (k, v) = std::mem::take(&mut rest);
        let (k, more_k) = k.split_at_mut(part.rows.len() * width);
        let (v, more_v) = v.split_at_mut(part.rows.len() * width);
        rest = (more_k, more_v);
        (page, part.at, k, v)
    });
    let parts: Vec<_> = parts.collect();
    assert!(rest.0.is_empty() && rest.1.is_empty(), "rows are missing");
    for_each(parts.into_iter(), |(page, at, k, v)| page.read(shape, layer, at, k, v));
}

/// The columns `part` of each row of `x`.
fn rows_of(x: &[f32], width: usize, part: Range<usize>) -> impl Iterator<Item = &[f32]> {
    x.chunks_exact(width).map(move |row| &row[part.clone()])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of a page as `f32`.
    fn widened(page: &Page) -> Vec<f32> {
        match page {
            Page::F32(page) => page.to_vec(),
            Page::Bf16(page) => page.iter().map(|x| x.to_f32()).collect(),
        }
    }

    #[test]
    fn rows_land_in_their_layer_head_and_position() {
        for (dtype, last_keys, last_values) in [
            (PageDtype::F32, [14, 16 + 14, 32 + 15], [16, 17, 18]),
            (PageDtype::Bf16, [28, 29, 32 + 30], [1, 3, 5]),
        ] {
            let shape = PageShape { layers: 2, kv_heads: 2, head_dim: 3, dtype };
            let mut page = Page::new(shape);
            let k: Vec<f32> = (1..=12).map(|i| i as f32).collect();
            let v: Vec<f32> = k.iter().map(|x| x + 100.0).collect();
            page.write(shape, 1, PAGE - 2, &k, &v);
            let page = widened(&page);
            let keys = &page[shape.keys(1, 1)];
            let last = &keys[keys.len() - LANES * shape.key_len()..];
            assert_eq!(last_keys.map(|i| last[i]), [4.0, 5.0, 12.0]);
            let values = &page[shape.values(1, 0)];
            let last = &values[values.len() - 2 * LANES..];
            assert_eq!(last_values.map(|i| last[i]), [107.0, 108.0, 109.0]);
            assert_eq!(page.iter().filter(|x| **x != 0.0).count(), 24);
        }
    }

    #[test]
    fn rows_are_read_as_they_were_written() {
        for (dtype, head_dim) in [(PageDtype::F32, 20), (PageDtype::Bf16, 20), (PageDtype::Bf16, 5)]
        {
            let shape = PageShape { layers: 2, kv_heads: 3, head_dim, dtype };
            let (rows, width) = (PAGE + 9, 3 * head_dim);
            let number = |i: usize| ((i * 37 % 256) as f32 - 128.0) / 64.0;
            let k: Vec<f32> = (0..rows * width).map(number).collect();
            let v: Vec<f32> = k.iter().map(|x| x / 2.0).collect();
            let mut pages = [Page::new(shape), Page::new(shape)];
            // from position 58 of one page, then a whole other one, then more of the first
            let parts = [(0, 58, 0..6), (1, 0, 6..6 + PAGE), (0, 40, 6 + PAGE..rows)];
            let part = |(page, at, rows): (u32, usize, Range<usize>)| PageRows { page, at, rows };
            for (page, at, rows) in parts.clone() {
                let part = rows.start * width..rows.end * width;
                pages[page as usize].write(shape, 1, at, &k[part.clone()], &v[part]);
            }
            let mut read = (vec![9.0; k.len()], vec![9.0; v.len()]);
            let parts = parts.map(|rows| (&pages[rows.0 as usize], part(rows)));
            read_rows(parts.to_vec(), shape, 1, (&mut read.0, &mut read.1));
            assert_eq!(read, (k, v));
        }
    }

    #[test]
    fn pages_of_bf16_hold_the_nearest_numbers() {
        let shape = PageShape { layers: 1, kv_heads: 1, head_dim: 2, dtype: PageDtype::Bf16 };
        let mut page = Page::new(shape);
        let (k, v) = ([1.0 + 1.0 / 256.0, 3.0e-5], [1.0 + 3.0 / 256.0, -0.1]);
        page.write(shape, 0, 0, &k, &v);
        let page = widened(&page);
        let nearest = |x: f32| bf16::from_f32(x).to_f32();
        let values = &page[shape.values(0, 0)];
        assert_eq!([page[0], page[1], values[0], values[2]], [k[0], k[1], v[0], v[1]].map(nearest));
        assert_eq!([page[0], values[0]], [1.0, 1.0 + 4.0 / 256.0]);
    }
}
