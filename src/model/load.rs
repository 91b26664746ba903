//! A model with all that belongs to it, loaded from one name.

use std::path::Path;

use candle_core::DType;
use serde::Serialize;
use serde_json::Map;
use sha2::{Digest, Sha256};
use tracing::debug_span;

use super::{
    ChatTemplate, GenerationConfig, Gguf, ModelConfig, ModelSource, Policy, Tokenizer, Weights,
};
use crate::ops::{Engine, WeightDtype};
use crate::{Error, Result};

/// The model that an adapter belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseModel {
    /// The folder, file or hub id that it was loaded from.
    pub name_or_path: String,
    /// Hash of its weights, if known.
    pub sha256: Option<String>,
}

/// A policy and where it came from.
pub struct LoadedModel {
    /// The frozen decoder.
    pub policy: Policy,
    /// Where it was found.
    pub source: ModelSource,
    /// The name that it was asked for.
    pub name_or_path: String,
}

impl LoadedModel {
    /// Finds and loads a model; `dtype` is the storage of its matrices, nothing for the checkpoint's
    /// own.
    ///
    /// # Errors
    /// If the model is not found, damaged or of an unknown family.
    pub fn load(name_or_path: &str, dtype: Option<WeightDtype>, engine: &Engine) -> Result<Self> {
        Self::of(ModelSource::resolve(name_or_path)?, name_or_path, dtype, engine)
    }

    /// [`LoadedModel::load`] and [`LoadedModel::base`] at the same time.
    ///
    /// # Errors
    /// As these two.
    pub fn load_with_base(
        name_or_path: &str,
        dtype: Option<WeightDtype>,
        engine: &Engine,
    ) -> Result<(Self, BaseModel)> {
        let source = ModelSource::resolve(name_or_path)?;
        let load = || Self::of(source.clone(), name_or_path, dtype, engine);
        let (model, base) = rayon::join(load, || base(&source, name_or_path));
        Ok((model?, base?))
    }

    fn of(
        source: ModelSource,
        name_or_path: &str,
        dtype: Option<WeightDtype>,
        engine: &Engine,
    ) -> Result<Self> {
        let _phase = debug_span!("load").entered();
        let config = ModelConfig::load(&source)?;
        let weights = Weights::open(&source)?;
        let dtype = dtype.unwrap_or(match weights.dtype().auto() {
            DType::BF16 => WeightDtype::Bf16,
            _ => WeightDtype::F32,
        });
        Ok(LoadedModel {
            policy: Policy::load(&config, &weights, engine, dtype)?,
            source,
            name_or_path: name_or_path.to_string(),
        })
    }

    /// The identity of the model, with the hash of its weights, for adapter files.
    ///
    /// # Errors
    /// If the weights cannot be read any more.
    pub fn base(&self) -> Result<BaseModel> {
        base(&self.source, &self.name_or_path)
    }
}

fn base(source: &ModelSource, name_or_path: &str) -> Result<BaseModel> {
    let _phase = debug_span!("hash").entered();
    let files = match source {
        ModelSource::Gguf(path) => vec![path.clone()],
        ModelSource::Folder(folder) => weight_files(folder)?,
    };
    let mut hash = Sha256::new();
    for path in files {
        let mut file = std::fs::File::open(&path).map_err(Error::io(&path))?;
        std::io::copy(&mut file, &mut hash).map_err(Error::io(&path))?;
    }
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(BaseModel { name_or_path: name_or_path.to_string(), sha256: Some(sha256) })
}

fn weight_files(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut files: Vec<_> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    files.sort();
    Ok(files)
}

/// The text side of a model: its tokenizer, and its chat template if it has one.
pub struct TextModel {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Any of these ends a text or a turn: those of `generation_config.json` (or `config.json`, or
    /// the GGUF file), then the tokenizer's own.
    pub stop_token_ids: Vec<u32>,
    /// Messages to text; the error says why there is none.
    template: Result<ChatTemplate>,
}

impl TextModel {
    /// Loads the tokenizer and template of `source`; `template` is a file that replaces the model's
    /// own.
    ///
    /// # Errors
    /// If the tokenizer is missing or damaged, knows ids beyond the model's vocabulary, or the given
    /// template cannot be read.
    pub fn load(source: &ModelSource, template: Option<&Path>, vocab_size: usize) -> Result<Self> {
        let (mut tokenizer, gguf) = match source {
            ModelSource::Folder(folder) => (Tokenizer::from_folder(folder)?, None),
            ModelSource::Gguf(path) => {
                let gguf = Gguf::open(path)?;
                (Tokenizer::from_gguf(gguf.metadata())?, Some(gguf))
            }
        };
        tokenizer.check_vocab(vocab_size)?;
        let template = match (template, &gguf) {
            (Some(path), _) => Ok(ChatTemplate::from_file(path, &tokenizer)?),
            (None, Some(gguf)) => ChatTemplate::from_gguf(gguf.metadata(), &tokenizer),
            (None, None) => ChatTemplate::from_folder(source.path(), &tokenizer),
        };
        let generation = match &gguf {
            Some(gguf) => GenerationConfig::from_gguf(gguf),
            None => GenerationConfig::load(source)?,
        };
        let mut stop_token_ids = generation.eos_token_ids;
        for id in tokenizer.end_of_turn_ids() {
            if !stop_token_ids.contains(&id) {
                stop_token_ids.push(id);
            }
        }
        Ok(TextModel { tokenizer, stop_token_ids, template })
    }

    /// The token that is put behind a completion: the tokenizer's EOS, as in TRL, else the first of
    /// those that end a text; nothing if the model names none.
    pub fn end_token_id(&self) -> Option<u32> {
        let eos = self.tokenizer.eos_token().map(|token| token.id);
        eos.or(self.stop_token_ids.first().copied())
    }

    /// The chat template.
    ///
    /// # Errors
    /// If the model has none: says what to do.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().map_err(|error| Error::usage(error.to_string()))
    }

    /// Tokens of a conversation up to where the assistant's answer begins.
    ///
    /// # Errors
    /// If the model has no chat template or the template refuses the messages.
    pub fn chat_prompt<M: Serialize + ?Sized>(&self, messages: &M) -> Result<Vec<u32>> {
        let text = self.template()?.render(messages, true, &Map::new())?;
        self.tokenizer.encode(&text, false)
    }
}
