//! The form of operands that are block floating point: sixteen-bit integers in a unit that the links of a
//! block share.
//!
//! The unit is the power of two for which the largest of 128 links of a row has up to thirteen bits, or of a
//! column of the weight, rounded to bf16 first, up to eleven. Sums of 128 products then fit in 32 bits and
//! are exact; each is added to the result in `f32`. The error of a product of normal numbers, by the norm, is a
//! fifth of bf16's, and two fifths with numbers fifty times as large in the rows. Numbers far below the largest
//! of their block keep fewer bits than in bf16.

use std::arch::x86_64::*;
use std::ops::Range;

use super::dispatch::CpuLevel;
use super::lanes::LANES;
use super::matmul::{Axis, Product};
use super::matmul_fetch::Fetch;
use super::matmul_fill::fill_pairs;
use super::matmul_form::{Form, Panels, Step};
use super::matmul_vnni::{ROWS, multiply};
use super::pack::{PackedMatrix, PairRow, Storage};

/// Links that share a unit.
pub(super) const LINKS: usize = 128;
/// Bits of the largest number of a row, and of a column of the weight: with 2^7 products of a number up to
/// 2^13 and one up to 255 * 2^3, eight bits of bf16 moved up, a sum is below 2^31.
pub(super) const ROW_BITS: u32 = 13;
pub(super) const COLUMN_BITS: u32 = 11;

/// Two neighbouring links of a row as integers, the first in the lower half; behind the links of a block,
/// their unit.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Integers(pub(super) u32);

impl Integers {
    /// The unit, where this is one.
    pub(super) fn unit(self) -> f32 {
        f32::from_bits(self.0)
    }
}

impl Form for Integers {
    type Row = PairRow;
    const ZERO_ROW: PairRow = PairRow::ZERO;
    const ZERO: Self = Self(0);
    const LINKS: usize = 2;
    /// With room for the units.
    const MOST_LINKS: usize = LINKS + 2;

    fn block_links(_k: usize) -> usize {
        LINKS
    }

    fn row_elements(links: usize) -> usize {
        match links {
            0 => 0,
            _ => links.div_ceil(2) + 1,
        }
    }

    fn in_place(_: &[f32]) -> Option<&[Self]> {
        None
    }

    fn copy(_: CpuLevel, x: &[f32], stride: usize, width: usize, into: &mut [Self]) {
        // SAFETY: the level has been checked to multiply integers.
        unsafe { round_rows(x, stride, width, into) }
    }

    fn step(job: &Product, mut step: Step<Self>) {
        let links = step.k0..step.k0 + step.kc;
        let (panel, panels) = (step.panel, step.panels);
        let stride = step.kc.next_multiple_of(LANES) / 2 + 1;
        for (i, into) in step.room().chunks_mut(stride).take(panels).enumerate() {
            fill(job.level, job.w, job.axis, panel + i, links.clone(), into);
        }
        if let Some((panels, links)) = step.next.clone() {
            step.fetch = Fetch::new(job.w, job.axis, panels, links);
            // only tall tiles fetch, each a part
            if step.rows.len() < ROWS {
                step.fetch.some(usize::MAX);
            }
        }
        let panels = Panels { b: step.scratch.as_ptr(), stride, stored: false };
        // SAFETY: columns_of gives valid strips; the level has been checked to multiply integers.
        let integers = |_, strip| unsafe { multiply(strip) };
        // SAFETY: the group's panels have just been filled.
        unsafe { job.columns_of(&step, panels, integers) }
    }
}

/// The links `k` of panel `panel` of the weight seen along `axis` as integers, with their units behind.
fn fill(
    level: CpuLevel,
    w: &PackedMatrix,
    axis: Axis,
    panel: usize,
    k: Range<usize>,
    into: &mut [PairRow],
) {
    let pairs = k.len().div_ceil(2);
    match &w.storage {
        Storage::Bf16(rows) if axis == Axis::Output => {
            let rows = &rows[panel * w.in_features().div_ceil(2) + k.start / 2..];
            // SAFETY: the level has been checked to multiply integers; there are so many rows of either.
            unsafe { round_panel(rows.as_ptr(), pairs, into.as_mut_ptr()) }
        }
        _ => {
            fill_pairs(level, w, axis, panel, k, into);
            // SAFETY: as above.
            unsafe {
                let rows = into.as_mut_ptr();
                round_panel(rows, pairs, rows)
            }
        }
    }
}

/// The numbers by which links are multiplied to become integers of `bits`, and the units that undo it, for
/// the bits of the largest link of each lane without its sign. A NaN or an infinity among the links makes
/// the unit NaN. The unit of links below 2^-113 is that of 2^-113.
#[target_feature(enable = "avx512f")]
fn factors(largest: __m512i, bits: u32) -> (__m512, __m512) {
    const MANTISSA: u32 = 23;
    const BIAS: i32 = 127;
    let exponent = _mm512_srli_epi32::<MANTISSA>(largest);
    let lost = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(2 * BIAS + 1));
    let exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32(BIAS - 113));
    // the largest is below 2^(exponent - BIAS + 1), which becomes 2^bits
    let up = _mm512_set1_epi32(bits as i32 - 1);
    let unit = _mm512_slli_epi32::<MANTISSA>(_mm512_sub_epi32(exponent, up));
    let unit = _mm512_mask_mov_epi32(unit, lost, _mm512_set1_epi32(f32::NAN.to_bits() as i32));
    let factor = _mm512_sub_epi32(_mm512_add_epi32(up, _mm512_set1_epi32(2 * BIAS)), exponent);
    let factor = _mm512_slli_epi32::<MANTISSA>(factor);
    (_mm512_castsi512_ps(factor), _mm512_castsi512_ps(unit))
}

/// Rounds the first `width` columns of rows of `x`, `stride` apart, to blocks of integers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn round_rows(x: &[f32], stride: usize, width: usize, into: &mut [Integers]) {
    for (into, x) in into.chunks_mut(Integers::row_elements(width)).zip(x.chunks(stride)) {
        match x.first_chunk::<LINKS>() {
            // of a known length it is unrolled
            Some(x) if width == LINKS => round_row(x, into),
            _ => round_row(&x[..width], into),
        }
    }
}

/// Rounds a block of a row to integers and puts its unit behind them; an odd block is padded with zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn round_row(x: &[f32], into: &mut [Integers]) {
    let vectors = x.len().div_ceil(LANES);
    let mut parts = [_mm512_setzero_ps(); LINKS / LANES];
    for (i, part) in parts[..vectors].iter_mut().enumerate() {
        let mask = 0xffffu16 >> (LANES - LANES.min(x.len() - i * LANES));
        // SAFETY: only lanes that the row has are read.
        *part = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(i * LANES)) };
    }
    let sign = _mm512_set1_epi32(i32::MIN);
    let size = |part: __m512| _mm512_andnot_si512(sign, _mm512_castps_si512(part));
    let largest = parts.iter().map(|&part| size(part)).reduce(|x, y| _mm512_max_epu32(x, y));
    let largest = _mm512_reduce_max_epu32(largest.unwrap_or(_mm512_setzero_si512()));
    let (factor, unit) = factors(_mm512_set1_epi32(largest as i32), ROW_BITS);
    let rounded = |part: __m512| _mm512_cvtps_epi32(_mm512_mul_ps(part, factor));
    // packing puts quarters of both vectors in turn
    let in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    for (i, part) in parts.as_chunks::<2>().0[..vectors.div_ceil(2)].iter().enumerate() {
        let both = _mm512_packs_epi32(rounded(part[0]), rounded(part[1]));
        let pairs = LANES.min(into.len() - 1 - i * LANES);
        // SAFETY: only pairs that the block has are written.
        unsafe {
            _mm512_mask_storeu_epi32(
                into.as_mut_ptr().add(i * LANES).cast(),
                0xffff >> (LANES - pairs),
                _mm512_permutexvar_epi64(in_order, both),
            )
        }
    }
    into[x.len().div_ceil(2)] = Integers(_mm512_cvtss_f32(unit).to_bits());
}

/// Rounds `pairs` rows of bf16 to integers and puts the units of the columns behind them.
///
/// # Safety
/// `rows` has so many, `into` room for one more; they may be the same.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn round_panel(rows: *const PairRow, pairs: usize, into: *mut PairRow) {
    // SAFETY: the caller's promise.
    let row = |i: usize| unsafe { _mm512_load_si512(rows.add(i).cast()) };
    let no_sign = _mm512_set1_epi16(i16::MAX);
    let mut largest = _mm512_setzero_si512();
    for i in 0..pairs {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(no_sign, row(i)));
    }
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let (even, odd) = (_mm512_slli_epi32::<16>(largest), _mm512_and_si512(upper, largest));
    let (factor, unit) = factors(_mm512_max_epu32(even, odd), COLUMN_BITS);
    // an integer of sixteen bits added to this one is in the lower half of the bits of the sum
    let integer = _mm512_set1_ps(1.5 * (1 << 23) as f32);
    let rounded = |bits: __m512i| {
        _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(bits), factor, integer))
    };
    for i in 0..pairs {
        let (even, odd) = (_mm512_slli_epi32::<16>(row(i)), _mm512_and_si512(upper, row(i)));
        let odd = _mm512_slli_epi32::<16>(rounded(odd));
        let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, rounded(even), odd);
        // SAFETY: the caller's promise.
        unsafe { _mm512_store_si512(into.add(i).cast(), both) }
    }
    // SAFETY: the caller's promise.
    unsafe { _mm512_store_ps(into.add(pairs).cast(), unit) }
}
