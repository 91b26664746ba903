//! Rotary position embedding: inverse frequencies as transformers 5 computes them, operation by
//! operation in f32 (its `modeling_rope_utils`), so that angles agree to the last digits.

use std::f64::consts::PI;

/// One rotary table. Angles of position p are `p * inv_freq[i]`, and the pair rotated by the i-th
/// is (i, i + head_dim / 2), the "half" layout of Hugging Face checkpoints.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric progression of wavelengths.
    pub theta: f64,
    /// Width of a head; all of it is rotated.
    pub head_dim: usize,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// Ways to stretch the frequencies, named as `rope_type` names them.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All divided by `factor` (position interpolation, arXiv:2306.15595).
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// By wavelength, as Llama 3.1 does.
    Llama3(Llama3),
    /// By pair, as YaRN does.
    Yarn(Yarn),
    /// Each divided by its own number: `rope_freqs.weight` of Llama 3 GGUF files, [head_dim / 2].
    Divisors(Vec<f32>),
}

/// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3 {
    /// Stretch of the context.
    pub factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
    pub high_freq_factor: f64,
    /// Context of the first training phase.
    pub original_max_position_embeddings: f64,
}

/// YaRN (arXiv:2309.00071): a ramp over the pairs between keeping and dividing.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// Stretch of the context.
    pub factor: f64,
    /// Factor on cos and sin.
    pub attention_factor: f64,
    /// Rotations over the original context above which a pair is kept.
    pub beta_fast: f64,
    /// Rotations over the original context below which a pair is divided.
    pub beta_slow: f64,
    /// Context before stretching.
    pub original_max_position_embeddings: f64,
    /// The ramp's ends are rounded to whole pairs.
    pub truncate: bool,
}

impl Rope {
    /// The head_dim / 2 inverse frequencies.
    pub fn inv_freq(&self) -> Vec<f32> {
        let powers = self.powers();
        let plain = powers.iter().map(|power| 1.0 / power);
        match &self.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|freq| freq / *factor as f32).collect(),
            RopeScaling::Divisors(divisors) => plain.zip(divisors).map(|(f, d)| f / d).collect(),
            RopeScaling::Llama3(llama3) => plain.map(|freq| llama3.stretch(freq)).collect(),
            RopeScaling::Yarn(yarn) => yarn.stretch(&powers, self.theta),
        }
    }

    /// Factor on cos and sin; 1 but for YaRN.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor as f32,
            _ => 1.0,
        }
    }

    /// `theta ^ (2 i / head_dim)`: the exponent in f32, the power rounded once.
    fn powers(&self) -> Vec<f32> {
        let base = f64::from(self.theta as f32);
        let exponent = |i: usize| (2 * i) as f32 / self.head_dim as f32;
        let power = |i: usize| base.powf(f64::from(exponent(i))) as f32;
        (0..self.head_dim / 2).map(power).collect()
    }
}

impl Llama3 {
    /// One frequency. PyTorch computes a number over a tensor as reciprocal times number.
    fn stretch(&self, freq: f32) -> f32 {
        let context = self.original_max_position_embeddings;
        let wavelength = (1.0 / freq) * (2.0 * PI) as f32;
        if wavelength < (context / self.high_freq_factor) as f32 {
            return freq;
        }
        if wavelength > (context / self.low_freq_factor) as f32 {
            return freq / self.factor as f32;
        }
        let low = self.low_freq_factor as f32;
        let span = (self.high_freq_factor - self.low_freq_factor) as f32;
        let smooth = ((1.0 / wavelength) * context as f32 - low) / span;
        (1.0 - smooth) * freq / self.factor as f32 + smooth * freq
    }
}

impl Yarn {
    fn stretch(&self, powers: &[f32], theta: f64) -> Vec<f32> {
        let (low, high) = self.range(2.0 * powers.len() as f64, theta);
        let one = |(i, power): (usize, &f32)| {
            let ramp = (i as f32 - low as f32) / (high - low) as f32;
            let kept = 1.0 - ramp.clamp(0.0, 1.0);
            1.0 / (self.factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
        };
        powers.iter().enumerate().map(one).collect()
    }

    /// First and last pair of the ramp.
    fn range(&self, head_dim: f64, theta: f64) -> (f64, f64) {
        let at = |rotations: f64| {
            let turns = self.original_max_position_embeddings / (rotations * 2.0 * PI);
            head_dim * turns.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (at(self.beta_fast), at(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(head_dim - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }
}
