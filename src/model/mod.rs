//! The policy: where a model comes from, its configuration, its weights, and the frozen decoder with
//! its steering sites.

mod batch;
mod block;
pub mod config;
mod config_rope;
mod policy;
mod trace;

pub use batch::Batch;
pub use config::{Activation, Family, LayerConfig, Matrix, ModelConfig};
pub use config_rope::{Rope, RopeScaling};
pub use policy::Policy;
pub use trace::Trace;

/// The name of a layer's matrix in a Hugging Face checkpoint.
fn matrix_name(layer: usize, matrix: Matrix) -> String {
    format!("model.layers.{layer}.{}.weight", matrix.module())
}
