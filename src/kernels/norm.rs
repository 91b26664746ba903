//! Root-mean-square normalisation by rows (arXiv:1910.07467).
//!
//! A row's sums run over sixteen lanes in a fixed order, so its bits depend on the row alone.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::parallel::{for_each, task_len};

/// `y = x * rsqrt(mean(x²) + eps) * weight` for each row of `x`, `[N, weight.len()]`; with
/// `plus_one` the factor is `1 + weight`, as Gemma stores it.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, plus_one: bool, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(weight.len()));
    let (weight, task) = (factors(weight, plus_one), task_len(weight.len()));
    let level = CpuLevel::detect();
    for_each(x.chunks(task).zip(y.chunks_mut(task)), |(x, y)| {
        level.run(Forward { x, weight: &weight, eps, y });
    });
}

/// Gradient of [`rms_norm`] to `x` into `dx`; the weight is frozen.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    plus_one: bool,
    dy: &[f32],
    dx: &mut [f32],
) {
    assert!(x.len() == dy.len() && x.len() == dx.len() && x.len().is_multiple_of(weight.len()));
    let (weight, task) = (factors(weight, plus_one), task_len(weight.len()));
    let level = CpuLevel::detect();
    for_each(x.chunks(task).zip(dy.chunks(task)).zip(dx.chunks_mut(task)), |((x, dy), dx)| {
        level.run(Backward { x, weight: &weight, eps, dy, dx });
    });
}

fn factors(weight: &[f32], plus_one: bool) -> Vec<f32> {
    weight.iter().map(|w| if plus_one { 1.0 + w } else { *w }).collect()
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut sum = s.splat(0.0);
    for part in x.chunks(LANES) {
        let v = s.load_part(part);
        sum = s.fma(v, v, sum);
    }
    1.0 / (s.sum(sum) / x.len() as f32 + eps).sqrt()
}

struct Forward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let d = self.weight.len();
        for (x, y) in self.x.chunks_exact(d).zip(self.y.chunks_exact_mut(d)) {
            let r = s.splat(inverse_rms(s, x, self.eps));
            let parts = x.chunks(LANES).zip(self.weight.chunks(LANES)).zip(y.chunks_mut(LANES));
            for ((x, w), y) in parts {
                s.store_part(y, s.mul(s.mul(s.load_part(x), r), s.load_part(w)));
            }
        }
    }
}

struct Backward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    dy: &'a [f32],
    dx: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    /// With `g = dy * weight` and `r = 1 / rms`: `dx = r g - x r³ mean(g x)`.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let d = self.weight.len();
        let rows = self.x.chunks_exact(d).zip(self.dy.chunks_exact(d));
        for ((x, dy), dx) in rows.zip(self.dx.chunks_exact_mut(d)) {
            let r = inverse_rms(s, x, self.eps);
            let mut sum = s.splat(0.0);
            let parts = dy.chunks(LANES).zip(self.weight.chunks(LANES)).zip(x.chunks(LANES));
            for ((dy, w), x) in parts.clone() {
                let g = s.mul(s.load_part(dy), s.load_part(w));
                sum = s.fma(g, s.load_part(x), sum);
            }
            let pull = s.splat(-(s.sum(sum) / d as f32 * r * r * r));
            for (((dy, w), x), dx) in parts.zip(dx.chunks_mut(LANES)) {
                let g = s.mul(s.load_part(dy), s.load_part(w));
                s.store_part(dx, s.fma(s.load_part(x), pull, s.mul(g, s.splat(r))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin() * 3.0 + 0.1).collect()
    }

    fn exact(x: &[f32], weight: &[f32], eps: f32, plus_one: bool) -> Vec<f64> {
        let d = weight.len();
        let norm = |row: &[f32]| {
            let mean = row.iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / d as f64;
            let r = 1.0 / (mean + eps as f64).sqrt();
            let one = if plus_one { 1.0 } else { 0.0 };
            let scaled = row.iter().zip(weight).map(|(x, w)| *x as f64 * r * (*w as f64 + one));
            scaled.collect::<Vec<_>>()
        };
        x.chunks(d).flat_map(norm).collect()
    }

    #[test]
    fn values_are_exact_to_rounding() {
        for (rows, d) in [(1, 1), (7, 8), (50, 576), (33, 65), (300, 128)] {
            for plus_one in [false, true] {
                let (x, w) = (wave(rows * d, 0.37), wave(d, 0.9));
                let mut y = vec![0.0; x.len()];
                rms_norm(&x, &w, 1e-5, plus_one, &mut y);
                for (y, wanted) in y.iter().zip(exact(&x, &w, 1e-5, plus_one)) {
                    assert!((*y as f64 - wanted).abs() <= 6e-7 * wanted.abs(), "{y} {wanted}");
                }
            }
        }
    }

    #[test]
    fn gradient_is_that_of_finite_differences() {
        for (d, plus_one) in [(8, false), (19, true), (64, true)] {
            let (x, w, dy) = (wave(3 * d, 0.37), wave(d, 0.9), wave(3 * d, 1.7));
            let mut dx = vec![0.0; x.len()];
            rms_norm_backward(&x, &w, 1e-5, plus_one, &dy, &mut dx);
            let loss = |x: &[f32]| {
                let y = exact(x, &w, 1e-5, plus_one);
                y.iter().zip(&dy).map(|(y, g)| y * *g as f64).sum::<f64>()
            };
            for i in 0..x.len() {
                let (mut up, mut down) = (x.clone(), x.clone());
                up[i] += 1e-2;
                down[i] -= 1e-2;
                let wanted = (loss(&up) - loss(&down)) / (up[i] as f64 - down[i] as f64);
                assert!((dx[i] as f64 - wanted).abs() <= 2e-4, "{} {wanted}", dx[i]);
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let d = 576;
        let (x, w, dy) = (wave(100 * d, 0.37), wave(d, 0.9), wave(100 * d, 1.7));
        let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        rms_norm(&x, &w, 1e-5, false, &mut y);
        rms_norm_backward(&x, &w, 1e-5, false, &dy, &mut dx);
        for at in (0..100).map(|row| row * d..(row + 1) * d) {
            let (mut own_y, mut own_dx) = (vec![0.0; d], vec![0.0; d]);
            let (own, plain) = (&x[at.clone()], CpuLevel::Portable);
            rms_norm(own, &w, 1e-5, false, &mut own_y);
            assert_eq!(own_y, y[at.clone()]);
            plain.run(Forward { x: own, weight: &w, eps: 1e-5, y: &mut own_y });
            assert_eq!(own_y, y[at.clone()]);
            let dy = &dy[at.clone()];
            plain.run(Backward { x: own, weight: &w, eps: 1e-5, dy, dx: &mut own_dx });
            assert_eq!(own_dx, dx[at]);
        }
    }
}
