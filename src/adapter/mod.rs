//! What is trained: small adapters on a frozen policy.
//!
//! An [`Adapter`] hooks into the forward pass at two kinds of places: it may shift the tensor at a
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
use std::fmt;

use candle_core::Tensor;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use base::{BaseModel, warn_of_other_model};
pub use folder::{load, load_all, save, to_safetensors};
pub use lora::{Lora, LoraConfig};
pub use positions::Positions;
pub use steering::{Steering, SteeringConfig, SteeringKind};

use crate::model::{Batch, Matrix, ModelConfig};
use crate::ops::{LowRankUpdate, Tape, Value};
use crate::{Error, Result};

/// A place in a block whose tensor is shifted (`model/block.rs` has the graph).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Site {
    /// The residual stream after the second addition.
    #[default]
    PostBlock,
    /// The MLP's contribution before it is added.
    PostMlp,
    /// The normed input of the MLP; the skip path is untouched.
    PreMlp,
    /// The attention's contribution before it is added.
    PostAttention,
}

impl Site {
    /// All sites.
    pub const ALL: [Site; 4] = [Site::PostBlock, Site::PostMlp, Site::PreMlp, Site::PostAttention];
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Site::PostBlock => "post_block",
            Site::PostMlp => "post_mlp",
            Site::PreMlp => "pre_mlp",
            Site::PostAttention => "post_attention",
        })
    }
}

/// A trainable addition to a frozen policy.
pub trait Adapter {
    /// Its parameters by the keys of its file; each f32.
    fn parameters(&self) -> &BTreeMap<String, Tensor>;

    /// Puts new values in the place of the old ones; keys and shapes stay.
    fn set_parameters(&mut self, parameters: BTreeMap<String, Tensor>);

    /// The lowest layer that it touches; none if it touches no layer.
    fn lowest_layer(&self) -> Option<usize>;

    /// Shifts h [N, D] at a site of a layer.
    fn shift(
        &self,
        _tape: &Tape,
        _layer: usize,
        _site: Site,
        h: Value,
        _batch: &Batch,
    ) -> Result<Value> {
        Ok(h)
    }

    /// Whether [`Adapter::shift`] does anything at a site of a layer.
    fn steers(&self, layer: usize, site: Site) -> bool;

    /// What is added to the output of a matrix whose input is x [N, in].
    fn update(
        &self,
        _tape: &Tape,
        _layer: usize,
        _matrix: Matrix,
        _x: &Value,
        _batch: &Batch,
    ) -> Result<Option<LowRankUpdate>> {
        Ok(None)
    }

    /// Says that a training step begins, whose random numbers belong to (seed, step), or with
    /// nothing that training is over; only adapters with dropout care.
    fn set_training(&mut self, _step: Option<(u64, u64)>) {}

    /// Numbers a token that the backward pass keeps for what the adapter does in a layer, besides
    /// what it keeps of the block.
    fn kept(&self, _model: &ModelConfig, _layer: usize) -> usize {
        0
    }

    /// Whether all that it does in a block comes after the block's matrices, which then go without
    /// gradients in the lowest block.
    fn acts_last(&self) -> bool {
        false
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
