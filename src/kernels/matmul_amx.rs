//! Products of bf16 operands on AMX tiles: one instruction adds the products of thirty-two links to
//! 16 x 16 sums.
//!
//! An element is the bias (or zero) plus, one after the other, the instruction's sums over
//! thirty-two k (before low-rank terms), so a row's bits do not depend on the batch. `medium` multiplies rounded operands.
//! `high` cuts each operand that bf16 does not hold into a half that is rounded and a half that
//! rounding lost, rounded too, and adds the products of the halves but for that of the two small
//! ones.

use std::ops::Range;

use super::amx_tiles::{A, B, C, ROW_BYTES, Shapes, TILE_ROWS, Tiles};
use super::dispatch::CpuLevel;
use super::lanes::LANES;
use super::matmul::Axis;
use super::matmul_amx_fill::{Fill, fill_halves, fill_rounded, split_rows};
use super::matmul_form::{Form, Panels, Shared, Step};
use super::matmul_product::Product;
use super::matmul_tile::Strip;
use super::pack::{PairRow, Storage, uninit_rows};
use super::parallel::for_each;
use super::prefetch;

/// Links that one instruction multiplies.
pub(super) const CHUNK: usize = 32;
/// Links of a block at most. The fewer blocks, the less often sums are read and written; the panels
/// of a block stay in the first-level cache. An element adds chunk after chunk, wherever blocks end.
const MOST_LINKS: usize = 640;
/// Rows that are multiplied together.
pub(super) const BLOCK_ROWS: usize = 2 * TILE_ROWS;
/// A tile of a panel: thirty-two links.
type PanelTile = [PairRow; CHUNK / 2];

/// Neighbouring links of a row in bf16 bits: rounded, and in a second part what rounding lost.
/// The links after a row's last are zero.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Chunk<const PARTS: usize>(pub(super) [[u16; CHUNK]; PARTS]);

impl<const PARTS: usize> Form for Chunk<PARTS> {
    type Row = [PanelTile; PARTS];
    const ZERO_ROW: Self::Row = [[PairRow::ZERO; CHUNK / 2]; PARTS];
    const LINKS: usize = CHUNK;
    const ROW_UNIT: usize = BLOCK_ROWS;
    const MOST_LINKS: usize = MOST_LINKS;

    fn block_links(k: usize) -> usize {
        k.div_ceil(k.div_ceil(MOST_LINKS)).next_multiple_of(CHUNK)
    }

    /// An odd number of cache lines apart, the rows of a tile lie in different sets of the cache.
    fn row_elements(links: usize) -> usize {
        match links {
            0 => 0,
            _ => links.div_ceil(CHUNK) | 1,
        }
    }

    fn in_place(_: &[f32]) -> Option<&[Self]> {
        None
    }

    fn copy(level: CpuLevel, x: &[f32], stride: usize, width: usize, into: &mut [Self]) {
        split_rows(level, x, stride, width, into);
    }

    fn share(job: &Product, k: &Range<usize>) -> Vec<PairRow> {
        match &job.w.storage {
            _ if job.axis == Axis::Output => Vec::new(),
            Storage::F32(_) if PARTS == 2 => fill_all::<2>(job, k, fill_halves),
            _ => fill_all::<1>(job, k, fill_rounded),
        }
    }

    fn step(job: &Product, step: Step<Self>) {
        let whole = step.kc.is_multiple_of(CHUNK);
        match &job.w.storage {
            Storage::Bf16(w) if job.axis == Axis::Output && whole => {
                let panel = job.k.div_ceil(2);
                let rows = &w[step.panel * panel + step.k0 / 2..];
                let panels = Panels { b: rows.as_ptr(), stride: panel, stored: true };
                // SAFETY: columns_of gives valid strips.
                let tiles = |level, strip: &mut _| unsafe { multiply::<PARTS, 1>(level, strip) };
                // SAFETY: from link k0 of its first panel on, the storage holds all of the group.
                unsafe { job.columns_of(&step, panels, tiles) }
            }
            Storage::F32(_) if PARTS == 2 => filled::<PARTS, 2>(job, step, fill_halves),
            _ => filled::<PARTS, 1>(job, step, fill_rounded),
        }
    }
}

/// Multiplies panels that `fill` writes in `W` parts, into scratch or before, for all tasks.
fn filled<const P: usize, const W: usize>(job: &Product, mut step: Step<Chunk<P>>, fill: Fill) {
    // SAFETY: columns_of gives valid strips.
    let tiles = |level, strip: &mut _| unsafe { multiply::<P, W>(level, strip) };
    let links = step.k0..step.k0 + step.kc;
    if let Shared { panels: shared @ [_, ..], k } = step.shared {
        let stride = tile_rows::<W>(k.len());
        let start = step.panel * stride + tile_rows::<W>(step.k0 - k.start);
        let panels = Panels { b: shared[start..].as_ptr(), stride, stored: true };
        // SAFETY: from link k0 of its first panel on, all of the group has been filled.
        return unsafe { job.columns_of(&step, panels, tiles) };
    }
    let rows = tile_rows::<W>(step.kc);
    let (panel, panels) = (step.panel, step.panels);
    let scratch = step.room().as_flattened_mut().as_flattened_mut();
    for (i, into) in scratch.chunks_mut(rows).take(panels).enumerate() {
        fill(job.level, job.w, job.axis, panel + i, links.clone(), into);
    }
    let b = step.scratch.as_flattened().as_flattened().as_ptr();
    let scratch = Panels { b, stride: rows, stored: false };
    // SAFETY: the group's panels have just been filled.
    unsafe { job.columns_of(&step, scratch, tiles) }
}

/// Rows of the tiles of so many links in `W` parts.
const fn tile_rows<const W: usize>(links: usize) -> usize {
    links.div_ceil(CHUNK) * W * CHUNK / 2
}

/// Fills all panels of a span of links in `W` parts, as [`filled`] reads them.
fn fill_all<const W: usize>(job: &Product, k: &Range<usize>, fill: Fill) -> Vec<PairRow> {
    let panel_rows = tile_rows::<W>(k.len());
    // SAFETY: every row of every panel is written.
    let mut rows = unsafe { uninit_rows(job.panels() * panel_rows) };
    for_each(rows.chunks_mut(panel_rows).enumerate(), |(panel, into)| {
        fill(job.level, job.w, job.axis, panel, k.clone(), into);
    });
    rows
}

/// Computes a strip of rows in `P` parts times panels in `W` parts, whose tiles lie one after the
/// other. `k` is rounded up to whole tiles.
///
/// # Safety
/// As [`multiply`](super::matmul_tile::multiply), and
/// [`multiplies_tiles`](CpuLevel::multiplies_tiles) holds for `level`.
pub(super) unsafe fn multiply<const P: usize, const W: usize>(
    level: CpuLevel,
    strip: &Strip<Chunk<P>, PairRow>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match level {
            #[cfg(test)]
            CpuLevel::Emulated => {
                rows::<_, P, W>(&mut super::amx_emulated::Emulated::default(), strip);
            }
            #[cfg(target_arch = "x86_64")]
            _ => rows::<_, P, W>(&mut super::amx_tiles::Amx::new(), strip),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("only x86-64 has tiles"),
        }
    }
}

/// # Safety
/// As [`multiply`].
unsafe fn rows<T: Tiles, const P: usize, const W: usize>(
    tiles: &mut T,
    strip: &Strip<Chunk<P>, PairRow>,
) {
    let mut shaped = [0; 2];
    for i in (0..strip.rows).step_by(BLOCK_ROWS) {
        let left = strip.rows - i;
        let first = left.min(TILE_ROWS);
        let blocks = [first, (left - first).min(TILE_ROWS)];
        // SAFETY: the block is some rows of a valid strip.
        unsafe {
            if blocks != shaped {
                tiles.configure(&Shapes::new(blocks));
                shaped = blocks;
            }
            let block = Strip {
                rows: first + blocks[1],
                a: strip.a.add(i * strip.lda),
                init: strip.init.add(i * strip.ldi),
                y: strip.y.add(i * strip.ldy),
                ahead: if i == 0 { strip.ahead } else { 0 },
                ..*strip
            };
            block.compute::<T, W>(tiles);
        }
    }
}

/// Does `work` for the sums of each block of rows `I` and panel `J` that a strip has.
macro_rules! each_sum {
    ($strip:ident, |$i:ident, $j:ident| $work:expr) => {
        each_sum!(@ $i 0, $j 0, $work);
        if $strip.panels == 2 {
            each_sum!(@ $i 0, $j 1, $work);
        }
        if $strip.rows > TILE_ROWS {
            each_sum!(@ $i 1, $j 0, $work);
            if $strip.panels == 2 {
                each_sum!(@ $i 1, $j 1, $work);
            }
        }
    };
    (@ $i:ident $block:literal, $j:ident $panel:literal, $work:expr) => {{
        const $i: usize = $block;
        const $j: usize = $panel;
        $work
    }};
}

impl<const P: usize> Strip<Chunk<P>, PairRow> {
    /// # Safety
    /// As [`multiply`]; there are at most [`BLOCK_ROWS`], whose shapes the tiles have.
    #[inline(always)]
    unsafe fn compute<T: Tiles, const W: usize>(self, tiles: &mut T) {
        // SAFETY: all offsets are inside the shapes stated by the fields.
        unsafe {
            let at = |i: usize, j: usize, ld: usize| i * TILE_ROWS * ld + j * LANES;
            let (ldi, ldy) = (self.ldi * size_of::<f32>(), self.ldy * size_of::<f32>());
            each_sum!(self, |I, J| {
                tiles.load::<{ C[I][J] }>(self.init.add(at(I, J, self.ldi)).cast(), ldi);
            });
            for k in 0..self.k.div_ceil(CHUNK) {
                let b = self.b.add(k * W * CHUNK / 2);
                self.load_panels(tiles, b);
                for part in (0..P).rev() {
                    self.load_rows(tiles, k, part);
                    each_sum!(self, |I, J| tiles.multiply::<{ C[I][J] }, { A[I] }, { B[J] }>());
                }
                if W == 2 {
                    // the rows are still those of the rounded half
                    self.load_panels(tiles, b.add(CHUNK / 2));
                    each_sum!(self, |I, J| tiles.multiply::<{ C[I][J] }, { A[I] }, { B[J] }>());
                }
                if self.ahead > 0 {
                    self.prefetch(b.wrapping_add(self.ahead), W * CHUNK / 2);
                }
            }
            each_sum!(self, |I, J| {
                tiles.store::<{ C[I][J] }>(self.y.add(at(I, J, self.ldy)).cast(), ldy);
            });
        }
    }

    /// # Safety
    /// As [`Self::compute`]; chunk `k` has so many parts.
    #[inline(always)]
    unsafe fn load_rows<T: Tiles>(self, tiles: &mut T, k: usize, part: usize) {
        let stride = self.lda * size_of::<Chunk<P>>();
        // SAFETY: the caller's promise.
        unsafe {
            let a = self.a.add(k).cast::<u8>().add(part * ROW_BYTES);
            tiles.load::<{ A[0] }>(a, stride);
            if self.rows > TILE_ROWS {
                tiles.load::<{ A[1] }>(a.add(TILE_ROWS * stride), stride);
            }
        }
    }

    /// # Safety
    /// As [`Self::compute`]; `b` is a tile of the first panel.
    #[inline(always)]
    unsafe fn load_panels<T: Tiles>(self, tiles: &mut T, b: *const PairRow) {
        // SAFETY: the caller's promise.
        unsafe {
            tiles.load::<{ B[0] }>(b.cast(), ROW_BYTES);
            if self.panels == 2 {
                tiles.load::<{ B[1] }>(b.add(self.panel_stride).cast(), ROW_BYTES);
            }
        }
    }

    /// Brings `rows` of each panel closer.
    #[inline(always)]
    fn prefetch(self, b: *const PairRow, rows: usize) {
        for panel in 0..self.panels {
            let b = b.wrapping_add(panel * self.panel_stride);
            (0..rows).for_each(|row| prefetch::to_first(b.wrapping_add(row).cast()));
        }
    }
}
