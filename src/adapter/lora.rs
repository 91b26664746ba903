//! LoRA (Hu et al. 2021): y = W x + scale * B A x on any of a block's seven matrices, with PEFT's
//! names, initial values and files.
//!
//! scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`. A [r, in] starts
//! Kaiming-uniform(a = sqrt 5), B [out, r] at 0.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor};

use super::folder::{self, LORA_CONFIG, LORA_WEIGHTS};
use super::peft::{self, Patterns};
use super::{Adapter, Site, init};
use crate::model::{BaseModel, Batch, Hooks, Matrix, ModelConfig};
use crate::ops::{self, Activation, LowRank, LowRankUpdate, Tape, Value};
use crate::{Error, Result};

/// The configuration of a [`Lora`] adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank of the update.
    pub r: usize,
    /// Numerator of the update's factor.
    pub lora_alpha: f64,
    /// Probability that an input of A is dropped while training.
    pub lora_dropout: f64,
    /// Divide by sqrt(r) instead of r.
    pub use_rslora: bool,
    /// The matrices that are adapted, in every layer.
    pub target_modules: BTreeSet<Matrix>,
}

impl LoraConfig {
    /// Rank 8, alpha 16 on all seven matrices.
    pub fn all_linear() -> Self {
        LoraConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: Matrix::ALL.into(),
        }
    }

    /// Number of trainable parameters: r (in + out) per matrix.
    pub fn parameter_count(&self, model: &ModelConfig) -> usize {
        let widths = self.target_modules.iter().map(|matrix| {
            let (inputs, outputs) = model.linear_shape(*matrix);
            inputs + outputs
        });
        model.layers.len() * self.r * widths.sum::<usize>()
    }

    fn scale(&self, r: usize, lora_alpha: f64) -> f32 {
        (lora_alpha / if self.use_rslora { (r as f64).sqrt() } else { r as f64 }) as f32
    }
}

/// The update of one matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    /// Its rank.
    pub r: usize,
    /// Numerator of its factor.
    pub alpha: f64,
    /// Its factor.
    scale: f32,
}

/// A low-rank update of some matrices.
#[derive(Clone, Debug)]
pub struct Lora {
    config: LoraConfig,
    parameters: BTreeMap<String, Tensor>,
    updates: BTreeMap<(usize, Matrix), Update>,
    /// Number of the model's layers.
    layer_count: usize,
    /// (seed, step) of the masks while training.
    dropout: Option<(u64, u64)>,
}

/// The full name of a matrix in the model.
pub(super) fn module(layer: usize, matrix: Matrix) -> String {
    format!("model.layers.{layer}.{}", matrix.module())
}

/// PEFT's key of one of the two factors.
fn key(layer: usize, matrix: Matrix, factor: &str) -> String {
    format!("base_model.model.{}.lora_{factor}.weight", module(layer, matrix))
}

/// The rank of A [r, in], or else of B [out, r].
fn rank(a: Option<&Tensor>, b: Option<&Tensor>) -> Option<usize> {
    let of = |factor: Option<&Tensor>, axis: usize| {
        factor.map(|factor| factor.dims().get(axis).copied().unwrap_or(0))
    };
    of(a, 0).or(of(b, 1))
}

impl Lora {
    /// A fresh adapter, which changes no logit.
    ///
    /// # Errors
    /// If the rank is 0, no matrix is named or the dropout is not in [0, 1).
    pub fn new(
        config: LoraConfig,
        model: &ModelConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        if config.r == 0 || config.target_modules.is_empty() {
            return Err(Error::usage(
                "lora_r must be at least 1 and lora_target_modules not empty",
            ));
        }
        let mut parameters = BTreeMap::new();
        for layer in 0..model.layers.len() {
            for matrix in &config.target_modules {
                let (inputs, outputs) = model.linear_shape(*matrix);
                let (a, b) = (key(layer, *matrix, "A"), key(layer, *matrix, "B"));
                let bound = 1.0 / (inputs as f64).sqrt();
                let start = init::uniform(seed, &a, (config.r, inputs), bound, device)?;
                parameters.insert(a, start);
                parameters.insert(b, init::zeros((outputs, config.r), device)?);
            }
        }
        Self::with_parameters(config, model, parameters, &Patterns::default(), "lora")
    }

    /// An adapter with given parameters; `patterns` override `lora_alpha` and `r` for some modules.
    ///
    /// # Errors
    /// If a parameter is missing, fits nothing in the model or has another rank than it should.
    pub(super) fn with_parameters(
        config: LoraConfig,
        model: &ModelConfig,
        parameters: BTreeMap<String, Tensor>,
        patterns: &Patterns,
        origin: &str,
    ) -> Result<Self> {
        if !(0.0..1.0).contains(&config.lora_dropout) {
            return Err(Error::usage("lora_dropout must be at least 0 and below 1"));
        }
        let (mut shapes, mut updates) = (BTreeMap::new(), BTreeMap::new());
        for layer in 0..model.layers.len() {
            for matrix in Matrix::ALL {
                let (inputs, outputs) = model.linear_shape(matrix);
                let (a, b) = (key(layer, matrix, "A"), key(layer, matrix, "B"));
                let Some(found) = rank(parameters.get(&a), parameters.get(&b)) else { continue };
                let name = module(layer, matrix);
                let r = match &patterns.ranks {
                    Some(ranks) => peft::lookup(ranks, &name).map_or(config.r, |r| r as usize),
                    None => found,
                };
                let of_another_rank = |a: &Tensor| r != found && a.dims() == [found, inputs];
                if parameters.get(&a).is_some_and(of_another_rank) {
                    return Err(Error::failure(format!(
                        "{origin}: '{a}' has shape [{found}, {inputs}], this adapter's r wants \
                         [{r}, {inputs}]"
                    )));
                }
                let alpha = peft::lookup(&patterns.alphas, &name);
                let alpha = alpha.unwrap_or(config.lora_alpha);
                let scale = config.scale(r, alpha);
                updates.insert((layer, matrix), Update { r, alpha, scale });
                shapes.insert(a, vec![r, inputs]);
                shapes.insert(b, vec![outputs, r]);
            }
        }
        folder::check_shapes(&shapes, &parameters, origin)?;
        let layer_count = model.layers.len();
        Ok(Lora { config, parameters, updates, layer_count, dropout: None })
    }

    /// The adapter's configuration.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }
}

impl Hooks for Lora {
    fn lowest_layer(&self) -> Option<usize> {
        self.updates.keys().map(|(layer, _)| *layer).min()
    }

    fn steers(&self, _: usize, _: Site) -> bool {
        false
    }

    fn update(
        &self,
        tape: &Tape,
        layer: usize,
        matrix: Matrix,
        x: &Value,
        batch: &Batch,
    ) -> Result<Option<LowRankUpdate>> {
        let Some(alpha) = self.updates.get(&(layer, matrix)).map(|update| update.scale) else {
            return Ok(None);
        };
        let factor = |name: &str| {
            let key = key(layer, matrix, name);
            tape.param(&key, &self.parameters[&key])
        };
        let dropped = |(seed, step)| {
            let key = [seed, step, layer as u64, matrix as u64];
            ops::dropout(tape, x, self.config.lora_dropout, &key, &batch.token_keys)
        };
        let input = self.dropout.map(dropped).transpose()?;
        let form = LowRank { alpha, activation: Activation::Linear };
        Ok(Some(LowRankUpdate { input, down: factor("A"), up: factor("B"), form }))
    }
}

impl Adapter for Lora {
    fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    fn set_parameters(&mut self, parameters: BTreeMap<String, Tensor>) {
        self.parameters = parameters;
    }

    fn kept(&self, model: &ModelConfig, layer: usize) -> usize {
        let mask = |matrix: &Matrix| match self.config.lora_dropout > 0.0 {
            true => model.linear_shape(*matrix).0.div_ceil(u32::BITS as usize),
            false => 0,
        };
        let of = |(at, matrix): &(usize, Matrix)| (*at == layer).then(|| mask(matrix));
        self.updates.iter().filter_map(|(at, update)| Some(of(at)? + update.r)).sum()
    }

    fn set_training(&mut self, step: Option<(u64, u64)>) {
        self.dropout = step.filter(|_| self.config.lora_dropout > 0.0);
    }

    fn group(&self) -> &'static str {
        "lora"
    }

    fn files(&self, base: &BaseModel) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let config = peft::json(&self.config, &self.updates, self.layer_count, base)?;
        let weights = folder::to_safetensors(&self.parameters)?;
        Ok(vec![(LORA_CONFIG, config), (LORA_WEIGHTS, weights)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::tiny_model;
    use super::*;

    #[test]
    fn a_rank_above_the_width_is_loaded_as_it_was_saved() {
        let model = tiny_model();
        let config = LoraConfig { r: 16, ..LoraConfig::all_linear() };
        let lora = Lora::new(config, &model, 0, &Device::Cpu).unwrap();
        assert!(model.hidden_size < 16);
        for update in lora.updates.values() {
            assert_eq!((update.r, update.scale), (16, 1.0));
        }
    }
}
