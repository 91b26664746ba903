//! Functions applied to slices, sixteen lanes at a time. An element's result does not depend on
//! its place.

use half::bf16;

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::parallel::{for_each, task_len};

/// Room for the result of a kernel that writes all of it; the values in it mean nothing. Zeroing it
/// would cost one thread as long as writing the result costs all of them.
pub(crate) fn room(len: usize) -> Vec<f32> {
    // SAFETY: every bit pattern is an f32, and no kernel reads what it has not written.
    unsafe { room_of(len) }
}

/// As [`room`], for elements of any kind; in tests all their bits are set, which makes numbers NaN.
///
/// # Safety
/// Every bit pattern is a `T`, and nobody reads what he has not written.
#[allow(clippy::uninit_vec)] // the caller's promise
pub(crate) unsafe fn room_of<T: Copy>(len: usize) -> Vec<T> {
    let mut values: Vec<T> = Vec::with_capacity(len);
    // SAFETY: there is room for so many, and the caller's promise.
    unsafe {
        if cfg!(any(test, debug_assertions)) {
            values.as_mut_ptr().write_bytes(0xff, len);
        }
        values.set_len(len);
    }
    values
}

/// `x` again.
pub fn copied(x: &[f32]) -> Vec<f32> {
    let (task, mut y) = (task_len(1), room(x.len()));
    for_each(y.chunks_mut(task).zip(x.chunks(task)), |(y, x)| y.copy_from_slice(x));
    y
}

/// Rows of `width` numbers, one after the other.
pub fn gathered(rows: &[&[f32]], width: usize) -> Vec<f32> {
    gather(rows, width, |y, row| y.copy_from_slice(row))
}

/// [`gathered`] from rows of bf16.
pub fn gathered_bf16(rows: &[&[bf16]], width: usize) -> Vec<f32> {
    gather(rows, width, |y, row| y.iter_mut().zip(row).for_each(|(y, x)| *y = widened_bf16(*x)))
}

fn gather<T: Sync>(
    rows: &[&[T]],
    width: usize,
    copy: impl Fn(&mut [f32], &[T]) + Sync,
) -> Vec<f32> {
    let (task, mut y) = (task_len(width), room(rows.len() * width));
    let tasks = y.chunks_mut(task.max(1)).zip(rows.chunks((task / width.max(1)).max(1)));
    for_each(tasks, |(y, rows)| {
        y.chunks_exact_mut(width).zip(rows).for_each(|(y, row)| copy(y, row));
    });
    y
}

/// A bf16 number as f32; unlike that of `half` it looks for no NaN, which keeps loops of it fast.
#[inline(always)]
pub fn widened_bf16(x: bf16) -> f32 {
    f32::from_bits((x.to_bits() as u32) << 16)
}

/// Numbers that are bf16 already, [`rounded_to_bf16`], in half the memory, at the end of `to`.
pub fn narrow_bf16(x: &[f32], to: &mut Vec<bf16>) {
    CpuLevel::detect().run(Narrow(x, to));
}

struct Narrow<'a>(&'a [f32], &'a mut Vec<bf16>);

impl Kernel for Narrow<'_> {
    /// A plain loop, of the instructions that the level has.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.1.extend(self.0.iter().map(|x| bf16::from_bits((x.to_bits() >> 16) as u16)));
    }
}

/// `x` rounded to the nearest bf16 numbers (ties to even).
pub fn rounded_to_bf16(x: &[f32]) -> Vec<f32> {
    let (level, task, mut y) = (CpuLevel::detect(), task_len(1), room(x.len()));
    for_each(y.chunks_mut(task).zip(x.chunks(task)), |(y, x)| {
        y.copy_from_slice(x);
        map(level, y, RoundToBf16);
    });
    y
}

#[derive(Clone, Copy)]
struct RoundToBf16;

impl Lanewise for RoundToBf16 {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.round_bf16(x)
    }
}

/// `a + b`, element by element.
pub fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    assert!(a.len() == b.len(), "lengths disagree");
    let (task, mut y) = (task_len(1), room(a.len()));
    for_each(y.chunks_mut(task).zip(a.chunks(task).zip(b.chunks(task))), |(y, (a, b))| {
        y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = a + b);
    });
    y
}

/// `a += b`, element by element.
pub fn add_to(a: &mut [f32], b: &[f32]) {
    assert!(a.len() == b.len(), "lengths disagree");
    let task = task_len(1);
    for_each(a.chunks_mut(task).zip(b.chunks(task)), |(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    });
}

/// Adds `row` to every row of `x [M, row.len()]`.
pub fn add_to_rows(x: &mut [f32], row: &[f32]) {
    for_each(x.chunks_mut(task_len(row.len())), |x| {
        for x in x.chunks_exact_mut(row.len().max(1)) {
            x.iter_mut().zip(row).for_each(|(x, b)| *x += b);
        }
    });
}

/// `x[i] *= factor` where bit `i` of `mask` is set, `x[i] *= 0` elsewhere.
pub fn mask(x: &mut [f32], mask: &[u64], factor: f32) {
    let words = task_len(1) / 64;
    for_each(x.chunks_mut(64 * words).zip(mask.chunks(words)), |(x, mask)| {
        for (x, bits) in x.chunks_mut(64).zip(mask) {
            let factor = |i: usize| if bits >> i & 1 == 1 { factor } else { 0.0 };
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= factor(i));
        }
    });
}

/// A function of one vector.
pub(crate) trait Lanewise: Copy {
    /// The function at `x`; mark it `#[inline(always)]`.
    fn at<S: Simd>(self, s: S, x: S::V) -> S::V;
}

/// Applies `f` in place.
pub(crate) fn map<F: Lanewise>(level: CpuLevel, xs: &mut [f32], f: F) {
    level.run(Map(xs, f));
}

struct Map<'a, F>(&'a mut [f32], F);

impl<F: Lanewise> Kernel for Map<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.0.chunks_mut(LANES) {
            s.store_part(x, self.1.at(s, s.load_part(x)));
        }
    }
}

/// The largest element; minus infinity for an empty slice.
pub(crate) fn max(level: CpuLevel, xs: &[f32]) -> f32 {
    level.run(Max(xs))
}

struct Max<'a>(&'a [f32]);

impl Kernel<f32> for Max<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.0.as_chunks();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut best = s.load(&last);
        for x in whole {
            best = s.max(s.load(x), best);
        }
        s.top(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::noise;

    #[test]
    fn sums_and_masks_are_those_of_plain_loops() {
        let n = 40_007;
        let (a, b) = (noise(1, n), noise(2, n));
        let both = sum(&a, &b);
        assert!((0..n).all(|i| both[i] == a[i] + b[i]));
        assert!(copied(&a) == a);
        let nearest: Vec<f32> = a.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
        assert!(rounded_to_bf16(&a) == nearest && nearest != a);
        let mut more = a.clone();
        add_to(&mut more, &b);
        assert!(more == both);
        let mut rows = a[..n - 7].to_vec();
        add_to_rows(&mut rows, &b[..1000]);
        assert!((0..n - 7).all(|i| rows[i] == a[i] + b[i % 1000]));
        let bits: Vec<u64> = (0..n.div_ceil(64) as u64).map(|i| i.wrapping_mul(!0 / 3)).collect();
        let mut masked = a.clone();
        mask(&mut masked, &bits, 1.5);
        let factor = |i: usize| if bits[i / 64] >> (i % 64) & 1 == 1 { 1.5 } else { 0.0 };
        assert!((0..n).all(|i| masked[i] == a[i] * factor(i)));
    }

    #[test]
    fn bf16_numbers_come_back_from_half_the_memory_row_by_row() {
        let (rows, width) = (50, 577);
        let x = rounded_to_bf16(&noise(1, rows * width));
        let mut half = vec![bf16::ONE];
        narrow_bf16(&x, &mut half);
        assert_eq!((half.len(), half[0]), (1 + x.len(), bf16::ONE));
        let of = |row: usize| &half[1 + row * width..1 + (row + 1) * width];
        let order: Vec<usize> = (0..rows).map(|i| i * 7 % rows).collect();
        let wanted: Vec<&[f32]> =
            order.iter().map(|row| &x[row * width..(row + 1) * width]).collect();
        let picked: Vec<_> = order.iter().map(|row| of(*row)).collect();
        assert!(gathered_bf16(&picked, width) == wanted.concat());
        assert!(gathered(&wanted, width) == wanted.concat());
    }

    #[derive(Clone, Copy)]
    struct Square;

    impl Lanewise for Square {
        #[inline(always)]
        fn at<S: Simd>(self, s: S, x: S::V) -> S::V {
            s.mul(x, x)
        }
    }

    #[test]
    fn levels_and_places_give_the_same_bits_as_plain_loops() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let xs = noise(3, len);
            for level in [CpuLevel::Portable, CpuLevel::Avx2, CpuLevel::Avx512] {
                let mut squares = xs.clone();
                map(level, &mut squares, Square);
                assert!(squares.iter().zip(&xs).all(|(y, x)| *y == x * x));
                assert_eq!(max(level, &xs), xs.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
    }
}
