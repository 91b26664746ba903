//! Where models come from: configurations against transformers, damaged files, GGUF, the hub.

#[path = "model_sources/configs.rs"]
mod configs;
