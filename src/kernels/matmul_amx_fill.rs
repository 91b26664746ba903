//! Brings operands into tiles of bf16: rounded, or cut into a half that is rounded and a half that rounding
//! lost, rounded too.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::matmul::Axis;
use super::matmul_amx::{CHUNK, Chunk};
use super::matmul_fill::{fill_pairs, fill_panel};
use super::matmul_form::Form;
use super::pack::{PackedMatrix, PairRow, RowF32};
#[cfg(target_arch = "x86_64")]
use super::prefetch;

/// Writes links of a panel of the weight into tiles.
pub(super) type Fill = fn(CpuLevel, &PackedMatrix, Axis, usize, Range<usize>, &mut [PairRow]);

/// The links `k` rounded, padded with zeros to whole tiles.
pub(super) fn fill_rounded(
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
pub(super) fn fill_halves(
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
pub(super) fn split_rows<const PARTS: usize>(
    level: CpuLevel,
    x: &[f32],
    stride: usize,
    width: usize,
    into: &mut [Chunk<PARTS>],
) {
    #[cfg(target_arch = "x86_64")]
    if level.multiplies_pairs() {
        // SAFETY: the level has just been checked.
        return unsafe { split_rows_bf16(x, stride, width, into) };
    }
    level.run(SplitRows { x, stride, width, into });
}

/// [`split_rows`] by the instruction that rounds. It takes subnormal numbers for zero, as products of tiles do.
///
/// # Safety
/// The machine has AVX-512 F and BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn split_rows_bf16<const PARTS: usize>(
    x: &[f32],
    stride: usize,
    width: usize,
    into: &mut [Chunk<PARTS>],
) {
    let chunks = Chunk::<PARTS>::row_elements(width);
    for (to, from) in into.chunks_mut(chunks).zip(x.chunks(stride)) {
        // the row after the next one comes closer meanwhile, its address valid or not
        let ahead = from.as_ptr().wrapping_add(2 * stride);
        (0..width).step_by(LANES).for_each(|at| prefetch::to_first(ahead.wrapping_add(at).cast()));
        let (whole, rest) = from[..width].as_chunks::<CHUNK>();
        let mut last = [0.0; CHUNK];
        last[..rest.len()].copy_from_slice(rest);
        let last = [last];
        let last = if rest.is_empty() { &[] } else { &last[..] };
        for (to, from) in to.iter_mut().zip(whole.iter().chain(last)) {
            // SAFETY: a chunk is two registers, a part of it one.
            unsafe {
                let mut first = _mm512_loadu_ps(from.as_ptr());
                let mut second = _mm512_loadu_ps(from[LANES..].as_ptr());
                for part in &mut to.0 {
                    let halves = _mm512_cvtne2ps_pbh(second, first);
                    let halves = std::mem::transmute::<__m512bh, __m512i>(halves);
                    _mm512_storeu_si512(part.as_mut_ptr().cast(), halves);
                    if PARTS == 2 {
                        let widened = |half| {
                            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                                half,
                            )))
                        };
                        let lower = widened(_mm512_castsi512_si256(halves));
                        let upper = widened(_mm512_extracti64x4_epi64::<1>(halves));
                        (first, second) =
                            (_mm512_sub_ps(first, lower), _mm512_sub_ps(second, upper));
                    }
                }
            }
        }
    }
}

/// [`split_rows`] in plain arithmetic.
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
