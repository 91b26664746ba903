//! What several test files need: the shared fixtures, and comparisons of tensors.
#![allow(dead_code)]

pub mod passes;
pub mod program;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use steersman::model::{ModelConfig, ModelSource, Policy, Weights};
use steersman::ops::{Engine, MatmulPrecision, WeightDtype};

/// The folder with reference models and numbers, or nothing (with a visible line) where it is missing.
pub fn shared(path: &str) -> Option<PathBuf> {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if full.exists() {
        return Some(full);
    }
    eprintln!("SKIPPED: {} is missing", full.display());
    None
}

/// The engine of the first NVIDIA GPU, or nothing (with a visible line) where there is none or the
/// tests were built without `--features cuda`.
pub fn gpu() -> Option<Engine> {
    let device = Device::new_cuda(0);
    let skipped = |error: &_| eprintln!("SKIPPED: no GPU: {error}");
    device.inspect_err(skipped).ok().map(|gpu| Engine::new(gpu, MatmulPrecision::Highest))
}

/// The reference families.
pub const FAMILIES: [&str; 5] = ["llama-tied", "llama3-scaled-rope", "qwen2", "qwen3", "gemma3"];

/// Loads the f32 policy of a Hugging Face folder.
pub fn policy(folder: &Path, engine: &Engine) -> Policy {
    policy_stored_as(folder, engine, WeightDtype::F32)
}

/// Loads the policy of a Hugging Face folder, its matrices stored as `dtype`.
pub fn policy_stored_as(folder: &Path, engine: &Engine, dtype: WeightDtype) -> Policy {
    let json = std::fs::read(folder.join("config.json")).unwrap();
    let config = ModelConfig::from_json(&serde_json::from_slice(&json).unwrap()).unwrap();
    let weights = Weights::open(&ModelSource::Folder(folder.to_path_buf())).unwrap();
    Policy::load(&config, &weights, engine, dtype).unwrap()
}

/// The numbers that transformers and PEFT computed for a family.
pub fn reference(folder: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("reference.safetensors"), &Device::Cpu).unwrap()
}

/// max |a - b|.
pub fn max_diff(a: &Tensor, b: &Tensor) -> f32 {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_device(&Device::Cpu).unwrap();
    let diff = (flat(a) - flat(b)).unwrap().abs().unwrap();
    diff.max_all().unwrap().to_scalar().unwrap()
}

/// |a - b| / |b| in the Euclidean norm.
pub fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let norm = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_device(&Device::Cpu).unwrap();
    norm((flat(a) - flat(b)).unwrap()) / norm(flat(b)).max(f32::MIN_POSITIVE)
}
