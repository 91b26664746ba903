//! The function between the two matrices of a low-rank adapter, and its derivative.

use super::dispatch::CpuLevel;
use super::lanes::Simd;
use super::lanes_math::{gelu, silu, tanh};
use super::slices::{Lanewise, map};

/// The function applied to the low-rank code `z`, as PyTorch defines it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `z`.
    #[default]
    Linear,
    /// `z / (1 + exp(-z))`.
    Silu,
    /// `max(z, 0)`, with derivative 0 at 0.
    Relu,
    /// `z Phi(z)` with the exact normal distribution function (`torch.nn.functional.gelu`).
    Gelu,
    /// `tanh z`.
    Tanh,
}

impl Activation {
    /// `phi(z)` of each element.
    pub fn apply(self, z: &[f32]) -> Vec<f32> {
        let mut value = z.to_vec();
        map(CpuLevel::detect(), &mut value, Value(self));
        value
    }

    /// `phi'(z)` of each element.
    pub fn derivative(self, z: &[f32]) -> Vec<f32> {
        let mut slope = z.to_vec();
        map(CpuLevel::detect(), &mut slope, Slope(self));
        slope
    }

    /// `phi(z)` and `phi'(z)`.
    #[inline(always)]
    fn value_and_slope<S: Simd>(self, s: S, z: S::V) -> (S::V, S::V) {
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        match self {
            Activation::Linear => (z, one),
            Activation::Silu => silu(s, z),
            Activation::Relu => (s.max(zero, z), s.select_lt(zero, z, one, zero)),
            Activation::Gelu => gelu(s, z),
            Activation::Tanh => {
                let t = tanh(s, z);
                (t, s.sub(one, s.mul(t, t)))
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Value(Activation);

impl Lanewise for Value {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, z: S::V) -> S::V {
        self.0.value_and_slope(s, z).0
    }
}

#[derive(Clone, Copy)]
struct Slope(Activation);

impl Lanewise for Slope {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, z: S::V) -> S::V {
        self.0.value_and_slope(s, z).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Activation; 5] = [
        Activation::Linear,
        Activation::Silu,
        Activation::Relu,
        Activation::Gelu,
        Activation::Tanh,
    ];

    #[test]
    fn derivatives_match_finite_differences() {
        for activation in ALL {
            for i in -40..40 {
                let z = i as f32 * 0.1 + 0.05;
                let y = activation.apply(&[z - 1e-2, z + 1e-2]);
                let slope = (y[1] - y[0]) / 2e-2;
                let got = activation.derivative(&[z])[0];
                assert!((got - slope).abs() < 2e-4, "{activation:?} at {z}: {got}, {slope}");
            }
        }
    }

    #[test]
    fn values_at_one_are_those_of_pytorch() {
        let want = [1.0, 0.731_058_6, 1.0, 0.841_344_7, 0.761_594_2];
        for (activation, want) in ALL.into_iter().zip(want) {
            assert!((activation.apply(&[1.0])[0] - want).abs() < 1e-6, "{activation:?}");
        }
    }
}
