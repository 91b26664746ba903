//! Small products of matrices that lie as they are, without packing.

use super::lanes::{Kernel, LANES, Simd};
use super::prefetch::Lines;

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

/// Rows that a product works on together, at most: with wide registers as many as adapters mostly have
/// ranks, so that they read the right matrix once.
const fn most_rows<S: Simd>() -> usize {
    if S::WIDE { 8 } else { 6 }
}

/// Numbers of the right matrix, widened to `f32` when loaded: `f32`, or bf16 bits, of which two neighbouring
/// rows lie together, column by column.
pub(crate) trait Right: Copy {
    /// Rows of the matrix that lie together.
    const TOGETHER: usize;

    /// The first `n` columns of the first of the rows that lie together.
    ///
    /// # Safety
    /// So many columns, at most sixteen, can be read; all sixteen where rows lie together.
    unsafe fn first<S: Simd>(s: S, at: *const Self, n: usize) -> S::V;

    /// As [`first`](Self::first), of the second row.
    ///
    /// # Safety
    /// As of [`first`](Self::first); there is a second row.
    unsafe fn second<S: Simd>(s: S, at: *const Self, n: usize) -> S::V;
}

impl Right for f32 {
    const TOGETHER: usize = 1;

    #[inline(always)]
    unsafe fn first<S: Simd>(s: S, at: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { load(s, at, n) }
    }

    #[inline(always)]
    unsafe fn second<S: Simd>(s: S, at: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { load(s, at, n) }
    }
}

impl Right for u16 {
    const TOGETHER: usize = 2;

    #[inline(always)]
    unsafe fn first<S: Simd>(s: S, at: *const u16, _: usize) -> S::V {
        // SAFETY: the caller's promise.
        s.load_even(unsafe { &*at.cast() })
    }

    #[inline(always)]
    unsafe fn second<S: Simd>(s: S, at: *const u16, _: usize) -> S::V {
        // SAFETY: the caller's promise.
        s.load_odd(unsafe { &*at.cast() })
    }
}

/// `c = a b`, or that added to `c`. Each element sums over `depth` in ascending order by fused
/// multiply-adds, whatever the other sizes are.
pub(crate) struct Product<'a, B = f32> {
    /// Element (row, k) of the left matrix is `a[row * a_row + k * a_step]`.
    pub a: &'a [f32],
    /// Distance of the rows of `a`.
    pub a_row: usize,
    /// Distance of the columns of `a`.
    pub a_step: usize,
    /// The right matrix, of which `depth` rows and `cols` columns are used.
    pub b: &'a [B],
    /// Distance of the rows of `b`, or of those that lie together.
    pub b_row: usize,
    /// Distance of neighbouring vectors of columns of `b`: where its rows lie in one piece sixteen for each
    /// row that lies together.
    pub b_vector: usize,
    /// What is fetched meanwhile, a line for each that is read of `b`; those that are left come back.
    pub fetch: &'a mut Lines,
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

impl<B: Right> Kernel for Product<'_, B> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.rows == 0 || self.depth == 0 || self.cols == 0 {
            return;
        }
        self.check();
        let most = const { most_rows::<S>() };
        for row in (0..self.rows).step_by(most) {
            // SAFETY: checked above; as many rows are left as are taken.
            unsafe {
                match ((self.rows - row).min(most), S::WIDE) {
                    (1, _) => self.rows::<S, 1, 4>(s, row),
                    (2, false) => self.rows::<S, 2, 2>(s, row),
                    (2, true) => self.rows::<S, 2, 4>(s, row),
                    (3, false) => self.rows::<S, 3, 2>(s, row),
                    (3, true) => self.rows::<S, 3, 4>(s, row),
                    (4, false) => self.rows::<S, 4, 1>(s, row),
                    (4, true) => self.rows::<S, 4, 2>(s, row),
                    (5, false) => self.rows::<S, 5, 1>(s, row),
                    (5, true) => self.rows::<S, 5, 2>(s, row),
                    (6, false) => self.rows::<S, 6, 1>(s, row),
                    (6, true) => self.rows::<S, 6, 2>(s, row),
                    (7, _) => self.rows::<S, 7, 2>(s, row),
                    (_, _) => self.rows::<S, 8, 2>(s, row),
                }
            }
        }
    }
}

impl<B: Right> Product<'_, B> {
    fn check(&self) {
        let (rows, depth, cols) = (self.rows - 1, self.depth - 1, self.cols);
        let (vectors, lanes) = ((cols - 1) / LANES, (cols - 1) % LANES);
        assert!(rows * self.a_row + depth * self.a_step < self.a.len());
        let together = B::TOGETHER;
        assert!(vectors == 0 || self.b_vector >= together * LANES);
        assert!(together == 1 || lanes == LANES - 1);
        let last = depth / together * self.b_row + vectors * self.b_vector + together * lanes;
        assert!(last + together <= self.b.len());
        assert!(rows * self.c_row + cols <= self.c.len());
    }

    /// Multiplies `R` rows from `row` on by all columns, `C` vectors of them at a time.
    ///
    /// # Safety
    /// `check` has passed, and `row + R <= rows`.
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize, const C: usize>(&mut self, s: S, row: usize) {
        let (cols, whole) = (self.cols, self.cols / LANES * LANES);
        let mut wide = cols / (C * LANES) * (C * LANES);
        // SAFETY: the caller's promise; no block goes beyond `cols`.
        unsafe {
            for col in (0..wide).step_by(C * LANES) {
                self.block::<S, R, C>(s, row, col, LANES);
            }
            if C > 2 && whole - wide >= 2 * LANES {
                self.block::<S, R, 2>(s, row, wide, LANES);
                wide += 2 * LANES;
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
    #[allow(clippy::needless_range_loop)] // the indices are also offsets of the pointers
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
                for i in 0..R {
                    for j in 0..C {
                        sums[i][j] = load(s, at(i, j), n);
                    }
                }
            }
            let mut a = self.a.as_ptr().add(row * self.a_row);
            let mut b = self.b.as_ptr().add(col / LANES * self.b_vector);
            let mut right = [s.splat(0.0); C];
            let mut fetch = *self.fetch;
            for left_over in (0..self.depth.div_ceil(B::TOGETHER)).rev() {
                for j in 0..C {
                    right[j] = B::first(s, b.add(j * self.b_vector), n);
                }
                fetch.some::<C>();
                self.add::<S, R, C>(s, a, &right, &mut sums);
                a = a.wrapping_add(self.a_step);
                if B::TOGETHER == 2 && (left_over > 0 || self.depth.is_multiple_of(2)) {
                    for j in 0..C {
                        right[j] = B::second(s, b.add(j * self.b_vector), n);
                    }
                    self.add::<S, R, C>(s, a, &right, &mut sums);
                    a = a.wrapping_add(self.a_step);
                }
                b = b.wrapping_add(self.b_row);
            }
            *self.fetch = fetch;
            for i in 0..R {
                for j in 0..C {
                    if self.old == Old::Last {
                        sums[i][j] = s.add(load(s, at(i, j), n), sums[i][j]);
                    }
                    s.store_part(std::slice::from_raw_parts_mut(at(i, j), n), sums[i][j]);
                }
            }
        }
    }

    /// Adds the products of `R` numbers from `a` on with a row of the right matrix to their sums.
    ///
    /// # Safety
    /// So many rows of `a` are there.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // the indices are also offsets of the pointers
    unsafe fn add<S: Simd, const R: usize, const C: usize>(
        &self,
        s: S,
        a: *const f32,
        right: &[S::V; C],
        sums: &mut [[S::V; C]; R],
    ) {
        for i in 0..R {
            // SAFETY: the caller's promise.
            let left = s.splat(unsafe { *a.add(i * self.a_row) });
            for j in 0..C {
                sums[i][j] = s.fma(left, right[j], sums[i][j]);
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
                            b_vector: LANES,
                            fetch: &mut Lines::none(),
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
    fn rows_of_bf16_that_lie_together_are_multiplied_as_rows_of_f32() {
        for (rows, depth, cols) in [(1, 6, 64), (3, 7, 64), (6, 1, 32), (8, 64, 48), (9, 3, 16)] {
            let (a, c) = (noise(1, rows * depth), noise(3, rows * cols));
            let wide: Vec<f32> = noise(2, depth * cols)
                .iter()
                .map(|x| f32::from_bits(x.to_bits() & 0xffff_0000))
                .collect();
            // what lies beside an odd last row is no number
            let mut b = vec![0x7fc0u16; depth.next_multiple_of(2) * cols];
            for (at, x) in wide.iter().enumerate() {
                let (row, col) = (at / cols, at % cols);
                b[row / 2 * 2 * cols + 2 * col + row % 2] = (x.to_bits() >> 16) as u16;
            }
            for old in [Old::Drop, Old::First, Old::Last] {
                let want = plain(&a, &wide, &c, depth, cols, old);
                for level in [CpuLevel::Portable, CpuLevel::Avx2, CpuLevel::Avx512] {
                    for lines in [0, 1, 1 << 20] {
                        let (mut c, mut fetch) = (c.clone(), Lines::new(1 << 40, lines));
                        level.run(Product {
                            a: &a,
                            a_row: depth,
                            a_step: 1,
                            b: &b[..],
                            b_row: 2 * cols,
                            b_vector: 2 * LANES,
                            fetch: &mut fetch,
                            c: &mut c,
                            c_row: cols,
                            rows,
                            cols,
                            depth,
                            old,
                        });
                        assert_eq!(c, want);
                        assert_eq!(fetch.are_left(), lines == 1 << 20);
                    }
                }
            }
        }
    }
}
