//! Where a model lies: a Hugging Face folder or one GGUF file.

use std::path::PathBuf;

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder with `config.json`, safetensors and usually a tokenizer.
    Folder(PathBuf),
    /// One GGUF file with everything inside.
    Gguf(PathBuf),
}
