//! One optimizer step on the parameters of some adapters.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::optimizer::{AdamW, Parameter};
use crate::Result;
use crate::adapter::Adapter;
use crate::config::LearningRates;

/// Moves every parameter of `adapters` by its gradient, which is zero where there is none: nothing
/// of the batch reached the parameter.
///
/// # Errors
/// If a gradient has the wrong size or a tensor operation fails.
pub fn apply(
    optimizer: &mut AdamW,
    adapters: &mut [Box<dyn Adapter>],
    gradients: &BTreeMap<String, Vec<f32>>,
    rates: LearningRates,
    weight_decay: f64,
) -> Result<()> {
    let mut values: Vec<(String, f64, Vec<f32>)> = Vec::new();
    for adapter in adapters.iter() {
        let rate = if adapter.group() == "steering" { rates.steering } else { rates.lora };
        for (key, tensor) in adapter.parameters() {
            values.push((key.clone(), rate, tensor.flatten_all()?.to_vec1()?));
        }
    }
    let zeros = vec![0.0; values.iter().map(|(_, _, values)| values.len()).max().unwrap_or(0)];
    let mut parameters = Vec::with_capacity(values.len());
    for (name, learning_rate, values) in &mut values {
        let zeros = zeros.get(..values.len()).unwrap_or_default();
        let gradient = gradients.get(name).map_or(zeros, Vec::as_slice);
        let learning_rate = *learning_rate;
        parameters.push(Parameter { name, values, gradient, learning_rate, weight_decay });
    }
    optimizer.step(&mut parameters)?;
    let mut values: BTreeMap<String, Vec<f32>> =
        values.into_iter().map(|(name, _, values)| (name, values)).collect();
    for adapter in adapters.iter_mut() {
        let mut moved = BTreeMap::new();
        for (key, old) in adapter.parameters() {
            let values = values.remove(key).unwrap_or_default();
            moved.insert(key.clone(), Tensor::from_vec(values, old.shape(), old.device())?);
        }
        adapter.set_parameters(moved);
    }
    Ok(())
}
