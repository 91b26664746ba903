//! Exponential, hyperbolic tangent and normal distribution on sixteen lanes.
//!
//! Polynomials are our own minimax fits; each function states its error against exact values.

use super::lanes::Simd;

/// `t + MAGIC` has the integer nearest to `t` in its low bits, for `|t| < 2^22`.
const MAGIC: f32 = 12_582_912.0;
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Arguments outside give 0 or infinity.
const EXP_LOW: f32 = -87.336;
const EXP_HIGH: f32 = 88.722;

/// Horner's rule, highest coefficient first.
#[inline(always)]
fn polynomial<S: Simd>(s: S, x: S::V, coefficients: &[f32]) -> S::V {
    let mut sum = s.splat(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = s.fma(sum, x, s.splat(c));
    }
    sum
}

/// `exp(x)` within 1.2e-7 relative; exactly 1 at 0, 0 below -87.336, infinity above 88.722.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let (low, high) = (s.splat(EXP_LOW), s.splat(EXP_HIGH));
    let inside = s.max(low, s.min(high, x));
    let t = s.fma(inside, s.splat(std::f32::consts::LOG2_E), s.splat(MAGIC));
    let n = s.sub(t, s.splat(MAGIC));
    let r = s.fma(n, s.splat(-LN2_HIGH), inside);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let tail = [1.381_461e-3, 8.368_711e-3, 4.166_838_7e-2, 1.666_652_1e-1, 4.999_999_3e-1];
    let tail = polynomial(s, r, &tail);
    let one = s.splat(1.0);
    let value = s.add_exponent(s.add(s.fma(s.mul(r, r), tail, r), one), t);
    let value = s.select_lt(x, low, s.splat(0.0), value);
    s.select_lt(high, x, s.splat(f32::INFINITY), value)
}

/// `1 / (1 + exp(-x))` and `1 / (1 + exp(x))`, which add up to 1, both within 3e-7 relative.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let e = exp(s, s.min(x, s.sub(zero, x)));
    let large = s.div(one, s.add(one, e));
    let small = s.mul(e, large);
    (s.select_lt(x, zero, small, large), s.select_lt(x, zero, large, small))
}

/// `tanh(x)` within 3e-7 relative.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let size = s.max(s.sub(zero, x), x);
    let square = s.mul(x, x);
    let tail = [-5.717_044_5e-3, 2.065_058_7e-2, -5.374_35e-2, 1.333_149_1e-1, -3.333_328_4e-1];
    let near = s.fma(s.mul(square, x), polynomial(s, square, &tail), x);
    let far = s.div(s.splat(2.0), s.add(exp(s, s.add(size, size)), one));
    let far = s.sub(one, far);
    let far = s.select_lt(x, zero, s.sub(zero, far), far);
    s.select_lt(size, s.splat(0.625), near, far)
}

/// The standard normal distribution at `x`: the probability of less than `x`, within 4e-7
/// relative (0 below -13.2), and the density, within 2e-7 (0 beyond 13.2).
#[inline(always)]
pub fn normal<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::lanes::{Job, LANES, Level};

    #[derive(Clone, Copy)]
    enum Function {
        Exp,
        Sigmoid,
        Against,
        Tanh,
        Below,
        Density,
    }

    struct Apply<'a>(Function, &'a [f32; LANES], &'a mut [f32; LANES]);

    impl Job for Apply<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let x = s.load(self.1);
            let y = match self.0 {
                Function::Exp => exp(s, x),
                Function::Sigmoid => sigmoid(s, x).0,
                Function::Against => sigmoid(s, x).1,
                Function::Tanh => tanh(s, x),
                Function::Below => normal(s, x).0,
                Function::Density => normal(s, x).1,
            };
            s.store(self.2, y);
        }
    }

    fn at(level: Level, f: Function, x: f32) -> f32 {
        let mut y = [0.0; LANES];
        level.run(Apply(f, &[x; LANES], &mut y));
        y[7]
    }

    /// Largest relative error over a grid, checking both instruction sets for equal bits.
    fn error(f: Function, range: f64, exact: fn(f64) -> f64) -> f64 {
        let mut worst = 0.0f64;
        for i in -20_000..=20_000 {
            let x = (range * i as f64 / 20_000.0) as f32;
            let y = at(Level::detect(), f, x);
            if i % 50 == 0 {
                assert_eq!(y.to_bits(), at(Level::PORTABLE, f, x).to_bits());
            }
            let wanted = exact(x as f64);
            worst = worst.max((y as f64 - wanted).abs() / wanted.abs().max(1e-37));
        }
        worst
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
            ("exp", error(Function::Exp, 87.3, f64::exp), 1.2e-7),
            ("sigmoid", error(Function::Sigmoid, 87.0, |x| 1.0 / (1.0 + (-x).exp())), 3e-7),
            ("against", error(Function::Against, 87.0, |x| 1.0 / (1.0 + x.exp())), 3e-7),
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
    fn special_arguments() {
        let level = Level::detect();
        assert_eq!(at(level, Function::Exp, 0.0), 1.0);
        assert_eq!(at(level, Function::Exp, f32::NEG_INFINITY), 0.0);
        assert_eq!(at(level, Function::Exp, -1e5), 0.0);
        assert_eq!(at(level, Function::Exp, 1e5), f32::INFINITY);
        assert_eq!(at(level, Function::Tanh, f32::NEG_INFINITY), -1.0);
        assert_eq!(at(level, Function::Tanh, 0.0), 0.0);
        assert_eq!(at(level, Function::Below, 40.0), 1.0);
        assert_eq!(at(level, Function::Below, -40.0), 0.0);
        for f in [Function::Exp, Function::Sigmoid, Function::Tanh, Function::Below] {
            assert!(at(level, f, f32::NAN).is_nan());
        }
    }
}
