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
use super::lanes::{Kernel, LANES, Simd};
use super::matmul::Axis;
use super::matmul_fill::{fill_pairs, fill_panel};
use super::matmul_form::{Form, Panels, Step};
use super::matmul_product::Product;
use super::matmul_tile::Strip;
use super::pack::{PackedMatrix, PairRow, RowF32, Storage};
use super::prefetch;

/// Links that one instruction multiplies.
const CHUNK: usize = 32;
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
        level.run(SplitRows { x, stride, width, into });
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

/// Writes links of a panel of the weight into tiles.
type Fill = fn(CpuLevel, &PackedMatrix, Axis, usize, Range<usize>, &mut [PairRow]);

/// Multiplies panels that `fill` writes into scratch in `W` parts.
fn filled<const P: usize, const W: usize>(job: &Product, mut step: Step<Chunk<P>>, fill: Fill) {
    let rows = step.kc.div_ceil(CHUNK) * W * CHUNK / 2;
    let links = step.k0..step.k0 + step.kc;
    let (panel, panels) = (step.panel, step.panels);
    let scratch = step.room().as_flattened_mut().as_flattened_mut();
    for (i, into) in scratch.chunks_mut(rows).take(panels).enumerate() {
        fill(job.level, job.w, job.axis, panel + i, links.clone(), into);
    }
    let b = step.scratch.as_flattened().as_flattened().as_ptr();
    let scratch = Panels { b, stride: rows, stored: false };
    // SAFETY: columns_of gives valid strips.
    let tiles = |level, strip: &mut _| unsafe { multiply::<P, W>(level, strip) };
    // SAFETY: the group's panels have just been filled.
    unsafe { job.columns_of(&step, scratch, tiles) }
}

/// The links `k` rounded, padded with zeros to whole tiles.
fn fill_rounded(
    level: CpuLevel,
    w: &PackedMatrix,
    axis: Axis,
    panel: usize,
    k: Range<usize>,
    into: &mut [PairRow],
) {
    into[k.len().div_ceil(2)..].fill(PairRow::ZERO);
    fill_pairs(level, w, axis, panel, k, into);
}

/// As [`fill_rounded`], each tile followed by one of what rounding lost.
fn fill_halves(
    level: CpuLevel,
    w: &PackedMatrix,
    axis: Axis,
    panel: usize,
    k: Range<usize>,
    into: &mut [PairRow],
) {
    for (k0, into) in k.clone().step_by(CHUNK).zip(into.as_chunks_mut().0) {
        let mut rows = [RowF32([0.0; LANES]); CHUNK];
        fill_panel(level, w, axis, panel, k0..k.end.min(k0 + CHUNK), &mut rows);
        level.run(SplitPanel { rows, into });
    }
}

/// Cuts the first `width` columns of rows of `x`, `stride` apart, into parts.
struct SplitRows<'a, const PARTS: usize> {
    x: &'a [f32],
    stride: usize,
    width: usize,
    into: &'a mut [Chunk<PARTS>],
}

impl<const PARTS: usize> Kernel for SplitRows<'_, PARTS> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stride = Chunk::<PARTS>::row_elements(self.width);
        for (to, from) in self.into.chunks_mut(stride).zip(self.x.chunks(self.stride)) {
            for (to, from) in to.iter_mut().zip(from[..self.width].chunks(CHUNK)) {
                let (first, second) = from.split_at(from.len().min(LANES));
                let mut rest = [s.load_part(first), s.load_part(second)];
                for part in &mut to.0 {
                    for (to, x) in part.as_chunks_mut().0.iter_mut().zip(&mut rest) {
                        let half = s.round_bf16(*x);
                        s.store_upper(to, half);
                        *x = s.sub(*x, half);
                    }
                }
            }
        }
    }
}

/// Cuts a tile of a panel into its two halves, one after the other.
struct SplitPanel<'a> {
    rows: [RowF32; CHUNK],
    into: &'a mut [PairRow; CHUNK],
}

impl Kernel for SplitPanel<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for half in self.into.chunks_mut(CHUNK / 2) {
            for (to, pair) in half.iter_mut().zip(self.rows.as_chunks_mut().0) {
                let [even, odd] = pair.each_mut().map(|RowF32(x)| {
                    let half = s.round_bf16(s.load(x));
                    let lost = s.sub(s.load(x), half);
                    s.store(x, lost);
                    half
                });
                s.store_pairs(&mut to.0, even, odd);
            }
        }
    }
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
