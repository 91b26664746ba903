//! Steering adapters: a learned shift of a block's activations (arXiv:2603.00425, section 3).
//!
//! `vector`:  h + v
//! `linear`:  h + alpha * Wup Wdown h, with Wdown [R, D] and Wup [D, R], no bias
//! `silu`, `relu`, `gelu`, `tanh`:  h + alpha * Wup phi(Wdown h)
//!
//! Wdown starts Kaiming-uniform(a = sqrt 5) times 1e-3 and Wup and v at 0, so that a fresh adapter
//! changes no logit.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Device, Tensor};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::folder::{self, STEERING_CONFIG, STEERING_WEIGHTS};
use super::{Adapter, Positions, Site, check_layers, init};
use crate::model::{BaseModel, Batch, Hooks, ModelConfig};
use crate::ops::{self, Activation, LowRank, Tape, Value};
use crate::{Error, Result};

/// The parameterisation of the shift.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum SteeringKind {
    /// A constant vector per layer.
    Vector,
    /// Low rank without activation.
    #[default]
    Linear,
    /// Low rank with x * sigmoid(x).
    Silu,
    /// Low rank with max(x, 0).
    Relu,
    /// Low rank with the exact (erf) GELU.
    Gelu,
    /// Low rank with tanh.
    Tanh,
}

impl SteeringKind {
    /// All kinds.
    pub const ALL: [SteeringKind; 6] = [
        SteeringKind::Vector,
        SteeringKind::Linear,
        SteeringKind::Silu,
        SteeringKind::Relu,
        SteeringKind::Gelu,
        SteeringKind::Tanh,
    ];

    /// The function between the two products; none for `vector`.
    fn activation(self) -> Option<Activation> {
        match self {
            SteeringKind::Vector => None,
            SteeringKind::Linear => Some(Activation::Linear),
            SteeringKind::Silu => Some(Activation::Silu),
            SteeringKind::Relu => Some(Activation::Relu),
            SteeringKind::Gelu => Some(Activation::Gelu),
            SteeringKind::Tanh => Some(Activation::Tanh),
        }
    }
}

impl fmt::Display for SteeringKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SteeringKind::Vector => "vector",
            SteeringKind::Linear => "linear",
            SteeringKind::Silu => "silu",
            SteeringKind::Relu => "relu",
            SteeringKind::Gelu => "gelu",
            SteeringKind::Tanh => "tanh",
        })
    }
}

/// The configuration of a [`Steering`] adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct SteeringConfig {
    /// The parameterisation of the shift.
    pub kind: SteeringKind,
    /// The tensor that is shifted.
    pub site: Site,
    /// R, the rank of the shift; not used by `vector`.
    pub rank: usize,
    /// Factor of the low-rank shift.
    pub alpha: f64,
    /// The layers that are steered, counted from 0.
    pub layers: Vec<usize>,
    /// The tokens that are steered.
    pub positions: Positions,
}

impl SteeringConfig {
    /// Rank-8 `linear` steering of every block's output at every position.
    pub fn post_block(config: &ModelConfig) -> Self {
        SteeringConfig {
            kind: SteeringKind::Linear,
            site: Site::PostBlock,
            rank: 8,
            alpha: 1.0,
            layers: (0..config.layers.len()).collect(),
            positions: Positions::All,
        }
    }

    /// Number of trainable parameters for hidden size `d`: D a layer for `vector`, else 2 D R.
    pub fn parameter_count(&self, d: usize) -> usize {
        self.layers.len() * if self.kind == SteeringKind::Vector { d } else { 2 * d * self.rank }
    }

    /// The file key and the shape of each parameter.
    pub(super) fn shapes(&self, d: usize) -> BTreeMap<String, Vec<usize>> {
        let mut shapes = BTreeMap::new();
        for layer in &self.layers {
            if self.kind == SteeringKind::Vector {
                shapes.insert(format!("layers.{layer}.vector"), vec![d]);
            } else {
                shapes.insert(format!("layers.{layer}.down.weight"), vec![self.rank, d]);
                shapes.insert(format!("layers.{layer}.up.weight"), vec![d, self.rank]);
            }
        }
        shapes
    }
}

/// A learned shift of one site in some layers.
#[derive(Clone, Debug)]
pub struct Steering {
    config: SteeringConfig,
    parameters: BTreeMap<String, Tensor>,
}

impl Steering {
    /// A fresh adapter, which changes no logit.
    ///
    /// # Errors
    /// If the rank is 0 or a layer does not exist.
    pub fn new(
        config: SteeringConfig,
        model: &ModelConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        check_layers(&config.layers, model)?;
        if config.rank == 0 && config.kind != SteeringKind::Vector {
            return Err(Error::usage("steering_rank must be at least 1"));
        }
        let bound = 1e-3 / (model.hidden_size as f64).sqrt();
        let mut parameters = BTreeMap::new();
        for (key, shape) in config.shapes(model.hidden_size) {
            let value = match shape.as_slice() {
                [rank, d] if key.ends_with("down.weight") => {
                    init::uniform(seed, &key, (*rank, *d), bound, device)?
                }
                shape => init::zeros(shape, device)?,
            };
            parameters.insert(key, value);
        }
        Ok(Steering { config, parameters })
    }

    /// An adapter with given parameters, whose keys and shapes are checked.
    pub(super) fn with_parameters(
        config: SteeringConfig,
        model: &ModelConfig,
        parameters: BTreeMap<String, Tensor>,
        origin: &str,
    ) -> Result<Self> {
        check_layers(&config.layers, model)?;
        folder::check_shapes(&config.shapes(model.hidden_size), &parameters, origin)?;
        Ok(Steering { config, parameters })
    }

    /// The adapter's configuration.
    pub fn config(&self) -> &SteeringConfig {
        &self.config
    }

    fn shift_all(&self, tape: &Tape, layer: usize, h: &Value) -> Result<Value> {
        let param = |name: &str| {
            let key = format!("layers.{layer}.{name}");
            tape.param(&key, &self.parameters[&key])
        };
        match self.config.kind.activation() {
            None => ops::add_vector(tape, h, &param("vector")),
            Some(activation) => {
                let form = LowRank { alpha: self.config.alpha as f32, activation };
                let (down, up) = (param("down.weight"), param("up.weight"));
                ops::low_rank_shift(tape, h, (&down, &up), form)
            }
        }
    }
}

impl Hooks for Steering {
    fn lowest_layer(&self) -> Option<usize> {
        self.config.layers.iter().min().copied()
    }

    fn shift(
        &self,
        tape: &Tape,
        layer: usize,
        site: Site,
        h: Value,
        batch: &Batch,
    ) -> Result<Value> {
        if !self.steers(layer, site) {
            return Ok(h);
        }
        match self.config.positions.rows(batch) {
            None => self.shift_all(tape, layer, &h),
            Some(rows) if rows.is_empty() => Ok(h),
            Some(rows) => {
                let some = ops::gather_rows(tape, &h, &rows)?;
                let shifted = self.shift_all(tape, layer, &some)?;
                ops::replace_rows(tape, &h, &shifted, &rows)
            }
        }
    }

    fn steers(&self, layer: usize, site: Site) -> bool {
        site == self.config.site && self.config.layers.contains(&layer)
    }

    fn acts_last(&self) -> bool {
        matches!(self.config.site, Site::PostBlock | Site::PostMlp)
    }
}

impl Adapter for Steering {
    fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    fn set_parameters(&mut self, parameters: BTreeMap<String, Tensor>) {
        self.parameters = parameters;
    }

    fn kept(&self, model: &ModelConfig, layer: usize) -> usize {
        let everywhere = self.config.positions == Positions::All;
        let low_rank = self.config.kind != SteeringKind::Vector;
        if !(everywhere && low_rank && self.config.layers.contains(&layer)) {
            return 0;
        }
        let input = match self.config.site {
            Site::PostMlp | Site::PostAttention => model.hidden_size,
            Site::PostBlock | Site::PreMlp => 0,
        };
        self.config.rank + input
    }

    fn needs_prompt_lengths(&self) -> bool {
        self.config.positions != Positions::All
    }

    fn steering_kind(&self) -> Option<SteeringKind> {
        Some(self.config.kind)
    }

    fn group(&self) -> &'static str {
        "steering"
    }

    fn files(&self, base: &BaseModel) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let config = folder::steering_json(&self.config, base)?;
        let weights = folder::to_safetensors(&self.parameters)?;
        Ok(vec![(STEERING_CONFIG, config), (STEERING_WEIGHTS, weights)])
    }
}
