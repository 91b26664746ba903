//! AdamW (Loshchilov & Hutter, arXiv:1711.05101) on named f32 slices, as PyTorch computes it:
//!
//! ```text
//! p ← p (1 − lr · decay)
//! m ← m + (g − m)(1 − β₁)        v ← β₂ v + (1 − β₂) g²
//! p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! Scalars are computed in f64 and rounded to f32 once, as `torch.optim.AdamW` does on f32 tensors;
//! results agree to the last one or two bits. Differences: one step count serves all parameters,
//! and there is no `amsgrad`.

use std::collections::BTreeMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::config::OptimArgs;
use crate::{Error, Result};

/// The constants of AdamW that all parameters share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the gradient's running mean.
    pub beta1: f64,
    /// Decay of the gradient's running square.
    pub beta2: f64,
    /// Added to the denominator, outside the root.
    pub epsilon: f64,
}

impl Default for AdamWConfig {
    /// PyTorch's: 0.9, 0.999, 1e-8.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

impl From<&OptimArgs> for AdamWConfig {
    fn from(args: &OptimArgs) -> Self {
        Self { beta1: args.adam_beta1, beta2: args.adam_beta2, epsilon: args.adam_epsilon }
    }
}

/// One parameter as a step sees it.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// Its key in the adapter's file, under which its state is kept.
    pub name: &'a str,
    /// Its values, changed in place.
    pub values: &'a mut [f32],
    /// Its gradient, as long as the values.
    pub gradient: &'a [f32],
    /// Its learning rate at this step.
    pub learning_rate: f64,
    /// Its decoupled weight decay; 0 = off.
    pub weight_decay: f64,
}

/// Running mean and square of one parameter's gradient.
#[derive(Clone, Debug, PartialEq)]
struct Moments {
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

/// AdamW with its state, which [`AdamW::to_safetensors`] saves to the bit.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    config: AdamWConfig,
    steps: u64,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// A fresh optimizer; its state appears with the first step.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, steps: 0, moments: BTreeMap::new() }
    }

    /// How many steps were made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Moves every parameter by one step. Every step must bring the same parameters: the first
    /// defines them, and another name or size later is an error that leaves everything unchanged.
    pub fn step(&mut self, parameters: &mut [Parameter]) -> Result<()> {
        self.check(parameters)?;
        self.steps += 1;
        let scale = Scale::new(&self.config, self.steps);
        for parameter in parameters {
            let len = parameter.values.len();
            let moments = self
                .moments
                .entry(parameter.name.to_string())
                .or_insert_with(|| Moments { exp_avg: vec![0.0; len], exp_avg_sq: vec![0.0; len] });
            scale.update(parameter, moments);
        }
        Ok(())
    }

    fn check(&self, parameters: &[Parameter]) -> Result<()> {
        for parameter in parameters {
            let (name, len) = (parameter.name, parameter.values.len());
            if parameter.gradient.len() != len {
                return Err(Error::failure(format!(
                    "the gradient of {name} has {} values, the parameter has {len}",
                    parameter.gradient.len()
                )));
            }
            match self.moments.get(name) {
                Some(moments) if moments.exp_avg.len() != len => {
                    return Err(Error::failure(format!(
                        "the optimizer state of {name} has {} values, the parameter has {len}; \
                         the state is of another adapter",
                        moments.exp_avg.len()
                    )));
                }
                None if self.steps > 0 => {
                    return Err(Error::failure(format!(
                        "there is no optimizer state for {name} after {} steps; the state is of \
                         another adapter",
                        self.steps
                    )));
                }
                _ => {}
            }
        }
        if self.steps > 0 && parameters.len() != self.moments.len() {
            return Err(Error::failure(format!(
                "a step got {} parameters, the optimizer state has {}",
                parameters.len(),
                self.moments.len()
            )));
        }
        Ok(())
    }

    /// The state as the bytes of a safetensors file: `exp_avg.<name>` and `exp_avg_sq.<name>` as
    /// flat f32, `step` as one u64.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut tensors: Vec<(String, Dtype, usize, Vec<u8>)> =
            vec![("step".to_string(), Dtype::U64, 1, self.steps.to_le_bytes().to_vec())];
        for (name, moments) in &self.moments {
            let len = moments.exp_avg.len();
            let mut add = |prefix: &str, values: &[f32]| {
                tensors.push((format!("{prefix}.{name}"), Dtype::F32, len, bytes(values)))
            };
            add("exp_avg", &moments.exp_avg);
            add("exp_avg_sq", &moments.exp_avg_sq);
        }
        let views = tensors
            .iter()
            .map(|(name, dtype, len, data)| {
                Ok((name, TensorView::new(*dtype, vec![*len], data).map_err(unsaved)?))
            })
            .collect::<Result<Vec<_>>>()?;
        safetensors::serialize(views, None).map_err(unsaved)
    }

    /// The optimizer whose state [`AdamW::to_safetensors`] saved, to the bit.
    pub fn from_safetensors(config: AdamWConfig, data: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(data)
            .map_err(|error| Error::failure(format!("optimizer state is damaged: {error}")))?;
        let step = file.tensor("step").map_err(|_| incomplete("step"))?;
        let step = step.data().try_into().map_err(|_| incomplete("step"))?;
        let mut moments = BTreeMap::new();
        for name in file.names() {
            let Some(name) = name.strip_prefix("exp_avg.") else { continue };
            let exp_avg = floats(&file, &format!("exp_avg.{name}"))?;
            let exp_avg_sq = floats(&file, &format!("exp_avg_sq.{name}"))?;
            if exp_avg.len() != exp_avg_sq.len() {
                return Err(incomplete(name));
            }
            moments.insert(name.to_string(), Moments { exp_avg, exp_avg_sq });
        }
        Ok(Self { config, steps: u64::from_le_bytes(step), moments })
    }
}

fn unsaved(error: safetensors::SafeTensorError) -> Error {
    Error::failure(format!("the optimizer state cannot be saved: {error}"))
}

fn incomplete(name: &str) -> Error {
    Error::failure(format!("optimizer state is damaged: {name} is missing or of the wrong form"))
}

fn floats(file: &SafeTensors, name: &str) -> Result<Vec<f32>> {
    let tensor = file.tensor(name).map_err(|_| incomplete(name))?;
    if tensor.dtype() != Dtype::F32 {
        return Err(incomplete(name));
    }
    let (values, _) = tensor.data().as_chunks::<4>();
    Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// The scalars of one step.
struct Scale {
    config: AdamWConfig,
    /// 1 − β₁ᵗ
    correction1: f64,
    /// √(1 − β₂ᵗ)
    correction2_sqrt: f64,
}

impl Scale {
    fn new(config: &AdamWConfig, steps: u64) -> Self {
        let power = |beta: f64| beta.powf(steps as f64);
        Self {
            config: *config,
            correction1: 1.0 - power(config.beta1),
            correction2_sqrt: (1.0 - power(config.beta2)).sqrt(),
        }
    }

    fn update(&self, parameter: &mut Parameter, moments: &mut Moments) {
        let AdamWConfig { beta1, beta2, epsilon } = self.config;
        let decay = (1.0 - parameter.learning_rate * parameter.weight_decay) as f32;
        let step_size = (-parameter.learning_rate / self.correction1) as f32;
        let (weight, weight_sq) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let (keep_sq, epsilon) = (beta2 as f32, epsilon as f32);
        let root_scale = self.correction2_sqrt as f32;
        let values = parameter.values.iter_mut().zip(parameter.gradient);
        let state = moments.exp_avg.iter_mut().zip(&mut moments.exp_avg_sq);
        for ((value, &gradient), (mean, square)) in values.zip(state) {
            *mean = lerp(*mean, gradient, weight);
            *square = *square * keep_sq + weight_sq * gradient * gradient;
            let denominator = square.sqrt() / root_scale + epsilon;
            *value = *value * decay + step_size * *mean / denominator;
        }
    }
}

/// `start + weight (end − start)`, from the nearer end, as `torch.lerp`.
fn lerp(start: f32, end: f32, weight: f32) -> f32 {
    match weight < 0.5 {
        true => start + weight * (end - start),
        false => end - (end - start) * (1.0 - weight),
    }
}

/// Scales all gradients so that their joint 2-norm is at most `max_norm` (0 = off) and returns the
/// norm before, as `torch.nn.utils.clip_grad_norm_`: the factor is `max_norm / (norm + 1e-6)`, at
/// most 1. Squares are summed in f64 in the order of the names. A gradient that is NaN or infinite
/// is an error that names its parameter.
pub fn clip_grad_norm(gradients: &mut BTreeMap<String, Vec<f32>>, max_norm: f64) -> Result<f64> {
    let mut sum = 0.0f64;
    for (name, gradient) in gradients.iter() {
        let squares: f64 = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum();
        if !squares.is_finite() {
            let count = gradient.iter().filter(|g| !g.is_finite()).count();
            return Err(Error::failure(format!(
                "the gradient of {name} has {count} of {} values that are not finite; lower the \
                 learning rate or look at the data of this step",
                gradient.len()
            )));
        }
        sum += squares;
    }
    let norm = sum.sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        let factor = factor as f32;
        gradients.values_mut().flatten().for_each(|gradient| *gradient *= factor);
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Values = BTreeMap<String, Vec<f32>>;

    fn start() -> Values {
        Values::from([
            ("v".to_string(), vec![0.1, -0.2]),
            ("w".to_string(), vec![0.5, -1.25, 2.0, 0.001]),
        ])
    }

    fn gradients(w: f32, v: f32) -> Values {
        Values::from([
            ("v".to_string(), [-0.05f32, 0.4].map(|g| g / v).to_vec()),
            ("w".to_string(), [0.3f32, -0.7, 1e-4, 5.0].map(|g| g * w).to_vec()),
        ])
    }

    /// Makes one step with the gradients of the reference below.
    fn step(optimizer: &mut AdamW, values: &mut Values, step: usize) {
        let gradients = gradients(step as f32, step as f32);
        let mut parameters: Vec<Parameter> = values
            .iter_mut()
            .map(|(name, values)| Parameter {
                name,
                values,
                gradient: &gradients[name],
                learning_rate: if name == "w" { 1e-2 } else { 2e-3 },
                weight_decay: if name == "w" { 0.1 } else { 0.0 },
            })
            .collect();
        optimizer.step(&mut parameters).unwrap();
    }

    fn close(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            let bits = (got.to_bits() as i64 - want.to_bits() as i64).abs();
            assert!(bits <= 2, "{got:?} is {bits} bits from {want:?}");
        }
    }

    /// PyTorch 2.15: `AdamW([{params: [w], lr: 1e-2, weight_decay: 0.1}, {params: [v], lr: 2e-3,
    /// weight_decay: 0}])`, three steps with `w.grad = tensor([.3, -.7, 1e-4, 5.]) * s` and
    /// `v.grad = tensor([-.05, .4]) / s`.
    #[test]
    fn three_steps_are_those_of_torch() {
        let (mut optimizer, mut values) = (AdamW::new(AdamWConfig::default()), start());
        (1..=3).for_each(|s| step(&mut optimizer, &mut values, s));
        close(&values["w"], &[0.46929935, -1.2170516, 1.964806, -0.028205188]);
        close(&values["v"], &[0.105610676, -0.20561068]);
        let w = &optimizer.moments["w"];
        close(&w.exp_avg, &[0.1683, -3.927e-1, 5.6099998e-5, 2.805]);
        close(&w.exp_avg_sq, &[0.0012594602, 0.0068570604, 1.3994e-10, 0.34985006]);
        let v = &optimizer.moments["v"];
        close(&v.exp_avg, &[-0.007966667, 0.06373334]);
        close(&v.exp_avg_sq, &[3.3971555e-6, 2.1741795e-4]);
    }

    /// PyTorch 2.15: `clip_grad_norm_([w, v], 1.0)` with the gradients of the first step.
    #[test]
    fn clipping_is_that_of_torch() {
        let mut gradients = gradients(1.0, 1.0);
        let norm = clip_grad_norm(&mut gradients, 1.0).unwrap();
        assert!((norm - 5.07370662689209).abs() < 1e-6, "{norm}");
        close(&gradients["w"], &[0.059128363, -0.13796617, 1.9709452e-5, 0.9854727]);
        close(&gradients["v"], &[-0.0098547265, 0.07883781]);
    }

    #[test]
    fn a_saved_and_loaded_optimizer_goes_on_to_the_bit() {
        let (mut unbroken, mut values) = (AdamW::new(AdamWConfig::default()), start());
        step(&mut unbroken, &mut values, 1);
        step(&mut unbroken, &mut values, 2);
        let saved = unbroken.to_safetensors().unwrap();
        let mut resumed = AdamW::from_safetensors(AdamWConfig::default(), &saved).unwrap();
        let mut resumed_values = values.clone();
        step(&mut unbroken, &mut values, 3);
        step(&mut resumed, &mut resumed_values, 3);
        assert_eq!((resumed_values, &resumed), (values, &unbroken));
        assert_eq!(resumed.to_safetensors().unwrap(), unbroken.to_safetensors().unwrap());
    }

    #[test]
    fn anothers_state_is_refused_and_nothing_is_changed() {
        let (mut optimizer, mut values) = (AdamW::new(AdamWConfig::default()), start());
        step(&mut optimizer, &mut values, 1);
        let before = optimizer.clone();
        let mut try_with = |name: &str, len: usize| {
            let (mut values, gradient) = (vec![0.0; len], vec![0.0; len]);
            let (learning_rate, weight_decay) = (1.0, 0.0);
            let values = values.as_mut_slice();
            let gradient = &gradient;
            let one = Parameter { name, values, gradient, learning_rate, weight_decay };
            optimizer.step(&mut [one]).unwrap_err().to_string()
        };
        assert!(try_with("w", 3).contains("optimizer state of w has 4 values"));
        assert!(try_with("u", 3).contains("no optimizer state for u after 1 steps"));
        assert!(try_with("w", 4).contains("got 1 parameters, the optimizer state has 2"));
        assert_eq!(optimizer, before);
    }

    #[test]
    fn clipping_leaves_small_gradients_and_0_is_off() {
        let gradients = Values::from([("a".to_string(), vec![3.0]), ("b".to_string(), vec![4.0])]);
        for max_norm in [0.0, 5.1] {
            let mut clipped = gradients.clone();
            assert_eq!(clip_grad_norm(&mut clipped, max_norm).unwrap(), 5.0);
            assert_eq!(clipped, gradients);
        }
        let mut clipped = gradients.clone();
        clip_grad_norm(&mut clipped, 1.0).unwrap();
        close(&clipped["a"], &[0.6]);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_named() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut gradients = Values::from([
                ("layers.0.up.weight".to_string(), vec![1.0]),
                ("layers.1.up.weight".to_string(), vec![0.0, bad]),
            ]);
            let error = clip_grad_norm(&mut gradients, 1.0).unwrap_err().to_string();
            let start = "the gradient of layers.1.up.weight has 1 of 2 values that are not finite";
            assert!(error.starts_with(start), "{error}");
        }
    }

    proptest! {
        #[test]
        fn damaged_state_is_an_error_and_no_panic(cut in 0usize..400, flip in 0usize..400) {
            let (mut optimizer, mut values) = (AdamW::new(AdamWConfig::default()), start());
            step(&mut optimizer, &mut values, 1);
            let mut saved = optimizer.to_safetensors().unwrap();
            let len = saved.len();
            saved[flip % len] ^= 0x55;
            let _ = AdamW::from_safetensors(AdamWConfig::default(), &saved).is_ok();
            saved[flip % len] ^= 0x55;
            saved.truncate(cut % len);
            prop_assert!(AdamW::from_safetensors(AdamWConfig::default(), &saved).is_err());
        }
    }
}
