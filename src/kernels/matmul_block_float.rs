//! The form of operands that are block floating point: sixteen-bit integers in a unit that the links of a
//! block share.
//!
//! The unit is the smallest power of two, but for a margin of 1 %, for which the integers of a row's block, as a vector, are shorter than
//! 2^16 and none is beyond sixteen bits, and those of a column of the weight, rounded to bf16 first, shorter than
//! 2^15. By Cauchy and Schwarz the sum of a block's products then fits in 32 bits and is exact; each is added
//! to the result in `f32`. The error of a product of normal numbers, by the norm, is a tenth of bf16's, and a
//! seventh where some features of the rows or of the columns are fifty times as large. It is bf16's where features of
//! the rows are fifty times as large and those of the columns as much smaller; numbers further below the
//! largest of their block keep fewer bits than in bf16.

use std::arch::x86_64::*;
use std::ops::Range;

use super::dispatch::CpuLevel;
use super::lanes::LANES;
use super::matmul::{Axis, K_SPAN};
use super::matmul_fetch::Fetch;
use super::matmul_fill::fill_pairs;
use super::matmul_form::{Form, Panels, Step};
use super::matmul_product::Product;
use super::matmul_rounded::Layout;
use super::matmul_vnni::{ROWS, multiply};
use super::pack::{PackedMatrix, PairRow, RowF32, Storage};
use super::parallel::map;
use super::prefetch;

/// Links that share a unit at most: two panels of them, and twelve rows, lie in the first-level cache.
const MOST_LINKS: usize = 288;
/// Bits of the length of a row's block, and of a column's, as vectors of integers.
pub(super) const ROW_BITS: i32 = 16;
pub(super) const COLUMN_BITS: i32 = 15;
/// Bits of an integer.
const MOST_BITS: i32 = 15;

/// Links that share a unit in products of `k` links.
pub(super) fn block_links(k: usize) -> usize {
    let k = k.min(K_SPAN);
    k.div_ceil(k.div_ceil(MOST_LINKS)).next_multiple_of(LANES)
}

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
    const LINKS: usize = 2;
    /// With room for the units.
    const MOST_LINKS: usize = MOST_LINKS + 2;

    fn block_links(k: usize) -> usize {
        block_links(k)
    }

    fn prepare(job: &Product) {
        units(job.level, job.w, job.axis);
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
        let next = step.next.clone();
        let panels = match &job.rounded {
            Some(rows) => {
                let layout = Layout::new(job.w);
                if let Some((panels, links)) = next {
                    step.fetch = Fetch::rounded(rows, layout, panels, links);
                }
                let b = rows[layout.place(panel, step.k0)..].as_ptr();
                Panels { b, stride: layout.panel, stored: true }
            }
            None => {
                let stride = step.kc.next_multiple_of(LANES) / 2 + 1;
                for (i, into) in step.room().chunks_mut(stride).take(panels).enumerate() {
                    fill((job.level, job.axis), job.w, panel + i, links.clone(), into);
                }
                if let Some((panels, links)) = next {
                    step.fetch = Fetch::new(job.w, job.axis, panels, links);
                }
                Panels { b: step.scratch.as_ptr(), stride, stored: false }
            }
        };
        // only tall tiles fetch, each a part
        if step.rows.len() < ROWS {
            step.fetch.some(usize::MAX);
        }
        // SAFETY: columns_of gives valid strips; the level has been checked to multiply integers.
        let integers = |_, strip: &mut _| unsafe { multiply(strip) };
        // SAFETY: the group's panels have just been filled, or all have been.
        unsafe { job.columns_of(&step, panels, integers) }
    }
}

/// The links `k` of panel `panel` of the weight seen along an axis as integers, with their units behind.
pub(super) fn fill(
    (level, axis): (CpuLevel, Axis),
    w: &PackedMatrix,
    panel: usize,
    k: Range<usize>,
    into: &mut [PairRow],
) {
    let links = block_links(axis.links(w));
    let unit = units(level, w, axis)[panel * axis.links(w).div_ceil(links) + k.start / links].0;
    let pairs = k.len().div_ceil(2);
    assert!(into.len() > pairs, "no room for a block and its units");
    // SAFETY: the level has been checked to multiply integers; there are so many rows of either.
    match &w.storage {
        Storage::Bf16(rows) if axis == Axis::Output => unsafe {
            let rows = &rows[panel * w.in_features().div_ceil(2) + k.start / 2..][..pairs];
            round_panel(rows.as_ptr(), pairs, &unit, into.as_mut_ptr())
        },
        _ => unsafe {
            fill_pairs(level, w, axis, panel, k, into);
            round_panel(into.as_ptr(), pairs, &unit, into.as_mut_ptr())
        },
    }
}

/// The units of a weight seen along an axis, `[panels, blocks]`, one for each column.
pub(super) fn units(level: CpuLevel, w: &PackedMatrix, axis: Axis) -> &[RowF32] {
    w.units(axis, || {
        let (k, links) = (axis.links(w), block_links(axis.links(w)));
        let blocks = k.div_ceil(links);
        let of_block = |i: usize| {
            let (panel, k0) = (i / blocks, i % blocks * links);
            let mut pairs = [PairRow::ZERO; MOST_LINKS / 2];
            fill_pairs(level, w, axis, panel, k0..k.min(k0 + links), &mut pairs);
            // SAFETY: the level has been checked to multiply integers.
            unsafe { column_units(&pairs) }
        };
        map(0..axis.columns(w).div_ceil(LANES) * blocks, of_block)
    })
}

/// The units of the columns of some rows of bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn column_units(rows: &[PairRow]) -> RowF32 {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let links = |row: &PairRow| {
        // SAFETY: a row is as long as a vector.
        let both = unsafe { _mm512_load_si512(row.0.as_ptr().cast()) };
        [_mm512_slli_epi32::<16>(both), _mm512_and_si512(upper, both)]
            .map(|x| _mm512_castsi512_ps(x))
    };
    let all = || rows.iter().flat_map(links);
    let largest = all().fold(_mm512_setzero_si512(), |m, x| _mm512_max_epu32(m, size(x)));
    let scale = Scale::new(largest);
    let squares = all().fold(_mm512_setzero_ps(), |sum, x| scale.add_square(sum, x));
    let mut units = RowF32([0.0; LANES]);
    // SAFETY: a row is as long as a vector.
    unsafe { _mm512_store_ps(units.0.as_mut_ptr(), scale.factor_and_unit(squares, COLUMN_BITS).1) };
    units
}

/// The bits of a number without its sign.
#[target_feature(enable = "avx512f")]
#[inline]
fn size(x: __m512) -> __m512i {
    _mm512_andnot_si512(_mm512_set1_epi32(i32::MIN), _mm512_castps_si512(x))
}

const MANTISSA: u32 = 23;
const BIAS: i32 = 127;

/// How the links of each lane are brought to a common size, so that neither large nor small ones are lost
/// when they are squared: multiplied by 2^(2 - e), the largest of them being below 2^e.
struct Scale {
    /// e + 126 of each lane; that of links below 2^-112 is that of 2^-112.
    exponent: __m512i,
    factor: __m512,
    /// The lanes that have a NaN or an infinity.
    lost: __mmask16,
}

impl Scale {
    /// For the bits of the largest link of each lane without its sign.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(largest: __m512i) -> Self {
        let exponent = _mm512_srli_epi32::<MANTISSA>(largest);
        let lost = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(2 * BIAS + 1));
        let exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32(BIAS - 112));
        let factor = _mm512_sub_epi32(_mm512_set1_epi32(2 * BIAS + 1), exponent);
        let factor = _mm512_castsi512_ps(_mm512_slli_epi32::<MANTISSA>(factor));
        Self { exponent, factor, lost }
    }

    /// Adds the square of a scaled link.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn add_square(&self, sum: __m512, x: __m512) -> __m512 {
        let x = _mm512_mul_ps(x, self.factor);
        _mm512_fmadd_ps(x, x, sum)
    }

    /// The numbers by which links become integers that are, as a vector, shorter than 2^bits, and the units
    /// that undo it, given the sums of the squares of scaled links. With a NaN or an infinity the unit is NaN.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn factor_and_unit(&self, squares: __m512, bits: i32) -> (__m512, __m512) {
        // room for rounding, of the links and of this sum
        let squares = _mm512_mul_ps(squares, _mm512_set1_ps(1.0 + 1.0 / 128.0));
        let exponent = _mm512_srli_epi32::<MANTISSA>(_mm512_castps_si512(squares));
        // squares are below 2^(exponent - BIAS + 1) and may be 2^(2 bits)
        let up = _mm512_sub_epi32(_mm512_set1_epi32(2 * bits - 1 + BIAS), exponent);
        let up = _mm512_min_epi32(_mm512_srai_epi32::<1>(up), _mm512_set1_epi32(MOST_BITS - 2));
        let one = _mm512_set1_epi32(1);
        let unit = _mm512_sub_epi32(_mm512_sub_epi32(self.exponent, one), up);
        let unit = _mm512_slli_epi32::<MANTISSA>(unit);
        let nan = _mm512_set1_epi32(f32::NAN.to_bits() as i32);
        let factor = _mm512_slli_epi32::<MANTISSA>(up);
        let factor = _mm512_add_epi32(_mm512_castps_si512(self.factor), factor);
        let unit = _mm512_mask_mov_epi32(unit, self.lost, nan);
        (_mm512_castsi512_ps(factor), _mm512_castsi512_ps(unit))
    }
}

/// Rounds the first `width` columns of rows of `x`, `stride` apart, to blocks of integers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn round_rows(x: &[f32], stride: usize, width: usize, into: &mut [Integers]) {
    for (into, x) in into.chunks_mut(Integers::row_elements(width)).zip(x.chunks(stride)) {
        // the row after the next one comes closer meanwhile, its address valid or not
        let ahead = x.as_ptr().wrapping_add(2 * stride);
        (0..width).step_by(LANES).for_each(|at| prefetch::to_first(ahead.wrapping_add(at).cast()));
        round_row(&x[..width], into);
    }
}

/// Rounds a block of a row to integers and puts its unit behind them; an odd block is padded with zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn round_row(x: &[f32], into: &mut [Integers]) {
    let ((whole, rest), (pairs, into_unit)) =
        (x.as_chunks(), into.split_at_mut(x.len().div_ceil(2)));
    let mut last = [0.0; 2 * LANES];
    last[..rest.len()].copy_from_slice(rest);
    let last = (!rest.is_empty()).then_some(&last);
    let parts = || whole.iter().chain(last).map(|part| halves(part));
    let mut largest = [_mm512_setzero_si512(); 2];
    for [x, y] in parts() {
        largest = [_mm512_max_epu32(largest[0], size(x)), _mm512_max_epu32(largest[1], size(y))];
    }
    let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(largest[0], largest[1]));
    let scale = Scale::new(_mm512_set1_epi32(largest as i32));
    let mut squares = [_mm512_setzero_ps(); 2];
    for [x, y] in parts() {
        squares = [scale.add_square(squares[0], x), scale.add_square(squares[1], y)];
    }
    let squares = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
    let (factor, unit) = scale.factor_and_unit(_mm512_set1_ps(squares), ROW_BITS);
    for (part, into) in whole.iter().chain(last).zip(pairs.chunks_mut(LANES)) {
        let mask = ((1u32 << into.len()) - 1) as u16;
        // SAFETY: only pairs that the block has are written.
        unsafe { _mm512_mask_storeu_epi32(into.as_mut_ptr().cast(), mask, integers(part, factor)) }
    }
    into_unit[0] = Integers(_mm512_cvtss_f32(unit).to_bits());
}

/// Both halves of some links.
#[target_feature(enable = "avx512f")]
#[inline]
fn halves(part: &[f32; 2 * LANES]) -> [__m512; 2] {
    // SAFETY: there are so many lanes.
    unsafe { [_mm512_loadu_ps(part.as_ptr()), _mm512_loadu_ps(part[LANES..].as_ptr())] }
}

/// Links multiplied by a factor, as integers.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn integers(part: &[f32; 2 * LANES], factor: __m512) -> __m512i {
    // packing puts quarters of both vectors in turn
    let in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    let [x, y] = halves(part).map(|x| _mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
    _mm512_permutexvar_epi64(in_order, _mm512_packs_epi32(x, y))
}

/// Rounds `pairs` rows of bf16 to integers in the units of their columns and puts those behind them.
///
/// # Safety
/// `rows` has so many, `into` room for one more; they may be the same.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn round_panel(
    rows: *const PairRow,
    pairs: usize,
    units: &[f32; LANES],
    into: *mut PairRow,
) {
    // SAFETY: there are so many lanes.
    let units = unsafe { _mm512_loadu_ps(units.as_ptr()) };
    // of powers of two; of a NaN it is some number
    let factor = _mm512_set1_epi32((2 * BIAS) << MANTISSA);
    let factor = _mm512_castsi512_ps(_mm512_sub_epi32(factor, _mm512_castps_si512(units)));
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    // an integer of sixteen bits added to this one is in the lower half of the bits of the sum
    let integer = _mm512_set1_ps(1.5 * (1 << 23) as f32);
    let rounded = |bits: __m512i| {
        _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(bits), factor, integer))
    };
    for i in 0..pairs {
        // SAFETY: the caller's promise.
        let row = unsafe { _mm512_load_si512(rows.add(i).cast()) };
        let (even, odd) = (_mm512_slli_epi32::<16>(row), _mm512_and_si512(upper, row));
        let odd = _mm512_slli_epi32::<16>(rounded(odd));
        let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, rounded(even), odd);
        // SAFETY: the caller's promise.
        unsafe { _mm512_store_si512(into.add(i).cast(), both) }
    }
    // SAFETY: the caller's promise.
    unsafe { _mm512_store_ps(into.add(pairs).cast(), units) }
}
