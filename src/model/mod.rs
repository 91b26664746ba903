//! The policy: where a model comes from, its configuration, its weights, and the frozen decoder with
//! its steering sites.

mod batch;
mod block;
pub mod chat_template;
mod chat_template_env;
mod chat_template_json;
mod chat_template_spans;
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
mod hooks;
pub mod hub;
mod load;
mod policy;
mod recording;
pub mod source;
mod stored;
pub mod tokenizer;
mod tokenizer_bpe;
mod tokenizer_folder;
mod tokenizer_gguf;
mod tokenizer_spm;
mod tokenizer_stream;
mod trace;
mod transfer;
pub mod weights;
mod weights_safetensors;

pub use batch::Batch;
pub use chat_template::{ChatTemplate, Message};
pub use config::{Activation, Family, LayerConfig, Matrix, ModelConfig};
pub use config_generation::GenerationConfig;
pub use config_rope::{Llama3, Rope, RopeScaling, Yarn};
pub use gguf::Gguf;
pub use hooks::{Hooks, Site};
pub use load::{BaseModel, LoadedModel, TextModel};
pub use policy::{Policy, part_tokens};
pub use recording::{Recorded, RecordedRow, Recording};
pub use source::ModelSource;
pub use tokenizer::Tokenizer;
pub use trace::Trace;
pub use weights::{StoredDtype, Weights};

/// The name of a layer's matrix in a Hugging Face checkpoint.
fn matrix_name(layer: usize, matrix: Matrix) -> String {
    format!("model.layers.{layer}.{}.weight", matrix.module())
}
