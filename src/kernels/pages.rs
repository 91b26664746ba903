//! Where cached keys and values lie: pages of [`PAGE`] positions, in the order that attention reads.
//!
//! A page holds, for each layer and key head, the keys `[PAGE / 16, head_dim, 16]` (transposed, as
//! attention multiplies them; what is there of a page lies in one piece) and then the values
//! `[PAGE, padded head_dim]`. Pages start at multiples of `PAGE` in the chain, as tiles do.

use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::attention_tile::{KEYS, padded};
use super::lanes::LANES;
use super::parallel::for_each;

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
            Page::F32(page) => shape.write(page, layer, at, (k, v), |x| x),
            Page::Bf16(page) => shape.write(page, layer, at, (k, v), bf16::from_f32),
        }
    }

    /// The numbers `part` as `f32`, of which `used` are read: where they lie, or widened into `room`.
    #[inline(always)]
    pub(super) fn part<'a>(
        &'a self,
        part: Range<usize>,
        used: Range<usize>,
        room: &'a mut [f32],
    ) -> &'a [f32] {
        match self {
            Page::F32(page) => &page[part],
            Page::Bf16(page) => {
                let from = page[part][used.clone()].reinterpret_cast();
                for (to, x) in room[used].iter_mut().zip(from) {
                    *to = f32::from_bits(u32::from(*x) << 16);
                }
                room
            }
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

    fn write<T: Copy>(
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
            for (i, row) in of_head(k).enumerate() {
                let (vector, lane) = ((at + i) / LANES, (at + i) % LANES);
                let column = keys[vector * LANES * d + lane..].iter_mut().step_by(LANES);
                column.zip(row).for_each(|(to, x)| *to = stored(*x));
            }
            let values = page[self.values(layer, head)].chunks_exact_mut(width).skip(at);
            for (to, row) in values.zip(of_head(v)) {
                to.iter_mut().zip(row).for_each(|(to, x)| *to = stored(*x));
            }
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

/// The columns `part` of each row of `x`.
fn rows_of(x: &[f32], width: usize, part: Range<usize>) -> impl Iterator<Item = &[f32]> {
    x.chunks_exact(width).map(move |row| &row[part.clone()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_land_in_their_layer_head_and_position() {
        for dtype in [PageDtype::F32, PageDtype::Bf16] {
            let shape = PageShape { layers: 2, kv_heads: 2, head_dim: 3, dtype };
            let mut page = Page::new(shape);
            let k: Vec<f32> = (1..=12).map(|i| i as f32).collect();
            let v: Vec<f32> = k.iter().map(|x| x + 100.0).collect();
            page.write(shape, 1, PAGE - 2, &k, &v);
            let mut room = vec![0.0; shape.len()];
            let page = page.part(0..shape.len(), 0..shape.len(), &mut room);
            let keys = &page[shape.keys(1, 1)];
            let last = &keys[(PAGE - LANES) * 3..];
            assert_eq!(
                [last[LANES - 2], last[2 * LANES - 2], last[3 * LANES - 1]],
                [4.0, 5.0, 12.0]
            );
            let values = &page[shape.values(1, 0)];
            assert_eq!(values[(PAGE - 1) * 16..][..4], [107.0, 108.0, 109.0, 0.0]);
            assert_eq!(page.iter().filter(|x| **x != 0.0).count(), 24);
        }
    }

    #[test]
    fn pages_of_bf16_hold_the_nearest_numbers() {
        let shape = PageShape { layers: 1, kv_heads: 1, head_dim: 2, dtype: PageDtype::Bf16 };
        let mut page = Page::new(shape);
        let (k, v) = ([1.0 + 1.0 / 256.0, 3.0e-5], [1.0 + 3.0 / 256.0, -0.1]);
        page.write(shape, 0, 0, &k, &v);
        let mut room = vec![0.0; shape.len()];
        let page = page.part(0..shape.len(), 0..shape.len(), &mut room);
        let nearest = |x: f32| bf16::from_f32(x).to_f32();
        assert_eq!([page[0], page[LANES]], k.map(nearest));
        assert_eq!(page[shape.values(0, 0)][..2], v.map(nearest));
        assert_eq!([page[0], page[shape.values(0, 0).start]], [1.0, 1.0 + 4.0 / 256.0]);
    }
}
