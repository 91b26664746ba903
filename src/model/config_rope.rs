//! Rotary position embedding: inverse frequencies as transformers 5 computes them, operation by
//! operation in f32 (its `modeling_rope_utils`), so that angles agree to the last digits.

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
    /// None.
    Default,
    /// All divided by `factor` (position interpolation, arXiv:2306.15595).
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 {
        /// Stretch of the context.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the first training phase.
        original_max_position_embeddings: f64,
    },
    /// YaRN (arXiv:2309.00071): a ramp over dimensions between keeping and dividing.
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Rotations over the original context above which a dimension is kept.
        beta_fast: f64,
        /// Rotations over the original context below which a dimension is divided.
        beta_slow: f64,
        /// Context before stretching.
        original_max_position_embeddings: f64,
        /// The ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Each divided by its own number: `rope_freqs.weight` of Llama 3 GGUF files, [head_dim / 2].
    Divisors(Vec<f32>),
}

impl Rope {
    /// The head_dim / 2 inverse frequencies.
    pub fn inv_freq(&self) -> Vec<f32> {
        let plain = self.powers().map(|power| 1.0 / power);
        match &self.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|freq| freq / *factor as f32).collect(),
            RopeScaling::Llama3 { .. } => plain.map(|freq| self.llama3(freq)).collect(),
            RopeScaling::Yarn { .. } => self.yarn(),
            RopeScaling::Divisors(divisors) => plain.zip(divisors).map(|(f, d)| f / d).collect(),
        }
    }

    /// Factor on cos and sin; 1 but for YaRN.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// `theta ^ (2 i / head_dim)`: the exponent in f32, the power rounded once.
    fn powers(&self) -> impl Iterator<Item = f32> + '_ {
        let base = f64::from(self.theta as f32);
        (0..self.head_dim / 2).map(move |i| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            base.powf(f64::from(exponent)) as f32
        })
    }

    fn llama3(&self, freq: f32) -> f32 {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: context,
        } = self.scaling
        else {
            return freq;
        };
        // a scalar over a tensor is reciprocal times scalar in PyTorch
        let wavelength = (1.0 / freq) * (2.0 * std::f64::consts::PI) as f32;
        if wavelength < (context / high_freq_factor) as f32 {
            return freq;
        }
        if wavelength > (context / low_freq_factor) as f32 {
            return freq / factor as f32;
        }
        let span = (high_freq_factor - low_freq_factor) as f32;
        let smooth = ((1.0 / wavelength) * context as f32 - low_freq_factor as f32) / span;
        (1.0 - smooth) * freq / factor as f32 + smooth * freq
    }

    fn yarn(&self) -> Vec<f32> {
        let RopeScaling::Yarn { factor, .. } = self.scaling else {
            return Vec::new();
        };
        let (low, high) = self.yarn_range();
        let ramp = |i: usize| {
            let linear = (i as f32 - low as f32) / (high - low) as f32;
            linear.clamp(0.0, 1.0)
        };
        self.powers()
            .enumerate()
            .map(|(i, power)| {
                let kept = 1.0 - ramp(i);
                1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
            })
            .collect()
    }

    /// First and last dimension of YaRN's ramp.
    fn yarn_range(&self) -> (f64, f64) {
        let RopeScaling::Yarn {
            beta_fast,
            beta_slow,
            original_max_position_embeddings: context,
            truncate,
            ..
        } = self.scaling
        else {
            return (0.0, 1.0);
        };
        let dim = self.head_dim as f64;
        let at = |rotations: f64| {
            let turns = context / (rotations * 2.0 * std::f64::consts::PI);
            dim * turns.ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (at(beta_fast), at(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }
}
