//! The policy: where a model comes from, its configuration and its weights.

pub mod config;
mod config_rope;

pub use config::{Activation, Family, LayerConfig, Matrix, ModelConfig};
pub use config_rope::{Rope, RopeScaling};
