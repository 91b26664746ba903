//! GGUF files: metadata, and tensors under Hugging Face names in Hugging Face layout.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Two conventions of the
//! files are undone or noted here: in the `llama` architecture the rows of q and k are permuted
//! for rotating neighbours (2i, 2i + 1) and are put back; Gemma's norm weights hold the "+1"
//! already and are handed out as stored.

use std::collections::HashMap;
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use memmap2::Mmap;

use super::stored::Stored;
use crate::error::{Error, Result};

/// Names of whole-model tensors: Hugging Face, GGUF.
const TOP_NAMES: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// Names inside a block: Hugging Face, GGUF.
const BLOCK_NAMES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// A GGUF file, mapped into memory, its header read.
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    content: Content,
}

impl Gguf {
    /// Maps a file and reads its header; tensors are read when asked for.
    ///
    /// # Errors
    /// The file cannot be read, is no GGUF file, or ends before its last tensor does.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read only; a file that another process shortens meanwhile is outside
        // what can be guarded against, as with every mapped checkpoint.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let content = Content::read(&mut Cursor::new(&map[..])).map_err(|source| {
            let reason = source.to_string();
            let reason = reason.lines().next().unwrap_or_default();
            Error::failure(format!("{} cannot be read as GGUF: {reason}", path.display()))
        })?;
        let gguf = Gguf { path: path.to_path_buf(), map, content };
        let mut names: Vec<&String> = gguf.content.tensor_infos.keys().collect();
        names.sort();
        for name in names {
            gguf.bytes(name, &gguf.content.tensor_infos[name])?;
        }
        Ok(gguf)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its key-value pairs: hyper-parameters, tokenizer, chat template.
    pub fn metadata(&self) -> &HashMap<String, Value> {
        &self.content.metadata
    }

    /// `general.architecture`, or nothing if it is missing.
    pub fn architecture(&self) -> &str {
        match self.metadata().get("general.architecture") {
            Some(Value::String(name)) => name,
            _ => "",
        }
    }

    /// A number of the architecture, `<architecture>.<key>`, of whatever integer or float type.
    pub fn number(&self, key: &str) -> Option<f64> {
        number(self.metadata().get(&format!("{}.{key}", self.architecture()))?)
    }

    /// Whether the tensor is in the file, by its GGUF name.
    pub fn contains(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Shape of a tensor by its GGUF name, outermost dimension first, as in PyTorch.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.content.tensor_infos.get(name).map(|info| info.shape.dims())
    }

    /// Storage type of a tensor by its GGUF name.
    pub fn dtype(&self, name: &str) -> Option<GgmlDType> {
        self.content.tensor_infos.get(name).map(|info| info.ggml_dtype)
    }

    /// Reads one tensor by its GGUF name, in the file's layout: bf16 stays bf16, everything else
    /// becomes f32 (quantised blocks as llama.cpp dequantises them).
    ///
    /// # Errors
    /// The tensor is missing or of a type that cannot be read.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        self.find(name, None)?.tensor()
    }

    /// Reads one tensor by its Hugging Face name, in Hugging Face's row order.
    ///
    /// # Errors
    /// As [`Gguf::read`].
    pub fn read_hf(&self, name: &str) -> Result<Tensor> {
        self.find_hf(name)?.tensor()
    }

    /// Where the tensor of a Hugging Face name lies.
    pub(super) fn find_hf(&self, name: &str) -> Result<Stored<'_>> {
        let stored = self.stored_name(name).ok_or_else(|| self.missing(name))?;
        self.find(&stored, self.permuted_heads(name)?)
    }

    fn find(&self, name: &str, heads: Option<usize>) -> Result<Stored<'_>> {
        let info = self.content.tensor_infos.get(name).ok_or_else(|| self.missing(name))?;
        let dtype = info.ggml_dtype;
        let stored = Stored::new(self.bytes(name, info)?, dtype, info.shape.dims());
        let unsupported = || {
            let path = self.path.display();
            Error::usage(format!("tensor '{name}' of {path} has the unsupported type {dtype:?}"))
        };
        let stored = stored.ok_or_else(unsupported)?;
        match heads {
            None => Ok(stored),
            Some(heads) => stored.permuted(heads),
        }
    }

    /// Shape of a tensor by its Hugging Face name.
    pub(crate) fn shape_hf(&self, name: &str) -> Result<&[usize]> {
        let stored = self.stored_name(name);
        stored.and_then(|stored| self.shape(&stored)).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::failure(format!("{} has no tensor '{name}'", self.path.display()))
    }

    /// The GGUF name of a Hugging Face name, if the file has the tensor.
    pub fn stored_name(&self, name: &str) -> Option<String> {
        let stored = gguf_name(name, self.architecture() == "gemma3")?;
        self.contains(&stored).then_some(stored)
    }

    /// Number of heads whose rows are permuted in this tensor.
    fn permuted_heads(&self, name: &str) -> Result<Option<usize>> {
        let key = match name {
            _ if self.architecture() != "llama" => return Ok(None),
            _ if name.contains(".self_attn.q_proj.") => "attention.head_count",
            _ if name.contains(".self_attn.k_proj.") => "attention.head_count_kv",
            _ => return Ok(None),
        };
        let heads = self.number(key).or_else(|| self.number("attention.head_count"));
        match heads {
            Some(heads) if heads >= 1.0 => Ok(Some(heads as usize)),
            _ => Err(Error::failure(format!("{} lacks 'llama.{key}'", self.path.display()))),
        }
    }

    /// The bytes of one tensor; refuses what is not aligned, not made of rows of whole blocks or not
    /// inside the file.
    fn bytes(&self, name: &str, info: &TensorInfo) -> Result<&[u8]> {
        let dims = info.shape.dims();
        let row = dims.last().copied().unwrap_or(1);
        let elements = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let start = self.content.tensor_data_offset.checked_add(info.offset);
        let found = elements.zip(start).and_then(|(elements, start)| {
            let whole = row.is_multiple_of(info.ggml_dtype.block_size());
            let blocks = whole.then_some(elements / info.ggml_dtype.block_size())?;
            let length = blocks.checked_mul(info.ggml_dtype.type_size())?;
            let start = usize::try_from(start).ok().filter(|start| start.is_multiple_of(4))?;
            self.map.get(start..start.checked_add(length)?)
        });
        found.ok_or_else(|| {
            Error::failure(format!(
                "{} is truncated or damaged: tensor '{name}' does not lie inside it",
                self.path.display()
            ))
        })
    }
}

/// Any integer, float or boolean of the metadata as f64; of a per-layer array with one value
/// throughout, that value.
pub(crate) fn number(value: &Value) -> Option<f64> {
    Some(match value {
        Value::U8(v) => f64::from(*v),
        Value::I8(v) => f64::from(*v),
        Value::U16(v) => f64::from(*v),
        Value::I16(v) => f64::from(*v),
        Value::U32(v) => f64::from(*v),
        Value::I32(v) => f64::from(*v),
        Value::U64(v) => *v as f64,
        Value::I64(v) => *v as f64,
        Value::F32(v) => f64::from(*v),
        Value::F64(v) => *v,
        Value::Bool(v) => f64::from(u8::from(*v)),
        Value::Array(items) => {
            let first = items.first().and_then(number)?;
            return items.iter().all(|item| number(item) == Some(first)).then_some(first);
        }
        Value::String(_) => return None,
    })
}

/// The GGUF name of a Hugging Face name. Gemma 3 has a norm more on each side of the MLP, and
/// the two conventions name them differently.
fn gguf_name(name: &str, gemma: bool) -> Option<String> {
    if let Some((_, stored)) = TOP_NAMES.iter().find(|(hf, _)| *hf == name) {
        return Some((*stored).to_string());
    }
    let rest = name.strip_prefix("model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let stored = match (module, gemma) {
        ("post_attention_layernorm", false) | ("pre_feedforward_layernorm", true) => "ffn_norm",
        ("post_attention_layernorm", true) => "post_attention_norm",
        _ => BLOCK_NAMES.iter().find(|(hf, _)| *hf == module)?.1,
    };
    Some(format!("blk.{layer}.{stored}.{kind}"))
}
