//! How a model wants to be sampled: its end-of-sequence ids and the defaults of
//! `generation_config.json`.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::config_fields::Fields;
use crate::model::gguf::{Gguf, number};
use crate::model::source::ModelSource;

/// End, start and padding ids, and the publisher's sampling settings where given.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Any of these ends a sequence, in the order of the file; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Start of sequence.
    pub bos_token_id: Option<u32>,
    /// Padding; nothing is padded here, files exported for other tools name it.
    pub pad_token_id: Option<u32>,
    /// The publisher samples rather than takes the most likely token.
    pub do_sample: bool,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// Keeps the k most likely tokens.
    pub top_k: Option<usize>,
    /// Keeps the most likely tokens that together reach this probability.
    pub top_p: Option<f64>,
    /// Keeps tokens at least this likely relative to the most likely one.
    pub min_p: Option<f64>,
    /// Divides or multiplies the logits of tokens seen before.
    pub repetition_penalty: Option<f64>,
}

impl GenerationConfig {
    /// Reads what belongs to a model: the folder's two JSON files, or the GGUF file's metadata.
    ///
    /// # Errors
    /// A file cannot be read or a value is of the wrong kind.
    pub fn load(source: &ModelSource) -> Result<GenerationConfig> {
        match source {
            ModelSource::Gguf(path) => Ok(Self::from_gguf(&Gguf::open(path)?)),
            ModelSource::Folder(folder) => {
                let config = read_json(&folder.join("config.json"))?;
                let path = folder.join("generation_config.json");
                let generation = if path.exists() { read_json(&path)? } else { Value::Null };
                Self::from_json(&generation, &config).map_err(|error| located(error, &path))
            }
        }
    }

    /// Reads `generation_config.json` (null if there is none), with the ids it lacks taken from
    /// `config.json`.
    ///
    /// # Errors
    /// Usage: a value is of the wrong kind.
    pub fn from_json(generation: &Value, config: &Value) -> Result<GenerationConfig> {
        let empty = Value::Object(serde_json::Map::new());
        let first = Fields::new(if generation.is_null() { &empty } else { generation })?;
        let outer = Fields::new(config)?;
        let text = outer.object("text_config")?;
        let ids = |key: &str| -> Result<Vec<u32>> {
            let inner = text.as_ref().and_then(|text| text.get(key));
            token_ids(key, first.get(key).or(outer.get(key)).or(inner))
        };
        Ok(GenerationConfig {
            eos_token_ids: ids("eos_token_id")?,
            bos_token_id: ids("bos_token_id")?.first().copied(),
            pad_token_id: ids("pad_token_id")?.first().copied(),
            do_sample: first.flag("do_sample", false)?,
            temperature: first.number("temperature")?,
            top_k: first.size("top_k")?,
            top_p: first.number("top_p")?,
            min_p: first.number("min_p")?,
            repetition_penalty: first.number("repetition_penalty")?,
        })
    }

    /// Reads the ids of a GGUF file: end of sequence, of turn and of message all end a sequence.
    pub fn from_gguf(gguf: &Gguf) -> GenerationConfig {
        let id = |kind: &str| {
            let value = gguf.metadata().get(&format!("tokenizer.ggml.{kind}_token_id"));
            value.and_then(number).filter(|id| *id >= 0.0).map(|id| id as u32)
        };
        let mut seen = BTreeSet::new();
        let ends = ["eos", "eot", "eom"].into_iter().filter_map(id);
        GenerationConfig {
            eos_token_ids: ends.filter(|id| seen.insert(*id)).collect(),
            bos_token_id: id("bos"),
            pad_token_id: id("padding"),
            ..GenerationConfig::default()
        }
    }
}

impl ModelConfig {
    /// Reads the configuration of a model on this machine.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`] and [`ModelConfig::from_gguf`], naming the file.
    pub fn load(source: &ModelSource) -> Result<ModelConfig> {
        match source {
            ModelSource::Gguf(path) => {
                Self::from_gguf(&Gguf::open(path)?).map_err(|error| located(error, path))
            }
            ModelSource::Folder(folder) => {
                let path = folder.join("config.json");
                Self::from_json(&read_json(&path)?).map_err(|error| located(error, &path))
            }
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text)
        .map_err(|source| Error::failure(format!("{} is not JSON: {source}", path.display())))
}

/// Puts the file in front of a message.
fn located(error: Error, path: &Path) -> Error {
    match error {
        Error::Usage(message) => Error::Usage(format!("{}: {message}", path.display())),
        Error::Failure(message) => Error::Failure(format!("{}: {message}", path.display())),
        other => other,
    }
}

/// One id or a list of them.
fn token_ids(key: &str, value: Option<&Value>) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| Error::usage(format!("'{key}' must be token ids, found {value}")))
    };
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}
