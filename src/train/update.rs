//! One optimizer step on the parameters of some adapters.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::optimizer::{AdamW, Parameter};
use crate::adapter::Adapter;
use crate::config::LearningRates;
use crate::{Error, Result};

/// Moves every parameter of `adapters` by its gradient.
///
/// # Errors
/// If a parameter has no gradient.
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
    let mut parameters = Vec::with_capacity(values.len());
    for (name, learning_rate, values) in &mut values {
        let missing = || Error::failure(format!("'{name}' got no gradient"));
        let gradient = gradients.get(name).ok_or_else(missing)?;
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
