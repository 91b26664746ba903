//! Where models and data come from: configurations against transformers, safetensors, GGUF, hub.

mod common;

#[path = "model_sources/configs.rs"]
mod configs;
#[path = "model_sources/gguf.rs"]
mod gguf;
#[path = "model_sources/hub.rs"]
mod hub;
#[path = "model_sources/hub_tasks.rs"]
mod hub_tasks;
#[path = "model_sources/safetensors.rs"]
mod weights;
