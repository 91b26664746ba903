//! The low-rank adapter `y += alpha phi(x Wdown^T) Wup^T` and its gradients, f32 throughout.
//!
//! Rows are batch-invariant as in [`matmul`](super::matmul), and weights are read as they are, so
//! that a single row costs no packing. The weight gradients sum over rows as [`RowSum`] says; so they
//! depend neither on the threads nor on the CPU level, nor on how the rows are cut into calls.

use super::dispatch::CpuLevel;
use super::dots::Dots;
use super::lanes::{Kernel, LANES, Simd};
pub use super::low_rank_activation::Activation;
use super::parallel::for_each;
use super::prefetch::Lines;
use super::product::{Old, Product};
use super::row_sum::{RowSum, by_chain, by_chain_mut};

/// Rows of a task of the forward pass.
const FORWARD_ROWS: usize = 32;
/// Rows that the backward pass takes through all its products while they stay in cache.
const SUB_CHUNK: usize = 16;

/// `z [M, R] = x [M, D] Wdown^T` with `wdown [R, D]` row-major. Panics if the lengths disagree.
pub fn down(x: &[f32], wdown: &[f32], d: usize, r: usize, z: &mut [f32]) {
    assert!(wdown.len() == r * d, "low-rank shapes disagree");
    down_all(x, d, vec![Down { wdown, z }]);
}

/// One of several products of the same rows.
pub struct Down<'a> {
    /// `[R, D]` row-major.
    pub wdown: &'a [f32],
    /// The result, `[M, R]`.
    pub z: &'a mut [f32],
}

/// Several [`down`] of the same `x [M, D]`, which is read once. Panics if the lengths disagree.
pub fn down_all(x: &[f32], d: usize, mut downs: Vec<Down>) {
    let fits = |down: &Down| {
        let r = down.wdown.len() / d;
        down.wdown.len() == r * d && down.z.len() * d == x.len() * r
    };
    assert!(downs.iter().all(fits), "low-rank shapes disagree");
    let mut parts: Vec<_> = downs
        .iter_mut()
        .map(|down| (down.wdown, down.z.chunks_mut(FORWARD_ROWS * (down.wdown.len() / d))))
        .collect();
    let mut tasks = Vec::new();
    for x in x.chunks(FORWARD_ROWS * d) {
        let of_rows = parts.iter_mut().map(|(wdown, z)| (*wdown, z.next()));
        tasks.extend(of_rows.filter_map(|(wdown, z)| Some((x, wdown, z?))));
    }
    for_each(tasks.into_iter(), |(x, wdown, z)| {
        CpuLevel::detect().run(Dots { a: x, b: wdown, width: d, c: z });
    });
}

/// `out = y + alpha phi(z [M, R]) Wup^T` with `wup [D_out, R]` row-major, `y` and `out` `[M, D_out]`;
/// the product is finished before it is added. Panics if the lengths disagree.
pub fn up_add(
    (z, r): (&[f32], usize),
    wup: &[f32],
    (alpha, activation): (f32, Activation),
    y: &[f32],
    out: &mut [f32],
) {
    let d_out = wup.len() / r;
    assert!(wup.len() == r * d_out && z.len() * d_out == out.len() * r, "low-rank shapes disagree");
    assert!(out.len() == y.len(), "low-rank shapes disagree");
    let (up, block) = (transpose(wup, d_out, r), FORWARD_ROWS * d_out);
    let parts = out.chunks_mut(block).zip(y.chunks(block)).zip(z.chunks(FORWARD_ROWS * r));
    for_each(parts, |((out, y), z)| {
        out.copy_from_slice(y);
        add_product(&scaled_code(z, alpha, activation), &up, r, out);
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

/// Where the gradient of the adapter's input goes.
pub enum InputGradient<'a> {
    /// `dz Wdown` is added to these `[M, D]`.
    Add(&'a mut [f32]),
    /// `dz [M, R]` is written for somebody who multiplies it by `Wdown` himself.
    Code(&'a mut [f32]),
}

/// What [`backward`] writes to.
pub struct Gradients<'a> {
    /// Gradient of `x`.
    pub dx: InputGradient<'a>,
    /// Gradient of `wdown`, `[R, D]`.
    pub dwdown: &'a mut RowSum,
    /// Gradient of `wup`, transposed: `[R, D_out]`.
    pub dwup: &'a mut RowSum,
}

/// Adds the adapter's gradients, given `dy [M, D_out]`: `dwup += alpha phi(z)^T dy`,
/// `dz = alpha phi'(z) (dy Wup)`, `dwdown += dz^T x`, `dx += dz Wdown`. Panics if the lengths
/// disagree, or the two sums have had different rows.
pub fn backward(dy: &[f32], saved: Saved, gradients: Gradients) {
    let Saved { x, z, wdown, wup, r, .. } = saved;
    let Gradients { dx, dwdown, dwup } = gradients;
    let (m, d, d_out) = (z.len() / r, wdown.len() / r, wup.len() / r);
    assert!(z.len() == m * r && x.len() == m * d, "low-rank shapes disagree");
    assert!(dwdown.len() == wdown.len() && dwup.len() == wup.len(), "low-rank shapes disagree");
    assert!(dwdown.rows() == dwup.rows(), "low-rank sums disagree");
    let (dx, width, code) = match dx {
        InputGradient::Add(dx) => (dx, d, false),
        InputGradient::Code(dz) => (dz, r, true),
    };
    assert!(dy.len() == m * d_out && dx.len() == m * width, "low-rank shapes disagree");
    let up = transpose(wup, d_out, r);
    let room = dwdown.room();
    let (mut downs, mut ups) = (dwdown.begin(m), dwup.begin(m));
    let rows = by_chain(x, room, d).zip(by_chain(z, room, r)).zip(by_chain(dy, room, d_out));
    let sums = downs.chunks_mut(r * d).zip(ups.chunks_mut(r * d_out));
    let results = by_chain_mut(dx, room, width).zip(sums);
    for_each(rows.zip(results), |(((x, z), dy), (dx, (down, up_sum)))| {
        let rows = x.chunks(SUB_CHUNK * d).zip(z.chunks(SUB_CHUNK * r));
        let rows = rows.zip(dy.chunks(SUB_CHUNK * d_out)).zip(dx.chunks_mut(SUB_CHUNK * width));
        for (((x, z), dy), dx) in rows {
            let dz = code_gradient(dy, z, &up, &saved);
            add_outer(&scaled_code(z, saved.alpha, saved.activation), dy, r, up_sum);
            add_outer(&dz, x, r, down);
            match code {
                true => dx.copy_from_slice(&dz),
                false => add_product(&dz, wdown, r, dx),
            }
        }
    });
    dwdown.end(&downs, m);
    dwup.end(&ups, m);
}

/// `alpha phi(z)`.
pub(super) fn scaled_code(z: &[f32], alpha: f32, activation: Activation) -> Vec<f32> {
    let mut a = activation.apply(z);
    a.iter_mut().for_each(|a| *a *= alpha);
    a
}

/// `alpha phi'(z) (dy Wup)` with `up [R, D_out]`.
fn code_gradient(dy: &[f32], z: &[f32], up: &[f32], saved: &Saved) -> Vec<f32> {
    let mut dz = vec![0.0; z.len()];
    let width = up.len() / saved.r;
    CpuLevel::detect().run(Dots { a: dy, b: up, width, c: &mut dz });
    let slope = saved.activation.derivative(z);
    dz.iter_mut().zip(slope).for_each(|(dz, slope)| *dz *= saved.alpha * slope);
    dz
}

/// `y [rows, W] += a [rows, R] w [R, W]`, the product finished before it is added.
fn add_product(a: &[f32], w: &[f32], r: usize, y: &mut [f32]) {
    let (rows, width) = (a.len() / r, w.len() / r);
    CpuLevel::detect().run(Product {
        a,
        a_row: r,
        a_step: 1,
        b: w,
        b_row: width,
        b_vector: LANES,
        fetch: &mut Lines::none(),
        c: y,
        c_row: width,
        rows,
        cols: width,
        depth: r,
        old: Old::Last,
    });
}

/// `sum [R, W] += a^T x` for `a [rows, R]` and `x [rows, W]`, each element one chain over the
/// rows.
fn add_outer(a: &[f32], x: &[f32], r: usize, sum: &mut [f32]) {
    let (rows, width) = (a.len() / r, sum.len() / r);
    CpuLevel::detect().run(Product {
        a,
        a_row: 1,
        a_step: r,
        b: x,
        b_row: width,
        b_vector: LANES,
        fetch: &mut Lines::none(),
        c: sum,
        c_row: width,
        rows: r,
        cols: width,
        depth: rows,
        old: Old::First,
    });
}

/// `[columns, rows]` of a row-major `[rows, columns]`.
fn transpose(w: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut to = vec![0.0; w.len()];
    CpuLevel::detect().run(Transpose { w, rows, columns, to: &mut to });
    to
}

/// `to [columns, rows]` from `w [rows, columns]`.
pub(super) struct Transpose<'a> {
    pub w: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub to: &'a mut [f32],
}

impl Kernel for Transpose<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { w, rows, columns, to } = self;
        for i in (0..rows).step_by(8) {
            for j in (0..columns).step_by(8) {
                if i + 8 <= rows && j + 8 <= columns {
                    s.transpose8(&w[i * columns + j..], columns, &mut to[j * rows + i..], rows);
                    continue;
                }
                for i in i..rows.min(i + 8) {
                    (j..columns.min(j + 8)).for_each(|j| to[j * rows + i] = w[i * columns + j]);
                }
            }
        }
    }
}
