//! What is trained: small adapters on a frozen policy.
//!
//! An [`Adapter`] [hooks](Hooks) into the forward pass at two kinds of places: it may shift the tensor at a
//! [`Site`] (steering), or name a low-rank update of a matrix (LoRA). Several adapters are applied in
//! order; `joint` is a steering adapter and a LoRA together.

mod base;
mod folder;
mod init;
mod lora;
mod peft;
mod positions;
mod steering;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::BTreeMap;

use candle_core::Tensor;

pub use crate::model::{BaseModel, Site};
pub use base::warn_of_other_model;
pub use folder::{load, load_all, save, to_safetensors};
pub use lora::{Lora, LoraConfig};
pub use positions::Positions;
pub use steering::{Steering, SteeringConfig, SteeringKind};

use crate::model::{Batch, Hooks, Matrix, ModelConfig};
use crate::ops::{LowRankUpdate, Tape, Value};
use crate::{Error, Result};

/// A trainable addition to a frozen policy.
pub trait Adapter: Hooks {
    /// Its parameters by the keys of its file; each f32.
    fn parameters(&self) -> &BTreeMap<String, Tensor>;

    /// Puts new values in the place of the old ones; keys and shapes stay.
    fn set_parameters(&mut self, parameters: BTreeMap<String, Tensor>);

    /// Says that a training step begins, whose random numbers belong to (seed, step), or with
    /// nothing that training is over; only adapters with dropout care.
    fn set_training(&mut self, _step: Option<(u64, u64)>) {}

    /// Numbers a token that the backward pass keeps for what the adapter does in a layer, besides
    /// what it keeps of the block.
    fn kept(&self, _model: &ModelConfig, _layer: usize) -> usize {
        0
    }

    /// Whether it needs to know where the prompt ends.
    fn needs_prompt_lengths(&self) -> bool {
        false
    }

    /// The parameterisation of its shift, if it is a steering adapter.
    fn steering_kind(&self) -> Option<SteeringKind> {
        None
    }

    /// The learning rate's group: `steering` or `lora`.
    fn group(&self) -> &'static str;

    /// The names and bytes of its configuration and parameter files.
    ///
    /// # Errors
    /// If a parameter cannot be read back from the device.
    fn files(&self, base: &BaseModel) -> Result<Vec<(&'static str, Vec<u8>)>>;

    /// Number of trainable parameters.
    fn parameter_count(&self) -> usize {
        self.parameters().values().map(Tensor::elem_count).sum()
    }
}

impl Hooks for Box<dyn Adapter> {
    fn lowest_layer(&self) -> Option<usize> {
        self.as_ref().lowest_layer()
    }

    fn shift(
        &self,
        tape: &Tape,
        layer: usize,
        site: Site,
        h: Value,
        batch: &Batch,
    ) -> Result<Value> {
        self.as_ref().shift(tape, layer, site, h, batch)
    }

    fn steers(&self, layer: usize, site: Site) -> bool {
        self.as_ref().steers(layer, site)
    }

    fn update(
        &self,
        tape: &Tape,
        layer: usize,
        matrix: Matrix,
        x: &Value,
        batch: &Batch,
    ) -> Result<Option<LowRankUpdate>> {
        self.as_ref().update(tape, layer, matrix, x, batch)
    }

    fn acts_last(&self) -> bool {
        self.as_ref().acts_last()
    }
}

/// Refuses layers that the model does not have.
fn check_layers(layers: &[usize], config: &ModelConfig) -> Result<()> {
    let count = config.layers.len();
    match layers.iter().find(|layer| **layer >= count) {
        None => Ok(()),
        Some(layer) => Err(Error::usage(format!(
            "layer {layer} does not exist: the model has layers 0 to {}",
            count - 1
        ))),
    }
}
