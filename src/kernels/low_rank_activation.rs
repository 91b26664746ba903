//! The function between the two matrices of a low-rank adapter, and its derivative.

use super::vexp;

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
        match self {
            Activation::Linear => z.to_vec(),
            Activation::Silu => each(z, &exp_of_negative(z), |z, e| z / (1.0 + e)),
            Activation::Relu => z.iter().map(|&z| if z < 0.0 { 0.0 } else { z }).collect(),
            Activation::Gelu => {
                z.iter().map(|&z| (f64::from(z) * normal_cdf(f64::from(z))) as f32).collect()
            }
            Activation::Tanh => tanh_of(z),
        }
    }

    /// `phi'(z)` of each element.
    pub fn derivative(self, z: &[f32]) -> Vec<f32> {
        match self {
            Activation::Linear => vec![1.0; z.len()],
            Activation::Silu => each(z, &exp_of_negative(z), |z, e| {
                let s = 1.0 / (1.0 + e);
                s * (1.0 + z * (1.0 - s))
            }),
            Activation::Relu => z.iter().map(|&z| if z > 0.0 { 1.0 } else { 0.0 }).collect(),
            Activation::Gelu => z.iter().map(|&z| gelu_slope(f64::from(z)) as f32).collect(),
            Activation::Tanh => tanh_of(z).iter().map(|t| 1.0 - t * t).collect(),
        }
    }
}

fn each(z: &[f32], e: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    z.iter().zip(e).map(|(&z, &e)| f(z, e)).collect()
}

fn exp_of_negative(z: &[f32]) -> Vec<f32> {
    let mut e: Vec<f32> = z.iter().map(|z| -z).collect();
    vexp::exp_slice(&mut e);
    e
}

fn tanh_of(z: &[f32]) -> Vec<f32> {
    let mut t = z.to_vec();
    vexp::tanh_slice(&mut t);
    t
}

fn normal_cdf(z: f64) -> f64 {
    0.5 * (1.0 + erf(z * std::f64::consts::FRAC_1_SQRT_2))
}

fn gelu_slope(z: f64) -> f64 {
    let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    normal_cdf(z) + z * density
}

/// The error function by `2 x / sqrt(pi) exp(-x^2) sum of (2 x^2)^n / (1 3 5 .. (2 n + 1))`
/// (Abramowitz and Stegun 7.1.6), whose terms all have one sign.
fn erf(x: f64) -> f64 {
    if x.abs() >= 6.0 {
        return x.signum();
    }
    let (mut term, mut total, mut odd) = (1.0, 1.0, 1.0);
    while term > total * 1e-17 {
        odd += 2.0;
        term *= 2.0 * x * x / odd;
        total += term;
    }
    x * (-x * x).exp() * total * std::f64::consts::FRAC_2_SQRT_PI
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
    fn erf_has_the_tabulated_values() {
        let table = [
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.5, 0.999_999_256_901_627_7),
        ];
        for (x, want) in table {
            assert!((erf(x) - want).abs() < 1e-14 && (erf(-x) + want).abs() < 1e-14);
        }
        assert_eq!([erf(0.0), erf(7.0)], [0.0, 1.0]);
        assert!(erf(f64::NAN).is_nan());
    }

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
