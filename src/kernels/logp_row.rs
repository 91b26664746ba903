//! One row of logits: its statistics and its gradient, in place.

use super::dispatch::{CpuLevel, SimdTask, dispatch};
use super::logp::LogpOptions;
use super::simd::{LANES, Simd};
use super::vexp::{Lanewise, Max, exp_lanes, map, tanh_lanes};

/// Elements whose exponentials are summed in `f32` before they enter an `f64` total.
const SUM_BLOCK: usize = 1024;

/// Statistics of one row of logits `l`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStats {
    /// The largest logit.
    pub max: f32,
    /// Index of the first largest logit.
    pub argmax: u32,
    /// Log of the sum of `exp(l - max)`.
    pub log_sum: f64,
    /// Entropy in nats.
    pub entropy: f64,
}

impl RowStats {
    /// Turns raw logits into `l` in place (cap, then temperature), and summarises them.
    pub fn of(logits: &mut [f32], options: &LogpOptions) -> Self {
        stats_row(CpuLevel::detect(), logits, options)
    }

    /// Log of the sum of the exponentials.
    pub fn lse(&self) -> f32 {
        (f64::from(self.max) + self.log_sum) as f32
    }

    /// Log-probability of a token with logit `l`.
    pub fn logp(&self, l: f32) -> f32 {
        (f64::from(l) - f64::from(self.max) - self.log_sum) as f32
    }
}

/// [`RowStats::of`] at a level.
pub(crate) fn stats_row(level: CpuLevel, row: &mut [f32], options: &LogpOptions) -> RowStats {
    squash(level, row, options);
    summarise(level, row)
}

/// Cap and temperature in place.
pub(crate) fn squash(level: CpuLevel, row: &mut [f32], options: &LogpOptions) {
    match options.softcap {
        Some(cap) => {
            map(level, row, Cap { inverse: 1.0 / cap, scale: cap * options.inv_temperature });
        }
        None if options.inv_temperature != 1.0 => map(level, row, Scale(options.inv_temperature)),
        None => {}
    }
}

fn summarise(level: CpuLevel, row: &[f32]) -> RowStats {
    // SAFETY: the tasks hold slices.
    unsafe {
        let max = dispatch(level, Max(row));
        let argmax = row.iter().position(|&l| l == max).unwrap_or(0) as u32;
        let (mut sum, mut moment) = (0.0, 0.0);
        for block in row.chunks(SUM_BLOCK) {
            let (s, m) = dispatch(level, SumExp { row: block, max });
            sum += f64::from(s);
            moment += f64::from(m);
        }
        let log_sum = sum.ln();
        RowStats { max, argmax, log_sum, entropy: log_sum - moment / sum }
    }
}

/// What a row's gradient is made of.
#[derive(Clone, Copy)]
pub(crate) struct Pull {
    /// Log of the sum of exponentials.
    pub lse: f32,
    /// Sum of the weights of the row's targets.
    pub weight: f32,
    /// Gradient of the row's entropy.
    pub dentropy: f32,
    /// The row's entropy (anything where `dentropy` is 0).
    pub entropy: f32,
}

/// Replaces `l` by the gradient of the raw logits. `targets` gives token and weight.
pub(crate) fn gradient_row(
    level: CpuLevel,
    row: &mut [f32],
    options: &LogpOptions,
    pull: Pull,
    targets: impl Iterator<Item = (usize, f32)>,
) {
    let slope = Slope::new(options);
    let hits: Vec<(usize, f32)> =
        targets.map(|(token, weight)| (token, weight * slope.at_one(row[token]))).collect();
    map(level, row, RowGradient { pull, slope });
    for (token, pull) in hits {
        row[token] += pull;
    }
}

/// `cap tanh(z / cap)` times the inverse temperature.
#[derive(Clone, Copy)]
struct Cap {
    inverse: f32,
    scale: f32,
}

impl Lanewise for Cap {
    #[inline(always)]
    unsafe fn at<S: Simd>(self, z: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::mul(tanh_lanes::<S>(S::mul(z, S::splat(self.inverse))), S::splat(self.scale)) }
    }
}

/// Multiplication by a constant.
#[derive(Clone, Copy)]
struct Scale(f32);

impl Lanewise for Scale {
    #[inline(always)]
    unsafe fn at<S: Simd>(self, z: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::mul(z, S::splat(self.0)) }
    }
}

/// `dl / dz` as a function of `l`: `inv_temperature (1 - (l / (inv_temperature c))^2)`.
#[derive(Clone, Copy)]
struct Slope {
    inv_temperature: f32,
    /// One over the largest `l`; 0 without a cap.
    inverse: f32,
}

impl Slope {
    fn new(options: &LogpOptions) -> Self {
        let inverse = options.softcap.map_or(0.0, |cap| 1.0 / (cap * options.inv_temperature));
        Self { inv_temperature: options.inv_temperature, inverse }
    }

    fn at_one(self, l: f32) -> f32 {
        let t = l * self.inverse;
        self.inv_temperature * (1.0 - t * t)
    }

    /// # Safety
    /// The CPU has the features of `S`.
    #[inline(always)]
    unsafe fn at<S: Simd>(self, l: S::V) -> S::V {
        // SAFETY: arithmetic only.
        unsafe {
            let t = S::mul(l, S::splat(self.inverse));
            S::mul(S::splat(self.inv_temperature), S::sub(S::splat(1.0), S::mul(t, t)))
        }
    }
}

/// `-p (weight + dentropy (log p + entropy)) dl/dz`.
#[derive(Clone, Copy)]
struct RowGradient {
    pull: Pull,
    slope: Slope,
}

impl Lanewise for RowGradient {
    #[inline(always)]
    unsafe fn at<S: Simd>(self, l: S::V) -> S::V {
        let Pull { lse, weight, dentropy, entropy } = self.pull;
        // SAFETY: the caller's promise.
        unsafe {
            let logp = S::sub(l, S::splat(lse));
            let p = exp_lanes::<S>(logp);
            let inner = S::add(logp, S::splat(entropy));
            let pull = S::mul_add(S::splat(-dentropy), inner, S::splat(-weight));
            S::mul(S::mul(p, pull), self.slope.at::<S>(l))
        }
    }
}

/// Sums of `exp(l - max)` and of `exp(l - max) (l - max)`.
struct SumExp<'a> {
    row: &'a [f32],
    max: f32,
}

impl SimdTask for SumExp<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> (f32, f32) {
        // SAFETY: chunks and the padded rest are sixteen elements.
        unsafe {
            let mut totals = (S::splat(0.0), S::splat(0.0));
            let chunks = self.row.chunks_exact(LANES);
            let rest = chunks.remainder();
            for chunk in chunks {
                totals = add_exp::<S>(totals, S::sub(S::load(chunk.as_ptr()), S::splat(self.max)));
            }
            if !rest.is_empty() {
                // far enough below the maximum that the exponential is 0
                let mut last = [-1000.0; LANES];
                last.iter_mut().zip(rest).for_each(|(x, l)| *x = l - self.max);
                totals = add_exp::<S>(totals, S::load(last.as_ptr()));
            }
            (S::reduce_add(totals.0), S::reduce_add(totals.1))
        }
    }
}

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn add_exp<S: Simd>(totals: (S::V, S::V), x: S::V) -> (S::V, S::V) {
    // SAFETY: arithmetic only.
    unsafe {
        let e = exp_lanes::<S>(x);
        (S::add(totals.0, e), S::mul_add(e, x, totals.1))
    }
}
