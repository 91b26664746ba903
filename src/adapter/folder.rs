//! Adapter folders: our steering files, and LoRA exactly as PEFT writes it.
//!
//! A folder may hold both, as `joint` does. `docs/formats.md` describes the files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::peft;
use super::{Adapter, Lora, Positions, Site, Steering, SteeringConfig, SteeringKind};
use crate::model::{BaseModel, ModelConfig};
use crate::{Error, Result};

pub(super) const STEERING_CONFIG: &str = "steering_config.json";
pub(super) const STEERING_WEIGHTS: &str = "steering_model.safetensors";
pub(super) const LORA_CONFIG: &str = "adapter_config.json";
pub(super) const LORA_WEIGHTS: &str = "adapter_model.safetensors";

const FORMAT: &str = "steersman-steering";
const VERSION: u32 = 1;

/// `steering_config.json`.
#[derive(Serialize, Deserialize)]
struct SteeringFile {
    format: String,
    version: u32,
    kind: SteeringKind,
    site: Site,
    #[serde(default)]
    rank: Option<usize>,
    #[serde(default = "one")]
    alpha: f64,
    layers: LayerList,
    #[serde(default)]
    positions: Positions,
    base_model_name_or_path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base_model_sha256: Option<String>,
    #[serde(default = "f32_name")]
    dtype: String,
}

/// Layers by number, or the word `all`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum LayerList {
    Numbers(Vec<usize>),
    Word(String),
}

fn one() -> f64 {
    1.0
}

fn f32_name() -> String {
    "float32".to_string()
}

/// Loads every adapter in `dir`.
///
/// # Errors
/// If the folder holds none, a file is damaged, or a parameter does not fit the model.
pub fn load(dir: &Path, model: &ModelConfig, device: &Device) -> Result<Vec<Box<dyn Adapter>>> {
    if !dir.is_dir() {
        return Err(Error::usage(format!(
            "{}: no such folder; give one with {STEERING_CONFIG} or {LORA_CONFIG}",
            dir.display()
        )));
    }
    let mut adapters: Vec<Box<dyn Adapter>> = Vec::new();
    if dir.join(STEERING_CONFIG).is_file() {
        adapters.push(Box::new(load_steering(dir, model, device)?));
    }
    if dir.join(LORA_CONFIG).is_file() {
        adapters.push(Box::new(load_lora(dir, model, device)?));
    }
    if adapters.is_empty() {
        return Err(Error::usage(format!(
            "{}: no adapter here; wanted {STEERING_CONFIG} or {LORA_CONFIG}",
            dir.display()
        )));
    }
    Ok(adapters)
}

/// Loads the adapters of several folders, which must not share parameter names.
///
/// # Errors
/// As [`load`], or if two folders hold a parameter of the same name.
pub fn load_all(
    dirs: &[impl AsRef<Path>],
    model: &ModelConfig,
    device: &Device,
) -> Result<Vec<Box<dyn Adapter>>> {
    let (mut adapters, mut seen) = (Vec::new(), BTreeSet::new());
    for dir in dirs {
        for adapter in load(dir.as_ref(), model, device)? {
            for key in adapter.parameters().keys() {
                if !seen.insert(key.clone()) {
                    let dir = dir.as_ref().display();
                    return Err(Error::usage(format!("{dir}: another adapter has '{key}' too")));
                }
            }
            adapters.push(adapter);
        }
    }
    Ok(adapters)
}

/// Writes the files of `adapters` into `dir`, which must exist.
///
/// # Errors
/// If a file cannot be written whole.
pub fn save(dir: &Path, adapters: &[Box<dyn Adapter>], base: &BaseModel) -> Result<()> {
    for adapter in adapters {
        for (name, bytes) in adapter.files(base)? {
            crate::files::write_atomic(&dir.join(name), &bytes)?;
        }
    }
    Ok(())
}

fn load_steering(dir: &Path, model: &ModelConfig, device: &Device) -> Result<Steering> {
    let path = dir.join(STEERING_CONFIG);
    let file: SteeringFile = read_json(&path)?;
    if file.format != FORMAT || file.version != VERSION {
        let found = format!("'{}' version {}", file.format, file.version);
        let wanted = format!("'{FORMAT}' version {VERSION}");
        return Err(Error::failure(format!("{}: {found}, wanted {wanted}", path.display())));
    }
    let weights = dir.join(STEERING_WEIGHTS);
    let parameters = read_safetensors(&weights, device)?;
    let config = SteeringConfig {
        kind: file.kind,
        site: file.site,
        rank: file.rank.unwrap_or(0),
        alpha: file.alpha,
        layers: match file.layers {
            LayerList::Numbers(layers) => layers,
            LayerList::Word(word) if word == "all" => (0..model.layers.len()).collect(),
            LayerList::Word(word) => {
                let what = format!("layers is '{word}', wanted a list of numbers or 'all'");
                return Err(Error::failure(format!("{}: {what}", path.display())));
            }
        },
        positions: file.positions,
    };
    Steering::with_parameters(config, model, parameters, &weights.display().to_string())
}

fn load_lora(dir: &Path, model: &ModelConfig, device: &Device) -> Result<Lora> {
    let (config, patterns) = peft::read(&dir.join(LORA_CONFIG))?;
    let weights = dir.join(LORA_WEIGHTS);
    let parameters = read_safetensors(&weights, device)?;
    Lora::with_parameters(config, model, parameters, &patterns, &weights.display().to_string())
}

pub(super) fn steering_json(config: &SteeringConfig, base: &BaseModel) -> Result<Vec<u8>> {
    pretty(&SteeringFile {
        format: FORMAT.to_string(),
        version: VERSION,
        kind: config.kind,
        site: config.site,
        rank: (config.kind != SteeringKind::Vector).then_some(config.rank),
        alpha: config.alpha,
        layers: LayerList::Numbers(config.layers.clone()),
        positions: config.positions,
        base_model_name_or_path: base.name_or_path.clone(),
        base_model_sha256: base.sha256.clone(),
        dtype: f32_name(),
    })
}

pub(super) fn pretty(value: &impl Serialize) -> Result<Vec<u8>> {
    let json = serde_json::to_vec_pretty(value);
    json.map_err(|e| Error::failure(format!("adapter configuration cannot be written: {e}")))
}

pub(super) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::failure(format!("{}: {e}", path.display())))
}

/// Reads all tensors of a file as f32.
pub(super) fn read_safetensors(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| {
        Error::failure(format!("{}: damaged safetensors file: {e}", path.display()))
    })?;
    let mut tensors = BTreeMap::new();
    for (key, view) in file.tensors() {
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let path = path.display();
                return Err(Error::failure(format!("{path}: '{key}' has type {other:?}")));
            }
        };
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), device)?;
        tensors.insert(key, tensor.to_dtype(DType::F32)?);
    }
    Ok(tensors)
}

/// The bytes of a safetensors file with these tensors as f32.
///
/// # Errors
/// If a tensor cannot be read back from its device.
pub fn to_safetensors(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let mut raw = Vec::with_capacity(tensors.len());
    for (key, tensor) in tensors {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        raw.push((key, tensor.dims().to_vec(), bytes));
    }
    let damaged = |e| Error::failure(format!("adapter parameters cannot be written: {e}"));
    let views = raw
        .iter()
        .map(|(key, shape, bytes)| {
            TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (key.as_str(), view))
        })
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(damaged)?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize(views, Some(metadata)).map_err(damaged)
}

/// Refuses parameters that are missing, unknown or of another shape than the model wants.
pub(super) fn check_shapes(
    wanted: &BTreeMap<String, Vec<usize>>,
    found: &BTreeMap<String, Tensor>,
    origin: &str,
) -> Result<()> {
    for (key, shape) in wanted {
        let Some(tensor) = found.get(key) else {
            return Err(Error::failure(format!("{origin}: '{key}' is missing")));
        };
        if tensor.dims() != shape.as_slice() {
            let dims = tensor.dims();
            return Err(Error::failure(format!(
                "{origin}: '{key}' has shape {dims:?}, this model wants {shape:?}"
            )));
        }
    }
    match found.keys().find(|key| !wanted.contains_key(*key)) {
        Some(key) => Err(Error::failure(format!("{origin}: '{key}' fits nothing in this model"))),
        None => Ok(()),
    }
}
