//! Where a model lies: a Hugging Face folder or one GGUF file, found by path, known name or hub id.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::fetch;
use crate::model::hub::{Hub, RepoKind};
use crate::model::weights_safetensors::{INDEX, SINGLE, Shards, shard_files};

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder with `config.json`, safetensors and usually a tokenizer.
    Folder(PathBuf),
    /// One GGUF file with everything inside.
    Gguf(PathBuf),
}

impl ModelSource {
    /// The folder or file.
    pub fn path(&self) -> &Path {
        match self {
            ModelSource::Folder(path) | ModelSource::Gguf(path) => path,
        }
    }

    /// Finds `model_name_or_path`: a folder, a `.gguf` file, a name that `steer model fetch` knows,
    /// or a hub id `owner/name`, which is downloaded unless it is in the hub's cache.
    ///
    /// # Errors
    /// Usage: nothing of that name; what is accepted is said, and a known name that resembles it.
    /// Failure: the folder is incomplete (what is missing is said) or the download failed.
    pub fn resolve(model_name_or_path: &str) -> Result<ModelSource> {
        let source = Self::locate(model_name_or_path, RepoKind::Model)?;
        if let ModelSource::Folder(folder) = &source {
            check_weights(folder)?;
        }
        Ok(source)
    }

    /// As [`ModelSource::resolve`], for those who need no weights: a folder may lack them, and from
    /// the hub they are not fetched.
    ///
    /// # Errors
    /// As [`ModelSource::resolve`], missing weights aside.
    pub fn find(model_name_or_path: &str) -> Result<ModelSource> {
        Self::locate(model_name_or_path, RepoKind::ModelConfig)
    }

    /// As [`ModelSource::find`], for a dry run: the weights in a folder must be there with headers
    /// that can be read. From the hub they are not fetched.
    ///
    /// # Errors
    /// As [`ModelSource::resolve`], or if a file of weights is damaged.
    pub fn rehearse(model_name_or_path: &str) -> Result<ModelSource> {
        let source = Self::find(model_name_or_path)?;
        if let ModelSource::Folder(folder) = &source
            && Path::new(model_name_or_path).is_dir()
        {
            check_weights(folder)?;
            Shards::open(folder)?;
        }
        Ok(source)
    }

    fn locate(name: &str, kind: RepoKind) -> Result<ModelSource> {
        let path = Path::new(name);
        if path.is_dir() {
            return folder(path);
        }
        if path.is_file() {
            return file(path);
        }
        if name == fetch::SMOLLM2 {
            return known(name);
        }
        if is_hub_id(name) {
            let folder = Hub::from_env()?.fetch(kind, name)?;
            return Ok(ModelSource::Folder(folder));
        }
        Err(Error::usage(not_found(name)))
    }
}

/// Checks that a folder is a model's.
fn folder(path: &Path) -> Result<ModelSource> {
    match path.join("config.json").is_file() {
        true => Ok(ModelSource::Folder(path.to_path_buf())),
        false => Err(missing(path, "config.json")),
    }
}

/// Checks that a model's folder has its weights.
fn check_weights(path: &Path) -> Result<()> {
    if !path.join(SINGLE).is_file() {
        let index = path.join(INDEX);
        if !index.is_file() {
            return Err(missing(path, "model.safetensors or model.safetensors.index.json"));
        }
        if let Some(shard) = shard_files(&index)?.iter().find(|name| !path.join(name).is_file()) {
            return Err(missing(path, &format!("{shard}, which its index names")));
        }
    }
    Ok(())
}

fn missing(folder: &Path, what: &str) -> Error {
    Error::failure(format!("the model folder {} has no {what}", folder.display()))
}

fn file(path: &Path) -> Result<ModelSource> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Ok(ModelSource::Gguf(path.to_path_buf()));
    }
    Err(Error::usage(format!(
        "{} is a file but no .gguf file; give its folder if it is part of a Hugging Face model",
        path.display()
    )))
}

/// A name whose file lies in the cache, or is downloaded there as `steer model fetch` does.
fn known(name: &str) -> Result<ModelSource> {
    let path = fetch::smollm2_path()?;
    if path.is_file() || !Hub::from_env()?.offline {
        return Ok(ModelSource::Gguf(fetch::fetch_smollm2()?));
    }
    Err(Error::failure(format!(
        "{name} is not on this machine, and HF_HUB_OFFLINE forbids to get it"
    )))
}

/// `owner/name` of the hub: two parts of letters, digits, `-`, `_` and `.`.
fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(legal)
    };
    let gguf = Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    !gguf && name.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

fn not_found(name: &str) -> String {
    let known = fetch::SMOLLM2;
    let hint = match strsim::jaro_winkler(&name.to_lowercase(), known) > 0.8 {
        true => format!(" (did you mean '{known}'?)"),
        false => String::new(),
    };
    format!(
        "model '{name}' not found{hint}: give a folder with config.json and safetensors, a .gguf \
         file, '{known}' or a Hugging Face id owner/name"
    )
}
