//! The safetensors files of a Hugging Face folder: one, or several with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};

use super::stored::Stored;
use crate::error::{Error, Result};

/// The index beside a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The only file of a checkpoint in one piece.
pub(crate) const SINGLE: &str = "model.safetensors";

/// All safetensors files of a checkpoint.
pub(crate) struct Shards {
    folder: PathBuf,
    files: Vec<Shard>,
    /// Tensor name as stored → index into `files`.
    names: BTreeMap<String, usize>,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    start: usize,
}

impl Shards {
    /// Maps every file of the folder's checkpoint and reads the headers.
    pub(crate) fn open(folder: &Path) -> Result<Shards> {
        let index = folder.join(INDEX);
        let single = folder.join(SINGLE);
        let paths = if index.exists() && !single.exists() {
            shard_files(&index)?.into_iter().map(|name| folder.join(name)).collect()
        } else {
            vec![single]
        };
        let files = paths.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;
        let mut names = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            names.extend(file.metadata.tensors().into_keys().map(|name| (name, i)));
        }
        Ok(Shards { folder: folder.to_path_buf(), files, names })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.stored_name(name).is_some()
    }

    pub(crate) fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.find(name)?.1.shape)
    }

    pub(crate) fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.find(name)?.1.dtype)
    }

    /// Where a tensor lies.
    pub(crate) fn stored(&self, name: &str) -> Result<Stored<'_>> {
        let (file, info) = self.find(name)?;
        let (begin, end) = info.data_offsets;
        let bytes = &file.map[file.start + begin..file.start + end];
        let dtype = match info.dtype {
            Dtype::F32 => Some(GgmlDType::F32),
            Dtype::F16 => Some(GgmlDType::F16),
            Dtype::BF16 => Some(GgmlDType::BF16),
            _ => None,
        };
        dtype.and_then(|dtype| Stored::new(bytes, dtype, &info.shape)).ok_or_else(|| {
            Error::usage(format!(
                "tensor '{name}' of {} is of type {}; supported are F32, F16 and BF16",
                file.path.display(),
                info.dtype
            ))
        })
    }

    fn find(&self, name: &str) -> Result<(&Shard, &TensorInfo)> {
        let missing =
            || Error::failure(format!("{} has no tensor '{name}'", self.folder.display()));
        let stored = self.stored_name(name).ok_or_else(missing)?;
        let file = &self.files[self.names[&stored]];
        Ok((file, file.metadata.info(&stored).ok_or_else(missing)?))
    }

    /// The name in the files: as asked for, or with the prefixes of a multimodal model's text part
    /// (transformers 4: `language_model.model.`, 5: `model.language_model.`), or without `model.`
    /// where the headless model was saved.
    fn stored_name(&self, name: &str) -> Option<String> {
        let inner = name.strip_prefix("model.");
        let candidates = [
            Some(name.to_string()),
            Some(format!("language_model.{name}")),
            inner.map(|inner| format!("model.language_model.{inner}")),
            inner.map(str::to_string),
        ];
        candidates.into_iter().flatten().find(|candidate| self.names.contains_key(candidate))
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Shard> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the map is read only; a file that another process shortens meanwhile is outside
        // what can be guarded against, as with every mapped checkpoint.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|source| {
            Error::failure(format!(
                "{} is truncated or no safetensors file: {source}",
                path.display()
            ))
        })?;
        Ok(Shard { path, map, metadata, start: header + 8 })
    }
}

/// The distinct files that an index names, in order.
pub(crate) fn shard_files(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(index).map_err(Error::io(index))?;
    let damaged =
        |reason: &str| Error::failure(format!("{} is damaged: {reason}", index.display()));
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|source| damaged(&source.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| damaged("it has no 'weight_map'"))?;
    let name = |value: &serde_json::Value| match value.as_str() {
        Some(name) if is_file_name(name) => Ok(name.to_string()),
        _ => Err(damaged(&format!("{value} is not a file name"))),
    };
    map.values().map(name).collect()
}

/// A plain name that stays inside its folder.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != ".." && !name.contains(['/', '\\'])
}
