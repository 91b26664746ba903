//! Exponential, hyperbolic tangent, normal distribution and the activations made of them, on
//! sixteen lanes.
//!
//! Polynomials are our own minimax fits; each function states its error against exact values.

use super::lanes::Simd;

/// `t + MAGIC` has the integer nearest to `t` in its low bits, for `|t| < 2^22`.
const MAGIC: f32 = 12_582_912.0;
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Beyond these the exponential is 0 or infinite.
const EXP_LOW: f32 = -87.6;
const EXP_HIGH: f32 = 89.0;

/// Horner's rule, highest coefficient first.
#[inline(always)]
fn polynomial<S: Simd>(s: S, x: S::V, coefficients: &[f32]) -> S::V {
    let mut sum = s.splat(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = s.fma(sum, x, s.splat(c));
    }
    sum
}

/// `MAGIC + n` and `exp(r) - 1`, where `x = n ln 2 + r` is limited to what has an exponential.
#[inline(always)]
fn split_exp<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let x = s.max(s.splat(EXP_LOW), s.min(s.splat(EXP_HIGH), x));
    let t = s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(MAGIC));
    let n = s.sub(t, s.splat(MAGIC));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let tail = [1.381_461e-3, 8.368_711e-3, 4.166_838_7e-2, 1.666_652_1e-1, 4.999_999_3e-1];
    (t, s.fma(s.mul(r, r), polynomial(s, r, &tail), r))
}

/// `exp(x)` within 1.2e-7 relative and 2 units of the last place; exactly 1 at 0, and 0 below
/// -86.99, so that no result is subnormal. The factor is `2^(n - 1)`, which has no room at the
/// lowest `n` and becomes 0.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let (t, q) = split_exp(s, x);
    let two = s.splat(2.0);
    s.mul(s.fma(q, two, two), s.add_exponent(s.splat(0.5), t))
}

/// `1 / (1 + exp(-x))` and `1 / (1 + exp(x))`, which add up to 1, both within 3e-7 relative.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let e = exp(s, s.min(x, s.sub(zero, x)));
    let large = s.div(one, s.add(one, e));
    let small = s.mul(e, large);
    (s.select_lt(x, zero, small, large), s.select_lt(x, zero, large, small))
}

/// `tanh(x)` within 3e-7 relative: `e / (e + 2)` with `e = exp(2 x) - 1`, which keeps small `x`
/// exact.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let near = s.max(s.splat(-10.0), s.min(s.splat(10.0), x));
    let (t, q) = split_exp(s, s.add(near, near));
    let scale = s.add_exponent(s.splat(1.0), t);
    let e = s.fma(scale, q, s.sub(scale, s.splat(1.0)));
    s.div(e, s.add(e, s.splat(2.0)))
}

/// The standard normal distribution at `x`: the probability of less than `x`, within 4e-7
/// relative (0 below -13.2), and the density, within 2e-7 (0 beyond 13.2).
#[inline(always)]
pub(crate) fn normal<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (zero, one, half) = (s.splat(0.0), s.splat(1.0), s.splat(-0.5));
    let size = s.max(s.sub(zero, x), x);
    let square = s.mul(x, x);
    let rest = s.fma(x, x, s.sub(zero, square));
    let e = exp(s, s.mul(square, half));
    let e = s.select_lt(zero, e, s.fma(e, s.mul(rest, half), e), e);
    let t = s.div(one, s.fma(size, s.splat(0.3), one));
    let tail = [
        -2.016_052_3e-2,
        1.099_561_7e-1,
        -2.224_811_5e-1,
        1.842_956_7e-1,
        -7.334_884e-2,
        9.299_354e-2,
        7.944_394e-2,
        1.100_191_7e-1,
        1.195_965_3e-1,
        1.196_854_9e-1,
    ];
    let beyond = s.mul(e, s.mul(t, polynomial(s, t, &tail)));
    let below = s.select_lt(zero, x, s.sub(one, beyond), beyond);
    (below, s.mul(e, s.splat(0.398_942_3)))
}

/// `x * sigmoid(x)` and its derivative.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    gated(s, x, x, s.splat(1.0))
}

/// GELU with the error function, `x` times the normal distribution, and its derivative.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (below, density) = normal(s, x);
    (s.mul(x, below), s.fma(x, density, below))
}

/// `x / 2 * (1 + tanh(u)) = x * sigmoid(2 u)` with `u = sqrt(2 / pi) (x + 0.044715 x³)`, and its
/// derivative; `u` is taken at most at 30, where the sigmoid has long been 0 or 1, so that nothing
/// overflows.
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (twice, cubic) = (s.splat(1.595_769), s.splat(0.044_715));
    let near = s.max(s.splat(-30.0), s.min(s.splat(30.0), x));
    let square = s.mul(near, near);
    let one = s.splat(1.0);
    let inner = s.mul(near, s.fma(cubic, square, one));
    let growth = s.fma(s.splat(3.0 * 0.044_715), square, one);
    gated(s, x, s.mul(twice, inner), s.mul(twice, growth))
}

/// `x * sigmoid(inner)` and its derivative, where `inner` grows by `growth`.
#[inline(always)]
fn gated<S: Simd>(s: S, x: S::V, inner: S::V, growth: S::V) -> (S::V, S::V) {
    let (open, closed) = sigmoid(s, inner);
    let value = s.mul(x, open);
    (value, s.fma(s.mul(value, closed), growth, open))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::dispatch::CpuLevel;
    use crate::kernels::slices::{Lanewise, map};

    #[derive(Clone, Copy)]
    enum Function {
        Exp,
        Sigmoid,
        Against,
        Tanh,
        Below,
        Density,
    }

    impl Lanewise for Function {
        #[inline(always)]
        fn at<S: Simd>(self, s: S, x: S::V) -> S::V {
            match self {
                Function::Exp => exp(s, x),
                Function::Sigmoid => sigmoid(s, x).0,
                Function::Against => sigmoid(s, x).1,
                Function::Tanh => tanh(s, x),
                Function::Below => normal(s, x).0,
                Function::Density => normal(s, x).1,
            }
        }
    }

    fn at(f: Function, x: f32) -> f32 {
        let mut y = [x];
        map(CpuLevel::detect(), &mut y, f);
        y[0]
    }

    /// A grid and the function on it, checking all instruction sets for equal bits.
    fn table(f: Function, low: f64, high: f64) -> (Vec<f32>, Vec<f32>) {
        let step = (high - low) / 100_003.0;
        let xs: Vec<f32> = (0..=100_003).map(|i| (low + step * i as f64) as f32).collect();
        let (mut fast, mut plain) = (xs.clone(), xs.clone());
        map(CpuLevel::detect(), &mut fast, f);
        map(CpuLevel::Portable, &mut plain, f);
        assert!(fast.iter().zip(&plain).all(|(x, y)| x.to_bits() == y.to_bits()));
        (xs, fast)
    }

    /// Largest relative error over a grid.
    fn error(f: Function, range: f64, exact: fn(f64) -> f64) -> f64 {
        let (xs, ys) = table(f, -range, range);
        let errors = xs.iter().zip(&ys).map(|(x, y)| {
            let wanted = exact(*x as f64);
            (*y as f64 - wanted).abs() / wanted.abs().max(1e-37)
        });
        errors.fold(0.0, f64::max)
    }

    /// Largest error over a grid in units of the last place of the right answer.
    fn ulps(f: Function, low: f64, high: f64, exact: fn(f64) -> f64) -> f64 {
        let (xs, ys) = table(f, low, high);
        let errors = xs.iter().zip(&ys).map(|(x, y)| {
            let wanted = exact(*x as f64);
            let size = (wanted as f32).abs();
            let ulp = f32::from_bits(size.to_bits() + 1) as f64 - size as f64;
            (*y as f64 - wanted).abs() / ulp
        });
        errors.fold(0.0, f64::max)
    }

    /// Tail of the normal distribution by its continued fraction, or the series near 0.
    fn below(x: f64) -> f64 {
        let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x.abs() < 3.0 {
            let (mut term, mut sum, mut n) = (x, x, 1.0);
            while f64::abs(term) > 1e-18 {
                term *= x * x / (n + 2.0);
                n += 2.0;
                sum += term;
            }
            return 0.5 + density * sum;
        }
        let fraction = (1..200).rev().fold(x.abs(), |f, n| x.abs() + n as f64 / f);
        if x > 0.0 { 1.0 - density / fraction } else { density / fraction }
    }

    #[test]
    fn functions_keep_their_stated_error() {
        let report = [
            ("exp", error(Function::Exp, 86.9, f64::exp), 1.2e-7),
            ("sigmoid", error(Function::Sigmoid, 86.9, |x| 1.0 / (1.0 + (-x).exp())), 3e-7),
            ("against", error(Function::Against, 86.9, |x| 1.0 / (1.0 + x.exp())), 3e-7),
            ("tanh", error(Function::Tanh, 12.0, f64::tanh), 3e-7),
            ("below", error(Function::Below, 13.0, below), 4e-7),
            (
                "density",
                error(Function::Density, 13.0, |x| (-x * x / 2.0).exp() * 0.398_942_280_401_432_7),
                2e-7,
            ),
        ];
        for (name, worst, stated) in report {
            assert!(worst <= stated, "{name}: {worst:e}");
        }
    }

    #[test]
    fn exp_and_tanh_are_right_to_a_few_units_of_the_last_place() {
        assert!(ulps(Function::Exp, -86.9, 88.7, f64::exp) <= 2.0);
        assert!(ulps(Function::Tanh, -12.0, 12.0, f64::tanh) <= 4.0);
        assert!(ulps(Function::Tanh, -1e-3, 1e-3, f64::tanh) <= 4.0);
    }

    #[test]
    fn special_arguments() {
        for (x, y) in [(0.0, 1.0), (f32::NEG_INFINITY, 0.0), (-87.0, 0.0), (-1e5, 0.0)] {
            assert_eq!(at(Function::Exp, x), y);
        }
        for x in [100.0, 1e5, f32::INFINITY] {
            assert_eq!(at(Function::Exp, x), f32::INFINITY);
        }
        assert_eq!(at(Function::Tanh, f32::NEG_INFINITY), -1.0);
        assert_eq!(at(Function::Tanh, 0.0), 0.0);
        assert_eq!(at(Function::Below, 40.0), 1.0);
        assert_eq!(at(Function::Below, -40.0), 0.0);
        for f in [Function::Exp, Function::Sigmoid, Function::Tanh, Function::Below] {
            for payload in [0, 1, 0x101, 0x1ff] {
                assert!(at(f, f32::from_bits(f32::NAN.to_bits() | payload)).is_nan());
            }
        }
    }
}
