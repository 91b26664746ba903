//! One row of logits: its statistics and its gradient, in place.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::lanes_math::{exp, tanh};
use super::logp::LogpOptions;
use super::logp_rule::{RowRule, factor, penalise};
use super::slices::{Lanewise, map, max};

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
    /// Turns raw logits into `l` in place (cap, penalty, temperature), and summarises what is kept
    /// of them.
    pub fn of(logits: &mut [f32], options: &LogpOptions, rule: &RowRule) -> Self {
        stats_row(CpuLevel::detect(), logits, options, rule)
    }

    /// Summarises the tokens `kept` of a row `l`; not empty.
    pub fn of_kept(row: &[f32], kept: &[u32]) -> Self {
        let at = |token: &u32| row[*token as usize];
        let first = kept.first().copied().unwrap_or_default();
        let larger = |best: u32, token: &u32| if at(token) > at(&best) { *token } else { best };
        let argmax = kept.iter().fold(first, larger);
        let max = at(&argmax);
        let (mut sum, mut moment) = (0.0, 0.0);
        for token in kept {
            let below = f64::from(at(token)) - f64::from(max);
            sum += below.exp();
            moment += below.exp() * below;
        }
        let log_sum = sum.ln();
        RowStats { max, argmax, log_sum, entropy: log_sum - moment / sum }
    }

    /// Log of the sum of the exponentials.
    pub fn lse(&self) -> f32 {
        (f64::from(self.max) + self.log_sum) as f32
    }

    /// Log-probability of a token with logit `l`.
    pub fn logp(&self, l: f32) -> f32 {
        (f64::from(l) - f64::from(self.max) - self.log_sum) as f32
    }

    /// The token at which the running sum of the probabilities passes `u`, in [0, 1); `row` is what
    /// the statistics are of.
    pub fn draw(&self, row: &[f32], u: f64) -> u32 {
        let (level, goal) = (CpuLevel::detect(), u * self.log_sum.exp());
        let (mut sum, mut last) = (0.0, self.argmax);
        for (i, block) in row.chunks(SUM_BLOCK).enumerate() {
            let in_block = f64::from(level.run(SumExp { row: block, max: self.max }).0);
            if sum + in_block > goal {
                let mut left = goal - sum;
                for (j, l) in block.iter().enumerate() {
                    let weight = f64::from(l - self.max).exp();
                    if weight > 0.0 {
                        last = (i * SUM_BLOCK + j) as u32;
                    }
                    left -= weight;
                    if left < 0.0 {
                        return last;
                    }
                }
            }
            sum += in_block;
        }
        last
    }
}

/// [`RowStats::of`] at a level.
pub(crate) fn stats_row(
    level: CpuLevel,
    row: &mut [f32],
    options: &LogpOptions,
    rule: &RowRule,
) -> RowStats {
    squash(level, row, options, rule);
    match rule.kept.as_slice() {
        [] => summarise(level, row),
        kept => RowStats::of_kept(row, kept),
    }
}

/// Cap, then penalty, then temperature, in place.
pub(crate) fn squash(level: CpuLevel, row: &mut [f32], options: &LogpOptions, rule: &RowRule) {
    if let Some(cap) = options.softcap {
        map(level, row, Cap { inverse: 1.0 / cap, scale: cap });
    }
    penalise(row, &rule.penalised, options.repetition_penalty);
    if options.inv_temperature != 1.0 {
        map(level, row, Scale(options.inv_temperature));
    }
}

fn summarise(level: CpuLevel, row: &[f32]) -> RowStats {
    let max = max(level, row);
    let argmax = row.iter().position(|&l| l == max).unwrap_or(0) as u32;
    let (mut sum, mut moment) = (0.0, 0.0);
    for block in row.chunks(SUM_BLOCK) {
        let (s, m) = level.run(SumExp { row: block, max });
        sum += f64::from(s);
        moment += f64::from(m);
    }
    let log_sum = sum.ln();
    RowStats { max, argmax, log_sum, entropy: log_sum - moment / sum }
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
    rule: &RowRule,
    pull: Pull,
    targets: impl Iterator<Item = (usize, f32)>,
) {
    let gradient = RowGradient { pull, slope: Slope::new(options) };
    let slope = |token: usize, l: f32| match rule.penalised.contains(&(token as u32)) {
        true => gradient.slope.at_penalised(l, options.repetition_penalty),
        false => gradient.slope.at_one(l),
    };
    let hits: Vec<(usize, f32)> =
        targets.map(|(token, weight)| (token, weight * slope(token, row[token]))).collect();
    let own = |token: &u32| {
        let (token, l) = (*token as usize, row[*token as usize]);
        (token, gradient.inner(l) * slope(token, l))
    };
    if rule.kept.is_empty() {
        let penalised: Vec<(usize, f32)> = rule.penalised.iter().map(own).collect();
        map(level, row, gradient);
        penalised.into_iter().for_each(|(token, pull)| row[token] = pull);
    } else {
        let kept: Vec<(usize, f32)> = rule.kept.iter().map(own).collect();
        row.fill(0.0);
        kept.into_iter().for_each(|(token, pull)| row[token] = pull);
    }
    for (token, pull) in hits {
        row[token] += pull;
    }
}

/// As [`gradient_row`] for a slice of a row without a rule, `targets` being places in it; returns the sum
/// of the slice's probabilities.
pub(crate) fn gradient_slice(
    level: CpuLevel,
    slice: &mut [f32],
    options: &LogpOptions,
    pull: Pull,
    targets: impl Iterator<Item = (usize, f32)>,
) -> f32 {
    let gradient = RowGradient { pull, slope: Slope::new(options) };
    let of_target = |(at, weight): (usize, f32)| (at, weight * gradient.slope.at_one(slice[at]));
    let hits: Vec<(usize, f32)> = targets.map(of_target).collect();
    let mass = level.run(PullSlice { slice, gradient });
    hits.into_iter().for_each(|(at, pull)| slice[at] += pull);
    mass
}

/// Replaces a slice of `l` by the gradient without targets; gives the sum of the probabilities.
struct PullSlice<'a> {
    slice: &'a mut [f32],
    gradient: RowGradient,
}

impl Kernel<f32> for PullSlice<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.slice.as_chunks_mut();
        let mut mass = s.splat(0.0);
        for l in whole {
            let (p, pull) = self.gradient.parts(s, s.load(l));
            mass = s.add(mass, p);
            s.store(l, pull);
        }
        let (p, pull) = self.gradient.parts(s, s.load_part(rest));
        s.store_part(rest, pull);
        let mut last = [0.0; LANES];
        s.store(&mut last, p);
        s.sum(mass) + last[..rest.len()].iter().sum::<f32>()
    }
}

/// `cap tanh(z / cap)`.
#[derive(Clone, Copy)]
struct Cap {
    inverse: f32,
    scale: f32,
}

impl Lanewise for Cap {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, z: S::V) -> S::V {
        s.mul(tanh(s, s.mul(z, s.splat(self.inverse))), s.splat(self.scale))
    }
}

/// Multiplication by a constant.
#[derive(Clone, Copy)]
struct Scale(f32);

impl Lanewise for Scale {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, z: S::V) -> S::V {
        s.mul(z, s.splat(self.0))
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

    /// The slope at a logit whose penalised value is `l`.
    fn at_penalised(self, l: f32, penalty: f32) -> f32 {
        let factor = factor(l, penalty);
        factor * self.at_one(l / factor)
    }
}

impl Lanewise for Slope {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, l: S::V) -> S::V {
        let t = s.mul(l, s.splat(self.inverse));
        s.mul(s.splat(self.inv_temperature), s.sub(s.splat(1.0), s.mul(t, t)))
    }
}

/// `-p (weight + dentropy (log p + entropy)) dl/dz`.
#[derive(Clone, Copy)]
struct RowGradient {
    pull: Pull,
    slope: Slope,
}

impl RowGradient {
    /// The gradient of one `l`.
    fn inner(self, l: f32) -> f32 {
        let Pull { lse, weight, dentropy, entropy } = self.pull;
        let logp = l - lse;
        logp.exp() * (-dentropy * (logp + entropy) - weight)
    }
}

impl RowGradient {
    /// The probabilities and the gradients of some `l`.
    #[inline(always)]
    fn parts<S: Simd>(self, s: S, l: S::V) -> (S::V, S::V) {
        let Pull { lse, weight, dentropy, entropy } = self.pull;
        let logp = s.sub(l, s.splat(lse));
        let p = exp(s, logp);
        let inner = s.add(logp, s.splat(entropy));
        let pull = s.fma(s.splat(-dentropy), inner, s.splat(-weight));
        (p, s.mul(s.mul(p, pull), self.slope.at(s, l)))
    }
}

impl Lanewise for RowGradient {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, l: S::V) -> S::V {
        self.parts(s, l).1
    }
}

/// Sums of `exp(l - max)` and of `exp(l - max) (l - max)`.
struct SumExp<'a> {
    row: &'a [f32],
    max: f32,
}

impl Kernel<(f32, f32)> for SumExp<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let mut totals = (s.splat(0.0), s.splat(0.0));
        let (whole, rest) = self.row.as_chunks();
        for l in whole {
            totals = add_exp(s, totals, s.sub(s.load(l), s.splat(self.max)));
        }
        if !rest.is_empty() {
            // far enough below the maximum that the exponential is 0
            let mut last = [-1000.0; LANES];
            last.iter_mut().zip(rest).for_each(|(x, l)| *x = l - self.max);
            totals = add_exp(s, totals, s.load(&last));
        }
        (s.sum(totals.0), s.sum(totals.1))
    }
}

#[inline(always)]
fn add_exp<S: Simd>(s: S, totals: (S::V, S::V), x: S::V) -> (S::V, S::V) {
    let e = exp(s, x);
    (s.add(totals.0, e), s.fma(e, x, totals.1))
}
