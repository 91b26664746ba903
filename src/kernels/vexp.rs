//! Exponential, hyperbolic tangent and reductions over slices, sixteen lanes at a time.
//!
//! Every level runs the same operations, so results have the same bits on every CPU, and an
//! element's result does not depend on its place. Sums and maxima take element `i` into lane
//! `i mod 16` and fold the lanes in a fixed order.

use super::dispatch::{CpuLevel, SimdTask, dispatch};
use super::simd::{LANES, Simd};

/// Replaces each element by its exponential (within 2 ulp; gradual underflow; 0 at minus
/// infinity exactly; NaN stays NaN).
pub fn exp_slice(xs: &mut [f32]) {
    map(CpuLevel::detect(), xs, Exp);
}

/// Replaces each element by its hyperbolic tangent (within 4 ulp).
pub fn tanh_slice(xs: &mut [f32]) {
    map(CpuLevel::detect(), xs, Tanh);
}

/// `exp(x)` of one number, with the bits of [`exp_slice`].
pub fn exp(x: f32) -> f32 {
    let mut one = [x];
    exp_slice(&mut one);
    one[0]
}

/// The largest element; minus infinity for an empty slice.
pub fn max(xs: &[f32]) -> f32 {
    // SAFETY: the task holds a slice.
    unsafe { dispatch(CpuLevel::detect(), Max(xs)) }
}

/// The sum of the elements.
pub fn sum(xs: &[f32]) -> f32 {
    // SAFETY: the task holds a slice.
    unsafe { dispatch(CpuLevel::detect(), Sum(xs)) }
}

/// `exp(x)`: `x = n ln 2 + r`, the Taylor polynomial of degree 7 at `r`, then `2^n` in two steps
/// so that subnormal results round once.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(crate) unsafe fn exp_lanes<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic only.
    unsafe {
        let (n, q) = split_exp::<S>(x);
        let (low, high) = halves::<S>(n);
        S::mul(S::mul(S::add(q, S::splat(1.0)), low), high)
    }
}

/// `tanh(x) = e / (e + 2)` with `e = exp(2 x) - 1`, which keeps small `x` exact.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(crate) unsafe fn tanh_lanes<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic only.
    unsafe {
        let clamped = S::max(S::splat(-10.0), S::min(S::splat(10.0), x));
        let (n, q) = split_exp::<S>(S::add(clamped, clamped));
        let scale = S::pow2(n);
        let e = S::mul_add(scale, q, S::sub(scale, S::splat(1.0)));
        S::div(e, S::add(e, S::splat(2.0)))
    }
}

/// `n` and `exp(r) - 1` of `x = n ln 2 + r`; `x` is limited to where `f32` overflows or is 0.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn split_exp<S: Simd>(x: S::V) -> (S::V, S::V) {
    /// `ln 2` in two parts, the first with trailing zeros so that `n` times it is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const SMALLEST: f32 = -104.0;
    const LARGEST: f32 = 89.0;
    // SAFETY: arithmetic only.
    unsafe {
        let x = S::max(S::splat(SMALLEST), S::min(S::splat(LARGEST), x));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::mul_add(n, S::splat(-LN2[0]), x);
        let r = S::mul_add(n, S::splat(-LN2[1]), r);
        let mut p = S::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
            p = S::mul_add(p, r, S::splat(c));
        }
        (n, S::mul_add(S::mul(r, r), p, r))
    }
}

/// Powers of two whose product is `2^n`, `n` in -150..=129.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn halves<S: Simd>(n: S::V) -> (S::V, S::V) {
    // SAFETY: arithmetic only.
    unsafe {
        let half = S::round(S::mul(n, S::splat(0.5)));
        (S::pow2(half), S::pow2(S::sub(n, half)))
    }
}

/// A function of one vector.
pub(crate) trait Lanewise: Copy {
    /// # Safety
    /// The CPU has the features of `S`.
    unsafe fn at<S: Simd>(self, x: S::V) -> S::V;
}

/// The exponential.
#[derive(Clone, Copy)]
pub(crate) struct Exp;

impl Lanewise for Exp {
    #[inline(always)]
    unsafe fn at<S: Simd>(self, x: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { exp_lanes::<S>(x) }
    }
}

/// The hyperbolic tangent.
#[derive(Clone, Copy)]
pub(crate) struct Tanh;

impl Lanewise for Tanh {
    #[inline(always)]
    unsafe fn at<S: Simd>(self, x: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { tanh_lanes::<S>(x) }
    }
}

/// Applies `f` in place.
pub(crate) fn map<F: Lanewise>(level: CpuLevel, xs: &mut [f32], f: F) {
    // SAFETY: the task holds a slice.
    unsafe { dispatch(level, Map(xs, f)) }
}

struct Map<'a, F>(&'a mut [f32], F);

impl<F: Lanewise> SimdTask for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut chunks = self.0.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            // SAFETY: a chunk is sixteen elements.
            unsafe {
                S::store(chunk.as_mut_ptr(), self.1.at::<S>(S::load(chunk.as_ptr())));
            }
        }
        let rest = chunks.into_remainder();
        let mut last = padded(rest, 0.0);
        // SAFETY: the padded rest is sixteen elements.
        unsafe { S::store(last.as_mut_ptr(), self.1.at::<S>(S::load(last.as_ptr()))) };
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// At most sixteen elements, filled up with `fill`.
#[inline(always)]
pub(crate) fn padded(rest: &[f32], fill: f32) -> [f32; LANES] {
    let mut lanes = [fill; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

/// The largest element.
pub(crate) struct Max<'a>(pub(crate) &'a [f32]);

impl SimdTask for Max<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: chunks and the padded rest are sixteen elements.
        unsafe {
            let mut best = S::splat(f32::NEG_INFINITY);
            let chunks = self.0.chunks_exact(LANES);
            let last = padded(chunks.remainder(), f32::NEG_INFINITY);
            for chunk in chunks {
                best = S::max(S::load(chunk.as_ptr()), best);
            }
            S::reduce_max(S::max(S::load(last.as_ptr()), best))
        }
    }
}

/// The sum of the elements.
pub(crate) struct Sum<'a>(pub(crate) &'a [f32]);

impl SimdTask for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: chunks and the padded rest are sixteen elements.
        unsafe {
            let mut total = S::splat(0.0);
            let chunks = self.0.chunks_exact(LANES);
            let last = padded(chunks.remainder(), 0.0);
            for chunk in chunks {
                total = S::add(total, S::load(chunk.as_ptr()));
            }
            S::reduce_add(S::add(total, S::load(last.as_ptr())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the right answer.
    fn ulps(got: f32, want: f64) -> f64 {
        let want32 = want as f32;
        let ulp = f64::from(f32::from_bits(want32.abs().to_bits() + 1)) - f64::from(want32.abs());
        (f64::from(got) - want).abs() / ulp
    }

    fn samples(low: f32, high: f32) -> Vec<f32> {
        (0..100_003).map(|i| low + (high - low) * i as f32 / 100_003.0).collect()
    }

    #[test]
    fn exp_is_within_two_ulp_and_the_limits_are_exact() {
        let xs = samples(-103.5, 88.7);
        let mut ys = xs.clone();
        exp_slice(&mut ys);
        for (x, y) in xs.iter().zip(&ys) {
            assert!(ulps(*y, f64::from(*x).exp()) <= 2.0, "exp({x}) = {y}");
        }
        assert_eq!([exp(0.0), exp(f32::NEG_INFINITY), exp(-200.0)], [1.0, 0.0, 0.0]);
        assert_eq!([exp(f32::INFINITY), exp(100.0)], [f32::INFINITY; 2]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_four_ulp() {
        let mut xs = samples(-12.0, 12.0);
        xs.extend(samples(-1e-3, 1e-3));
        let mut ys = xs.clone();
        tanh_slice(&mut ys);
        for (x, y) in xs.iter().zip(&ys) {
            assert!(ulps(*y, f64::from(*x).tanh()) <= 4.0, "tanh({x}) = {y}");
        }
    }

    #[test]
    fn levels_and_places_give_the_same_bits() {
        let xs = samples(-90.0, 80.0);
        for len in [1, 15, 16, 17, 1000] {
            let (mut best, mut plain) = (xs[..len].to_vec(), xs[..len].to_vec());
            map(CpuLevel::detect(), &mut best, Exp);
            map(CpuLevel::Portable, &mut plain, Exp);
            assert_eq!(best, plain);
            assert_eq!(best[len - 1], exp(xs[len - 1]));
            // SAFETY: the tasks hold slices.
            unsafe {
                let level = CpuLevel::detect();
                assert_eq!(dispatch(level, Sum(&xs)), dispatch(CpuLevel::Portable, Sum(&xs)));
                assert_eq!(dispatch(level, Max(&xs)), dispatch(CpuLevel::Portable, Max(&xs)));
            }
        }
    }

    #[test]
    fn reductions_agree_with_plain_loops() {
        let xs = samples(-3.0, 2.0);
        assert_eq!(max(&xs), xs[xs.len() - 1]);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        let want: f64 = xs.iter().map(|&x| f64::from(x)).sum();
        assert!((f64::from(sum(&xs)) - want).abs() < 1e-5 * xs.len() as f64);
    }
}
