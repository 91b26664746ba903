//! Brings operands into the form that the inner loops read: rounded rows, and panels widened,
//! rounded or transposed into `f32` scratch.

use std::ops::Range;

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::matmul::Axis;
use super::pack::{PackedMatrix, RowBf16, RowF32, Storage};

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
        level.run(Round(into));
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
        return level.run(Transpose { w, panel, k, round, into });
    }
    let start = panel * w.in_features() + k.start;
    match &w.storage {
        Storage::F32(rows) => {
            for (to, row) in into.chunks_mut(LANES).zip(&rows[start..start + k.len()]) {
                to.copy_from_slice(&row.0);
            }
        }
        Storage::Bf16(rows) => {
            level.run(Widen { rows: &rows[start..start + k.len()], into });
        }
    }
    if round && !w.is_bf16() {
        level.run(Round(into));
    }
}

/// Rounds in place.
struct Round<'a>(&'a mut [f32]);

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
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

impl Kernel for Widen<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        read_bf16(s, self.rows, self.into);
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

impl Kernel for Transpose<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let in_features = self.w.in_features();
        let first = self.panel * LANES;
        let count = LANES.min(in_features - first);
        let mut tile = [0.0f32; LANES * LANES];
        for (k0, to) in self.k.step_by(LANES).zip(self.into.chunks_exact_mut(LANES * LANES)) {
            let start = k0 / LANES * in_features + first;
            match &self.w.storage {
                Storage::F32(rows) if count == LANES && !self.round => {
                    transpose16(s, RowF32::elements(&rows[start..start + LANES]), to);
                    continue;
                }
                Storage::F32(rows) => {
                    read_f32(&rows[start..start + count], self.round, &mut tile);
                }
                Storage::Bf16(rows) => read_bf16(s, &rows[start..start + count], &mut tile),
            }
            transpose16(s, &tile, to);
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

#[inline(always)]
fn read_f32(rows: &[RowF32], round: bool, tile: &mut [f32]) {
    for (to, row) in tile.chunks_exact_mut(LANES).zip(rows) {
        for (to, &x) in to.iter_mut().zip(&row.0) {
            *to = if round { round_to_bf16(x) } else { x };
        }
    }
}

#[inline(always)]
fn read_bf16<S: Simd>(s: S, rows: &[RowBf16], tile: &mut [f32]) {
    for (to, row) in tile.as_chunks_mut().0.iter_mut().zip(rows) {
        s.store(to, s.load_bf16(&row.0));
    }
}
