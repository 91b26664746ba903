//! Brings operands into the form that the inner loops read: rows, as they are or rounded to pairs
//! of bf16, and panels widened, rounded or transposed into scratch.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::matmul::Axis;
#[cfg(target_arch = "x86_64")]
use super::matmul_tile::Pair;
use super::pack::{PackedMatrix, PairRow, RowF32, Storage};
#[cfg(target_arch = "x86_64")]
use super::prefetch;

/// Copies the first `width` columns of rows of `x`, `stride` apart, densely into `into`.
pub(crate) fn copy_rows(x: &[f32], stride: usize, width: usize, into: &mut [f32]) {
    for (to, from) in into.chunks_mut(width).zip(x.chunks(stride)) {
        to.copy_from_slice(&from[..width]);
    }
}

/// As [`copy_rows`], rounded to pairs of bf16; an odd width is padded with zero, and subnormal numbers, which
/// products of pairs take for zero, become zero.
///
/// # Safety
/// The machine has AVX-512 F and BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn round_rows(x: &[f32], stride: usize, width: usize, into: &mut [Pair]) {
    for (to, from) in into.chunks_mut(width.div_ceil(2)).zip(x.chunks(stride)) {
        // the row after the next one comes closer meanwhile, its address valid or not
        let ahead = from.as_ptr().wrapping_add(2 * stride);
        (0..width).step_by(LANES).for_each(|at| prefetch::to_first(ahead.wrapping_add(at).cast()));
        let (whole, rest) = from[..width].as_chunks();
        let mut last = [0.0; 2 * LANES];
        last[..rest.len()].copy_from_slice(rest);
        for (to, part) in to.chunks_mut(LANES).zip(whole.iter().chain([&last])) {
            let mask = ((1u32 << to.len()) - 1) as u16;
            // SAFETY: there are so many links, and only pairs that the row has are written.
            unsafe {
                let (first, second) = (part.as_ptr(), part[LANES..].as_ptr());
                let pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first));
                let pairs = std::mem::transmute::<__m512bh, __m512i>(pairs);
                _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), mask, pairs);
            }
        }
    }
}

/// Writes the links `k` of panel `panel` of the weight seen along `axis` into `into`. `k` starts at
/// a multiple of sixteen; `into` has room for whole tiles.
pub(crate) fn fill_panel(
    level: CpuLevel,
    w: &PackedMatrix,
    axis: Axis,
    panel: usize,
    k: Range<usize>,
    into: &mut [RowF32],
) {
    if axis == Axis::Input {
        return level.run(Transpose { w, panel, k, into });
    }
    match &w.storage {
        Storage::F32(rows) => {
            let start = panel * w.in_features() + k.start;
            into[..k.len()].copy_from_slice(&rows[start..start + k.len()]);
        }
        Storage::Bf16(rows) => {
            let start = panel * w.in_features().div_ceil(2) + k.start / 2;
            level.run(Widen { rows: &rows[start..start + k.len().div_ceil(2)], into });
        }
    }
}

/// As [`fill_panel`], rounded to pairs of bf16; an odd number of links is padded with zeros.
pub(crate) fn fill_pairs(
    level: CpuLevel,
    w: &PackedMatrix,
    axis: Axis,
    panel: usize,
    k: Range<usize>,
    into: &mut [PairRow],
) {
    if axis == Axis::Input {
        return level.run(TransposePairs { w, panel, k, into });
    }
    match &w.storage {
        Storage::F32(rows) => {
            let start = panel * w.in_features() + k.start;
            level.run(RoundPairs { rows: &rows[start..start + k.len()], into });
        }
        Storage::Bf16(rows) => {
            let start = panel * w.in_features().div_ceil(2) + k.start / 2;
            let pairs = k.len().div_ceil(2);
            into[..pairs].copy_from_slice(&rows[start..start + pairs]);
        }
    }
}

/// Widens rows of a bf16 panel.
struct Widen<'a> {
    rows: &'a [PairRow],
    into: &'a mut [RowF32],
}

impl Kernel for Widen<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (to, row) in self.into.as_chunks_mut::<2>().0.iter_mut().zip(self.rows) {
            s.store(&mut to[0].0, s.load_even(&row.0));
            s.store(&mut to[1].0, s.load_odd(&row.0));
        }
    }
}

/// Rounds rows of an f32 panel to pairs.
struct RoundPairs<'a> {
    rows: &'a [RowF32],
    into: &'a mut [PairRow],
}

impl Kernel for RoundPairs<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (to, rows) in self.into.iter_mut().zip(self.rows.chunks(2)) {
            let rounded = |row: &RowF32| s.round_bf16(s.load(&row.0));
            let odd = rows.get(1).map_or(s.splat(0.0), rounded);
            s.store_pairs(&mut to.0, rounded(&rows[0]), odd);
        }
    }
}

/// Sixteen input features (`panel` of them) of the output features `k`, transposed.
struct Transpose<'a> {
    w: &'a PackedMatrix,
    panel: usize,
    k: Range<usize>,
    into: &'a mut [RowF32],
}

impl Kernel for Transpose<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut tile = [0.0f32; LANES * LANES];
        let tiles = self.into.chunks_exact_mut(LANES);
        for (k0, to) in self.k.step_by(LANES).zip(tiles) {
            read_tile(s, self.w, self.panel, k0, &mut tile);
            transpose16(s, &tile, RowF32::elements_mut(to));
        }
    }
}

/// The same as pairs of bf16.
struct TransposePairs<'a> {
    w: &'a PackedMatrix,
    panel: usize,
    k: Range<usize>,
    into: &'a mut [PairRow],
}

impl Kernel for TransposePairs<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut tile = [[0; 2 * LANES]; 8];
        for (k0, to) in self.k.step_by(LANES).zip(self.into.as_chunks_mut().0) {
            match whole_tile(self.w, self.panel, k0) {
                Some(tile) => s.transpose_pairs(tile, PairRow::elements_mut(to)),
                None => {
                    read_pairs(s, self.w, self.panel, k0, &mut tile);
                    s.transpose_pairs(&tile, PairRow::elements_mut(to));
                }
            }
        }
    }
}

/// Reads sixteen input features (`panel` of them) of the sixteen output features from `k0` on, a
/// row a feature; rows that the weight does not have stay.
#[inline(always)]
fn read_tile<S: Simd>(
    s: S,
    w: &PackedMatrix,
    panel: usize,
    k0: usize,
    tile: &mut [f32; LANES * LANES],
) {
    let count = LANES.min(w.in_features() - panel * LANES);
    match &w.storage {
        Storage::F32(rows) => {
            let start = k0 / LANES * w.in_features() + panel * LANES;
            let rows = RowF32::elements(&rows[start..start + count]);
            tile[..rows.len()].copy_from_slice(rows);
        }
        Storage::Bf16(rows) => {
            let start = k0 / LANES * w.in_features().div_ceil(2) + panel * LANES / 2;
            let rows = &rows[start..start + count.div_ceil(2)];
            let tile = tile.as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0;
            for ([even, odd], row) in tile.iter_mut().zip(rows) {
                s.store(even, s.load_even(&row.0));
                s.store(odd, s.load_odd(&row.0));
            }
        }
    }
}

/// Where the tile of [`read_pairs`] lies in a storage that has it as it is.
#[inline(always)]
fn whole_tile(w: &PackedMatrix, panel: usize, k0: usize) -> Option<&[[u16; 2 * LANES]; 8]> {
    let Storage::Bf16(rows) = &w.storage else { return None };
    let start = k0 / LANES * w.in_features().div_ceil(2) + panel * LANES / 2;
    let whole = (panel + 1) * LANES <= w.in_features();
    rows[start..].first_chunk().filter(|_| whole).map(PairRow::elements)
}

/// As [`read_tile`], rounded to bf16, a row two features.
#[inline(always)]
fn read_pairs<S: Simd>(
    s: S,
    w: &PackedMatrix,
    panel: usize,
    k0: usize,
    tile: &mut [[u16; 2 * LANES]; 8],
) {
    let count = LANES.min(w.in_features() - panel * LANES);
    match &w.storage {
        Storage::F32(rows) => {
            let start = k0 / LANES * w.in_features() + panel * LANES;
            let mut features = [0.0; LANES * LANES];
            let rows = RowF32::elements(&rows[start..start + count]);
            features[..rows.len()].copy_from_slice(rows);
            let features = features.as_chunks::<LANES>().0.as_chunks::<2>().0;
            for (to, [even, odd]) in tile.iter_mut().zip(features) {
                let rounded = |x| s.round_bf16(s.load(x));
                s.store_pairs(to, rounded(even), rounded(odd));
            }
        }
        Storage::Bf16(rows) => {
            let start = k0 / LANES * w.in_features().div_ceil(2) + panel * LANES / 2;
            let rows = &rows[start..start + count.div_ceil(2)];
            tile.iter_mut().zip(rows).for_each(|(to, row)| *to = row.0);
        }
    }
}

/// Transposes a dense 16 x 16 tile.
#[inline(always)]
fn transpose16<S: Simd>(s: S, x: &[f32], y: &mut [f32]) {
    for (i, j) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
        s.transpose8(&x[i * LANES + j..], LANES, &mut y[j * LANES + i..], LANES);
    }
}
