//! The low-rank adapter `y += alpha phi(x Wdown^T) Wup^T` and its gradients, f32 throughout.
//!
//! Rows are batch-invariant as in [`matmul`](super::matmul). The weight gradients sum over rows:
//! chains over 256 rows at a time, counted from the first, their results added in order; so they
//! depend neither on the threads nor on the CPU level.

use std::ops::Range;

use super::dispatch::{CpuLevel, SimdTask, dispatch};
pub use super::low_rank_activation::Activation;
use super::matmul::{Axis, MatmulPrecision, matmul, product_serial};
use super::matmul_tile::{Join, Strip, best_panels, multiply};
use super::pack::PackedMatrix;
use super::parallel::{SharedMut, for_each};
use super::simd::{LANES, Simd};

/// Rows of a task, and of a chain of the weight gradients.
const CHUNK: usize = 256;
/// Rows whose outputs stay in the second-level cache.
const SUB_CHUNK: usize = 32;

/// `z [M, R] = x [M, D] Wdown^T` with `wdown [R, D]` row-major. Panics if the lengths disagree.
pub fn down(x: &[f32], wdown: &[f32], d: usize, r: usize, z: &mut [f32]) {
    matmul(x, &PackedMatrix::from_f32(wdown, r, d), None, MatmulPrecision::Highest, z);
}

/// `y [M, D_out] += alpha phi(z [M, R]) Wup^T` with `wup [D_out, R]` row-major; the product is
/// finished before it is scaled and added. Panics if the lengths disagree.
pub fn up_add(z: &[f32], wup: &[f32], r: usize, alpha: f32, activation: Activation, y: &mut [f32]) {
    up_add_packed(z, &PackedMatrix::from_f32(wup, wup.len() / r, r), alpha, activation, y);
}

/// [`up_add`] with a matrix packed before; [`matmul`] with a packed `wdown` is [`down`].
pub fn up_add_packed(
    z: &[f32],
    wup: &PackedMatrix,
    alpha: f32,
    activation: Activation,
    y: &mut [f32],
) {
    let (r, d_out) = (wup.in_features(), wup.out_features());
    let m = z.len() / r;
    assert!(z.len() == m * r && y.len() == m * d_out, "low-rank shapes disagree");
    let level = CpuLevel::detect();
    let y = SharedMut::new(y);
    for_each(m.div_ceil(CHUNK), |i| {
        let rows = chunk(m, i);
        let a = activation.apply(&z[rows.start * r..rows.end * r]);
        // SAFETY: tasks own disjoint rows.
        let y = unsafe { y.part(rows.start * d_out..rows.end * d_out) };
        add_product(level, &a, wup, alpha, y);
    });
}

/// What [`backward`] reads.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Input of the adapter, `[M, D]`.
    pub x: &'a [f32],
    /// The code before the activation, `[M, R]`.
    pub z: &'a [f32],
    /// `[R, D]` row-major.
    pub wdown: &'a [f32],
    /// `[D_out, R]` row-major.
    pub wup: &'a [f32],
    /// Rank.
    pub r: usize,
    /// Scale of the adapter's output.
    pub alpha: f32,
    /// Function between the two matrices.
    pub activation: Activation,
}

/// What [`backward`] adds to.
pub struct Gradients<'a> {
    /// Gradient of `x`, `[M, D]`.
    pub dx: &'a mut [f32],
    /// Gradient of `wdown`, `[R, D]`.
    pub dwdown: &'a mut [f32],
    /// Gradient of `wup`, `[D_out, R]`.
    pub dwup: &'a mut [f32],
}

/// Adds the adapter's gradients, given `dy [M, D_out]`: `dwup += alpha dy^T phi(z)`,
/// `dz = alpha phi'(z) (dy Wup)`, `dwdown += dz^T x`, `dx += dz Wdown`. Panics if the lengths
/// disagree.
pub fn backward(dy: &[f32], saved: Saved, gradients: Gradients) {
    let Saved { x, z, wdown, wup, r, .. } = saved;
    let (m, d, d_out) = (z.len() / r, wdown.len() / r, wup.len() / r);
    assert!(z.len() == m * r && x.len() == m * d, "low-rank shapes disagree");
    assert!(dy.len() == m * d_out && gradients.dx.len() == x.len(), "low-rank shapes disagree");
    assert!(gradients.dwdown.len() == wdown.len() && gradients.dwup.len() == wup.len());
    let transposed_up = PackedMatrix::from_f32(&transpose(wup, d_out, r), r, d_out);
    let transposed_down = PackedMatrix::from_f32(&transpose(wdown, r, d), d, r);
    let (down_len, up_len) = (r * d.next_multiple_of(LANES), r * d_out.next_multiple_of(LANES));
    let chunks = m.div_ceil(CHUNK);
    let (mut downs, mut ups) = (vec![0.0; chunks * down_len], vec![0.0; chunks * up_len]);
    let dx = SharedMut::new(gradients.dx);
    let (shared_downs, shared_ups) = (SharedMut::new(&mut downs), SharedMut::new(&mut ups));
    let level = CpuLevel::detect();
    for_each(chunks, |i| {
        let rows = chunk(m, i);
        let of = |width: usize| rows.start * width..rows.end * width;
        // SAFETY: tasks own disjoint rows of dx and disjoint partial sums.
        let (dx, down, up) = unsafe {
            let down = shared_downs.part(i * down_len..(i + 1) * down_len);
            (dx.part(of(d)), down, shared_ups.part(i * up_len..(i + 1) * up_len))
        };
        let (x, z, dy) = (&x[of(d)], &z[of(r)], &dy[of(d_out)]);
        let mut a = saved.activation.apply(z);
        a.iter_mut().for_each(|a| *a *= saved.alpha);
        outer_sum(level, &a, dy, r, up);
        let dz = code_gradient(level, dy, z, &transposed_up, saved);
        outer_sum(level, &dz, x, r, down);
        add_product(level, &dz, &transposed_down, 1.0, dx);
    });
    add_parts(&downs, r, d, gradients.dwdown, |i, j| i * d + j);
    add_parts(&ups, r, d_out, gradients.dwup, |i, j| j * r + i);
}

/// Rows of task `i`.
fn chunk(m: usize, i: usize) -> Range<usize> {
    i * CHUNK..((i + 1) * CHUNK).min(m)
}

/// `[columns, rows]` of a row-major `[rows, columns]`.
fn transpose(w: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|j| (0..rows).map(move |i| w[i * columns + j])).collect()
}

/// `y += scale a W^T`, a few rows at a time so that the product stays in cache.
fn add_product(level: CpuLevel, a: &[f32], w: &PackedMatrix, scale: f32, y: &mut [f32]) {
    let (width, k) = (w.out_features(), w.in_features());
    let mut product = vec![0.0; SUB_CHUNK * width];
    for (a, y) in a.chunks(SUB_CHUNK * k).zip(y.chunks_mut(SUB_CHUNK * width)) {
        let product = &mut product[..y.len()];
        product_serial(level, Axis::Output, a, w, MatmulPrecision::Highest, product);
        // SAFETY: the task holds slices.
        unsafe { dispatch(level, AddScaled { from: product, scale, to: y }) };
    }
}

/// `to += scale from`.
struct AddScaled<'a> {
    from: &'a [f32],
    scale: f32,
    to: &'a mut [f32],
}

impl SimdTask for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to += self.scale * from;
        }
    }
}

/// `dz = alpha phi'(z) (dy Wup)`.
fn code_gradient(
    level: CpuLevel,
    dy: &[f32],
    z: &[f32],
    transposed_up: &PackedMatrix,
    saved: Saved,
) -> Vec<f32> {
    let mut dz = vec![0.0; z.len()];
    product_serial(level, Axis::Output, dy, transposed_up, MatmulPrecision::Highest, &mut dz);
    let slope = saved.activation.derivative(z);
    dz.iter_mut().zip(slope).for_each(|(dz, slope)| *dz *= saved.alpha * slope);
    dz
}

/// `sum [R, W] += a^T x` for `a [rows, R]` and `x [rows, W]`, each element one chain over the
/// rows; `sum` has its rows padded to whole panels.
fn outer_sum(level: CpuLevel, a: &[f32], x: &[f32], r: usize, sum: &mut [f32]) {
    let rows = a.len() / r;
    let width = x.len() / rows;
    let padded = width.next_multiple_of(LANES);
    assert!(sum.len() == r * padded);
    let at = transpose(a, rows, r);
    let mut edge = vec![0.0; SUB_CHUNK * LANES];
    for first in (0..rows).step_by(SUB_CHUNK) {
        let k = SUB_CHUNK.min(rows - first);
        let whole = width / LANES;
        let group = best_panels(level, r);
        let base = Strip {
            rows: r,
            k,
            a: at[first..].as_ptr(),
            lda: rows,
            b: x[first * width..].as_ptr(),
            ldb: width,
            panels: group,
            panel_stride: LANES,
            init: sum.as_ptr(),
            ldi: padded,
            join: Join::Chain,
            y: sum.as_mut_ptr(),
            ldy: padded,
        };
        for panel in (0..whole).step_by(group) {
            let panels = group.min(whole - panel);
            // SAFETY: whole panels of rows first..first + k of x, and of sum.
            unsafe { multiply(level, Strip { panels, ..base.at_column(panel * LANES) }) };
        }
        if whole * LANES < width {
            for (to, from) in edge.chunks_mut(LANES).zip(x[first * width..].chunks(width)).take(k) {
                to[..width - whole * LANES].copy_from_slice(&from[whole * LANES..]);
            }
            // SAFETY: the last panel lies in the zero-padded buffer, its sums in the padding.
            unsafe {
                let last = base.at_column(whole * LANES);
                multiply(level, Strip { panels: 1, b: edge.as_ptr(), ldb: LANES, ..last });
            }
        }
    }
}

impl Strip<f32> {
    /// The strip of the panels that start at `column`, where panels lie side by side.
    ///
    /// # Safety
    /// The column lies in the rows of `b` and `y`, or at their end.
    unsafe fn at_column(self, column: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let y = self.y.add(column);
            Strip { b: self.b.add(column), init: y, y, ..self }
        }
    }
}

/// Adds up the padded partial sums `[chunks][r, columns]` in order, then adds them to `into`.
fn add_parts(
    parts: &[f32],
    r: usize,
    columns: usize,
    into: &mut [f32],
    index: impl Fn(usize, usize) -> usize,
) {
    let padded = columns.next_multiple_of(LANES);
    let mut total = vec![0.0; r * padded];
    for part in parts.chunks(r * padded) {
        total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
    }
    for (i, row) in total.chunks(padded).enumerate() {
        row[..columns].iter().enumerate().for_each(|(j, x)| into[index(i, j)] += x);
    }
}
