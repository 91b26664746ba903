//! Where models come from: configurations against transformers, safetensors, GGUF, the hub.

#[path = "model_sources/configs.rs"]
mod configs;
#[path = "model_sources/gguf.rs"]
mod gguf;
#[path = "model_sources/hub.rs"]
mod hub;
#[path = "model_sources/safetensors.rs"]
mod weights;
