//! A checkpoint's tensors under their Hugging Face names, read from a memory map when asked for:
//! a single safetensors file, a sharded one, or GGUF.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::model::gguf::Gguf;
use crate::model::source::ModelSource;
use crate::model::stored::Stored;
use crate::model::weights_safetensors::Shards;
use crate::ops::MatrixRows;

/// How a checkpoint stores its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// 32-bit floats.
    F32,
    /// IEEE half precision; handed out as f32, which holds it exactly.
    F16,
    /// bfloat16; handed out as it is.
    Bf16,
    /// Blocks of a GGUF file, 4 to 8 bits a weight; handed out as f32.
    Quantized,
}

impl StoredDtype {
    /// What `dtype = "auto"` keeps the matrices in: the checkpoint's own, bf16 for quantised files
    /// and f32 for half precision (bf16 would drop its last bits).
    pub fn auto(self) -> DType {
        match self {
            StoredDtype::F32 | StoredDtype::F16 => DType::F32,
            StoredDtype::Bf16 | StoredDtype::Quantized => DType::BF16,
        }
    }
}

/// An open checkpoint. Nothing is read before it is asked for, and matrices a few rows at a time, so
/// loading needs hardly more memory than the model.
pub struct Weights {
    files: Files,
    dtype: StoredDtype,
}

enum Files {
    Safetensors(Shards),
    Gguf(Box<Gguf>),
}

/// The matrix whose type stands for the checkpoint's.
const PROBE: &str = "model.layers.0.self_attn.q_proj.weight";

impl Weights {
    /// Maps the checkpoint's files and reads their headers.
    ///
    /// # Errors
    /// A file is missing, truncated or damaged (named), or holds no transformer's weights.
    pub fn open(source: &ModelSource) -> Result<Weights> {
        match source {
            ModelSource::Folder(folder) => Self::safetensors(Shards::open(folder)?),
            ModelSource::Gguf(path) => Self::gguf(Gguf::open(path)?),
        }
    }

    fn safetensors(shards: Shards) -> Result<Weights> {
        let dtype = match shards.dtype(PROBE)? {
            safetensors::Dtype::F32 => StoredDtype::F32,
            safetensors::Dtype::F16 => StoredDtype::F16,
            safetensors::Dtype::BF16 => StoredDtype::Bf16,
            other => return Err(unsupported(shards.folder(), &other.to_string())),
        };
        Ok(Weights { files: Files::Safetensors(shards), dtype })
    }

    fn gguf(gguf: Gguf) -> Result<Weights> {
        let stored = gguf.stored_name(PROBE).and_then(|name| gguf.dtype(&name));
        let dtype = match stored {
            Some(GgmlDType::F32) => StoredDtype::F32,
            Some(GgmlDType::F16) => StoredDtype::F16,
            Some(GgmlDType::BF16) => StoredDtype::Bf16,
            Some(_) => StoredDtype::Quantized,
            None => {
                let path = gguf.path().display();
                return Err(Error::failure(format!("{path} has no tensor '{PROBE}'")));
            }
        };
        Ok(Weights { files: Files::Gguf(Box::new(gguf)), dtype })
    }

    /// How the checkpoint stores its matrices.
    pub fn dtype(&self) -> StoredDtype {
        self.dtype
    }

    /// Whether the checkpoint has a tensor, by its Hugging Face name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.files {
            Files::Safetensors(shards) => shards.contains(name),
            Files::Gguf(gguf) => gguf.stored_name(name).is_some(),
        }
    }

    /// Reads one tensor by its Hugging Face name, such as `model.layers.0.mlp.up_proj.weight`, on
    /// the CPU: bf16 as bf16, everything else as f32.
    ///
    /// # Errors
    /// The tensor is missing, has another shape (found and expected are named), or is of a type
    /// that cannot be read.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.find(name, shape)?.tensor()
    }

    /// A matrix by its Hugging Face name, to be read row by row.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn matrix<'a>(
        &'a self,
        name: &str,
        shape: [usize; 2],
    ) -> Result<impl MatrixRows + use<'a>> {
        self.find(name, &shape)
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<Stored<'_>> {
        let found = match &self.files {
            Files::Safetensors(shards) => shards.shape(name)?,
            Files::Gguf(gguf) => gguf.shape_hf(name)?,
        };
        if found != shape {
            return Err(Error::failure(format!(
                "tensor '{name}' of {} has shape {found:?}, the configuration expects {shape:?}",
                self.path().display()
            )));
        }
        match &self.files {
            Files::Safetensors(shards) => shards.stored(name),
            Files::Gguf(gguf) => gguf.find_hf(name),
        }
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        match &self.files {
            Files::Safetensors(shards) => shards.folder(),
            Files::Gguf(gguf) => gguf.path(),
        }
    }
}

fn unsupported(path: &Path, dtype: &str) -> Error {
    Error::usage(format!(
        "{} holds weights of type {dtype}; supported are F32, F16 and BF16",
        path.display()
    ))
}
