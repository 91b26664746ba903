//! Dot products of all rows of one matrix with all rows of another, without packing.

use super::lanes::{Kernel, LANES, Simd};

/// `c[i][j]` is the dot product of row `i` of `a` and row `j` of `b`: `a [m, width]`,
/// `b [n, width]`, `c [m, n]`. Each sum runs over sixteen lanes in ascending order, then over the
/// lanes, whatever `m` and `n` are.
pub(crate) struct Dots<'a> {
    /// The left rows.
    pub a: &'a [f32],
    /// The right rows.
    pub b: &'a [f32],
    /// Length of a row.
    pub width: usize,
    /// The result.
    pub c: &'a mut [f32],
}

/// Left rows that stay in the first-level cache while all right rows pass.
const NEAR_ROWS: usize = 8;

impl Kernel for Dots<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (m, n) = (self.a.len() / self.width, self.b.len() / self.width);
        assert!(self.c.len() == m * n);
        for first in (0..m).step_by(NEAR_ROWS) {
            let end = m.min(first + NEAR_ROWS);
            for j in (0..n).step_by(if S::WIDE { 4 } else { 3 }) {
                for i in (first..end).step_by(2) {
                    match ((end - i).min(2), n - j, S::WIDE) {
                        (2, 4.., true) => self.tile::<S, 2, 4>(s, i, j, n),
                        (2, 3.., _) => self.tile::<S, 2, 3>(s, i, j, n),
                        (2, 2, _) => self.tile::<S, 2, 2>(s, i, j, n),
                        (2, _, _) => self.tile::<S, 2, 1>(s, i, j, n),
                        (_, 4.., true) => self.tile::<S, 1, 4>(s, i, j, n),
                        (_, 3.., _) => self.tile::<S, 1, 3>(s, i, j, n),
                        (_, 2, _) => self.tile::<S, 1, 2>(s, i, j, n),
                        _ => self.tile::<S, 1, 1>(s, i, j, n),
                    }
                }
            }
        }
    }
}

impl Dots<'_> {
    /// Row `i` of `x` as whole vectors and what is left over.
    #[inline(always)]
    fn row<'x>(&self, x: &'x [f32], i: usize) -> (&'x [[f32; LANES]], &'x [f32]) {
        x[i * self.width..(i + 1) * self.width].as_chunks()
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        i: usize,
        j: usize,
        n: usize,
    ) {
        let a: [_; R] = std::array::from_fn(|r| self.row(self.a, i + r));
        let b: [_; C] = std::array::from_fn(|c| self.row(self.b, j + c));
        let mut sums = [[s.splat(0.0); C]; R];
        let whole = self.width / LANES;
        let (left, right) = (a.map(|x| &x.0[..whole]), b.map(|x| &x.0[..whole]));
        for k in 0..whole {
            let right: [S::V; C] = std::array::from_fn(|c| s.load(&right[c][k]));
            for r in 0..R {
                let left = s.load(&left[r][k]);
                for c in 0..C {
                    sums[r][c] = s.fma(left, right[c], sums[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let mut sum = sums[r][c];
                if !a[r].1.is_empty() {
                    sum = s.fma(s.load_part(a[r].1), s.load_part(b[c].1), sum);
                }
                self.c[(i + r) * n + j + c] = s.sum(sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::dispatch::CpuLevel;
    use crate::kernels::testing::noise;

    #[test]
    fn dots_are_right_and_do_not_depend_on_the_other_rows_or_the_level() {
        for (m, n, width) in [(1, 1, 5), (5, 8, 33), (3, 7, 48), (4, 2, 600)] {
            let (a, b) = (noise(1, m * width), noise(2, n * width));
            let mut c = vec![0.0; m * n];
            CpuLevel::detect().run(Dots { a: &a, b: &b, width, c: &mut c });
            for (at, c) in c.iter().enumerate() {
                let a = &a[at / n * width..(at / n + 1) * width];
                let b = &b[at % n * width..(at % n + 1) * width];
                let want: f64 = a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum();
                assert!((*c as f64 - want).abs() < 1e-5);
                let mut own = [0.0];
                CpuLevel::Portable.run(Dots { a, b, width, c: &mut own });
                assert_eq!(own[0], *c);
            }
        }
    }
}
