//! Brings operands into the form that the inner loops read: rounded rows, and panels widened,
//! rounded or transposed into `f32` scratch.

use std::ops::Range;

use super::dispatch::{CpuLevel, SimdTask, dispatch};
use super::matmul::Axis;
use super::pack::{PackedMatrix, RowBf16, RowF32, Storage};
use super::simd::{LANES, Simd};

/// To the nearest bf16 (ties to even), as `f32`; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    f32::from_bits(if x.is_nan() { bits | 0x0040_0000 } else { rounded })
}

/// Copies the first `width` columns of rows of `x`, `stride` apart, densely into `into`.
pub(crate) fn copy_rows(
    level: CpuLevel,
    x: &[f32],
    stride: usize,
    width: usize,
    round: bool,
    into: &mut [f32],
) {
    for (to, from) in into.chunks_mut(width).zip(x.chunks(stride)) {
        to.copy_from_slice(&from[..width]);
    }
    if round {
        // SAFETY: the task holds a slice.
        unsafe { dispatch(level, Round(into)) };
    }
}

/// Writes the links `k` of panel `panel` of the weight seen along `axis` into `into`, dense
/// `[k, 16]`. `k` starts at a multiple of sixteen; `into` has room for whole tiles.
pub(crate) fn fill_panel(
    level: CpuLevel,
    w: &PackedMatrix,
    axis: Axis,
    panel: usize,
    k: Range<usize>,
    round: bool,
    into: &mut [f32],
) {
    if axis == Axis::Input {
        assert!(into.len() >= k.len().next_multiple_of(LANES) * LANES);
        // SAFETY: the task holds slices, long enough by the assertion.
        return unsafe { dispatch(level, Transpose { w, panel, k, round, into }) };
    }
    let start = panel * w.in_features() + k.start;
    match &w.storage {
        Storage::F32(rows) => {
            for (to, row) in into.chunks_mut(LANES).zip(&rows[start..start + k.len()]) {
                to.copy_from_slice(&row.0);
            }
        }
        Storage::Bf16(rows) => {
            assert!(into.len() >= k.len() * LANES);
            // SAFETY: the task holds slices, long enough by the assertion.
            unsafe { dispatch(level, Widen { rows: &rows[start..start + k.len()], into }) };
        }
    }
    if round && !w.is_bf16() {
        // SAFETY: the task holds a slice.
        unsafe { dispatch(level, Round(into)) };
    }
}

/// Rounds in place.
struct Round<'a>(&'a mut [f32]);

impl SimdTask for Round<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for x in self.0 {
            *x = round_to_bf16(*x);
        }
    }
}

/// Widens rows of a bf16 panel.
struct Widen<'a> {
    rows: &'a [RowBf16],
    into: &'a mut [f32],
}

impl SimdTask for Widen<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (to, row) in self.into.chunks_exact_mut(LANES).zip(self.rows) {
            // SAFETY: both sides are sixteen elements.
            unsafe { S::store(to.as_mut_ptr(), S::load_bf16(row.0.as_ptr())) };
        }
    }
}

/// Sixteen input features (`panel` of them) of the output features `k`, transposed.
struct Transpose<'a> {
    w: &'a PackedMatrix,
    panel: usize,
    k: Range<usize>,
    round: bool,
    into: &'a mut [f32],
}

impl SimdTask for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let in_features = self.w.in_features();
        let first = self.panel * LANES;
        let count = LANES.min(in_features - first);
        let mut tile = [0.0f32; LANES * LANES];
        for (i, k0) in self.k.clone().step_by(LANES).enumerate() {
            let start = k0 / LANES * in_features + first;
            let to = self.into[i * LANES * LANES..][..LANES * LANES].as_mut_ptr();
            // SAFETY: the tile and the target are 16 x 16, a whole source tile is 16 rows.
            unsafe {
                match &self.w.storage {
                    Storage::F32(rows) if count == LANES && !self.round => {
                        S::transpose(rows[start..start + LANES].as_ptr().cast(), to);
                    }
                    Storage::F32(rows) => {
                        read_f32(&rows[start..start + count], self.round, &mut tile);
                        S::transpose(tile.as_ptr(), to);
                    }
                    Storage::Bf16(rows) => {
                        read_bf16::<S>(&rows[start..start + count], &mut tile);
                        S::transpose(tile.as_ptr(), to);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn read_f32(rows: &[RowF32], round: bool, tile: &mut [f32]) {
    for (to, row) in tile.chunks_exact_mut(LANES).zip(rows) {
        for (to, &x) in to.iter_mut().zip(&row.0) {
            *to = if round { round_to_bf16(x) } else { x };
        }
    }
}

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn read_bf16<S: Simd>(rows: &[RowBf16], tile: &mut [f32]) {
    for (to, row) in tile.chunks_exact_mut(LANES).zip(rows) {
        // SAFETY: both sides are sixteen elements.
        unsafe { S::store(to.as_mut_ptr(), S::load_bf16(row.0.as_ptr())) };
    }
}
