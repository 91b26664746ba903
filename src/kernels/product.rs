//! Small products of matrices that lie as they are, without packing.

use super::lanes::{Kernel, LANES, Simd};

/// What becomes of the old number of an element.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Old {
    /// Overwritten.
    Drop,
    /// The sum starts from it: cutting the depth into several products changes no bit.
    First,
    /// Added to the finished sum.
    Last,
}

/// Rows that a product works on together, at most.
const ROWS: usize = 6;

/// `c = a b`, or that added to `c`. Each element sums over `depth` in ascending order by fused
/// multiply-adds, whatever the other sizes are.
pub(crate) struct Product<'a> {
    /// Element (row, k) of the left matrix is `a[row * a_row + k * a_step]`.
    pub a: &'a [f32],
    /// Distance of the rows of `a`.
    pub a_row: usize,
    /// Distance of the columns of `a`.
    pub a_step: usize,
    /// The right matrix, `[depth, b_row]`, of which `cols` columns are used.
    pub b: &'a [f32],
    /// Distance of the rows of `b`.
    pub b_row: usize,
    /// The result, `[rows, c_row]`, of which `cols` columns are used.
    pub c: &'a mut [f32],
    /// Distance of the rows of `c`.
    pub c_row: usize,
    /// Rows of `a` and `c`.
    pub rows: usize,
    /// Columns of `b` and `c`.
    pub cols: usize,
    /// Terms of each sum.
    pub depth: usize,
    /// What becomes of the old `c`.
    pub old: Old,
}

impl Kernel for Product<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.rows == 0 || self.depth == 0 {
            return;
        }
        self.check();
        for row in (0..self.rows).step_by(ROWS) {
            // SAFETY: checked above; as many rows are left as are taken.
            unsafe {
                match (self.rows - row, S::WIDE) {
                    (1, _) => self.rows::<S, 1, 4>(s, row),
                    (2, false) => self.rows::<S, 2, 2>(s, row),
                    (2, true) => self.rows::<S, 2, 4>(s, row),
                    (3, false) => self.rows::<S, 3, 2>(s, row),
                    (3, true) => self.rows::<S, 3, 4>(s, row),
                    (4, false) => self.rows::<S, 4, 1>(s, row),
                    (4, true) => self.rows::<S, 4, 4>(s, row),
                    (5, false) => self.rows::<S, 5, 1>(s, row),
                    (5, true) => self.rows::<S, 5, 4>(s, row),
                    (_, false) => self.rows::<S, ROWS, 1>(s, row),
                    (_, true) => self.rows::<S, ROWS, 4>(s, row),
                }
            }
        }
    }
}

impl Product<'_> {
    fn check(&self) {
        let (rows, depth, cols) = (self.rows - 1, self.depth - 1, self.cols);
        assert!(rows * self.a_row + depth * self.a_step < self.a.len());
        assert!(depth * self.b_row + cols <= self.b.len());
        assert!(rows * self.c_row + cols <= self.c.len());
    }

    /// Multiplies `R` rows from `row` on by all columns, `C` vectors of them at a time.
    ///
    /// # Safety
    /// `check` has passed, and `row + R <= rows`.
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize, const C: usize>(&mut self, s: S, row: usize) {
        let (cols, wide) = (self.cols, self.cols / (C * LANES) * (C * LANES));
        let whole = cols / LANES * LANES;
        // SAFETY: the caller's promise; no block goes beyond `cols`.
        unsafe {
            for col in (0..wide).step_by(C * LANES) {
                self.block::<S, R, C>(s, row, col, LANES);
            }
            for col in (wide..whole).step_by(LANES) {
                self.block::<S, R, 1>(s, row, col, LANES);
            }
            if whole < cols {
                self.block::<S, R, 1>(s, row, whole, cols - whole);
            }
        }
    }

    /// Multiplies `R` rows from `row` on by `C` vectors of columns from `col` on, each of the
    /// first `n` lanes.
    ///
    /// # Safety
    /// `check` has passed, `row + R <= rows`, `col + (C - 1) * 16 + n <= cols` and `n <= 16`.
    #[inline(always)]
    unsafe fn block<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        row: usize,
        col: usize,
        n: usize,
    ) {
        // SAFETY: by `check`, every offset below lies inside its slice.
        unsafe {
            let c = self.c.as_mut_ptr().add(row * self.c_row + col);
            let at = |i: usize, j: usize| c.add(i * self.c_row + j * LANES);
            let mut sums = [[s.splat(0.0); C]; R];
            if self.old == Old::First {
                sums = std::array::from_fn(|i| std::array::from_fn(|j| load(s, at(i, j), n)));
            }
            let mut a = self.a.as_ptr().add(row * self.a_row);
            let mut b = self.b.as_ptr().add(col);
            for _ in 0..self.depth {
                let right: [S::V; C] = std::array::from_fn(|j| load(s, b.add(j * LANES), n));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let left = s.splat(*a.add(i * self.a_row));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = s.fma(left, right, *sum);
                    }
                }
                a = a.wrapping_add(self.a_step);
                b = b.wrapping_add(self.b_row);
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (j, mut sum) in sums.into_iter().enumerate() {
                    if self.old == Old::Last {
                        sum = s.add(load(s, at(i, j), n), sum);
                    }
                    s.store_part(std::slice::from_raw_parts_mut(at(i, j), n), sum);
                }
            }
        }
    }
}

/// The first `n` lanes.
///
/// # Safety
/// So many floats, at most sixteen, can be read.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, x: *const f32, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    s.load_part(unsafe { std::slice::from_raw_parts(x, n) })
}

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

impl Kernel for Dots<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (m, n) = (self.a.len() / self.width, self.b.len() / self.width);
        assert!(self.c.len() == m * n);
        for i in (0..m).step_by(2) {
            for j in (0..n).step_by(3) {
                match ((m - i).min(2), (n - j).min(3)) {
                    (2, 3) => self.tile::<S, 2, 3>(s, i, j, n),
                    (2, 2) => self.tile::<S, 2, 2>(s, i, j, n),
                    (2, _) => self.tile::<S, 2, 1>(s, i, j, n),
                    (_, 3) => self.tile::<S, 1, 3>(s, i, j, n),
                    (_, 2) => self.tile::<S, 1, 2>(s, i, j, n),
                    _ => self.tile::<S, 1, 1>(s, i, j, n),
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

    /// `c` after a product of any of these sizes, by plain loops in the promised order.
    fn plain(a: &[f32], b: &[f32], c: &[f32], depth: usize, cols: usize, old: Old) -> Vec<f32> {
        let sum = |at: usize| {
            let start = if old == Old::First { c[at] } else { 0.0 };
            let (i, j) = (at / cols, at % cols);
            let sum =
                (0..depth).fold(start, |sum, k| a[i * depth + k].mul_add(b[k * cols + j], sum));
            if old == Old::Last { c[at] + sum } else { sum }
        };
        (0..c.len()).map(sum).collect()
    }

    #[test]
    fn products_are_chains_in_the_order_of_depth() {
        for (rows, depth, cols) in [(1, 5, 70), (2, 3, 33), (9, 8, 16), (11, 1, 7), (28, 9, 128)] {
            let (a, b, c) = (noise(1, rows * depth), noise(2, depth * cols), noise(3, rows * cols));
            let flipped: Vec<f32> =
                (0..a.len()).map(|at| a[at % rows * depth + at / rows]).collect();
            for old in [Old::Drop, Old::First, Old::Last] {
                let want = plain(&a, &b, &c, depth, cols, old);
                for level in [CpuLevel::Portable, CpuLevel::Avx2, CpuLevel::Avx512] {
                    for (a, a_row, a_step) in [(&a, depth, 1), (&flipped, 1, rows)] {
                        let (mut c, b_row, c_row) = (c.clone(), cols, cols);
                        let b = &b;
                        let c_all = &mut c[..];
                        level.run(Product {
                            a,
                            a_row,
                            a_step,
                            b,
                            b_row,
                            c: c_all,
                            c_row,
                            rows,
                            cols,
                            depth,
                            old,
                        });
                        assert_eq!(c, want);
                    }
                }
            }
        }
    }

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
