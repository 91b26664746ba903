//! What the benchmarks on the default model share: flags, the model, its adapter, the machine's counts.
#![allow(dead_code)] // each benchmark uses a part

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use steersman::adapter::{Adapter, Lora, LoraConfig, Steering, SteeringConfig};
use steersman::model::{LoadedModel, Policy};
use steersman::ops::{Engine, MatmulPrecision, WeightDtype};
use steersman::{Error, Result};

#[global_allocator]
static HEAP: steersman::heap::Heap = steersman::heap::Heap;

/// The flags of the program.
pub struct Flags(Vec<String>);

impl Flags {
    pub fn new() -> Self {
        Flags(std::env::args().collect())
    }

    pub fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|arg| arg == flag)
    }

    pub fn value(&self, flag: &str) -> Option<&str> {
        let at = self.0.iter().position(|arg| arg == flag)?;
        self.0.get(at + 1).map(String::as_str)
    }

    pub fn count(&self, flag: &str) -> Option<usize> {
        self.value(flag).and_then(|n| n.parse().ok())
    }

    /// Where `--profile` writes its trace.
    pub fn profile(&self) -> Option<&Path> {
        self.value("--profile").map(Path::new)
    }

    /// The default model by `--dtype` (bf16) and `--matmul_precision` (highest).
    pub fn model(&self) -> Result<LoadedModel> {
        let dtype = match self.value("--dtype") {
            Some("f32") => WeightDtype::F32,
            _ => WeightDtype::Bf16,
        };
        let engine = Engine::new(Device::Cpu, self.precision()?);
        LoadedModel::load("smollm2-135m-instruct", Some(dtype), &engine)
    }

    /// `--matmul_precision` (highest).
    pub fn precision(&self) -> Result<MatmulPrecision> {
        match self.value("--matmul_precision") {
            Some("high") => Ok(MatmulPrecision::High),
            Some("medium") => Ok(MatmulPrecision::Medium),
            Some("highest") | None => Ok(MatmulPrecision::Highest),
            Some(other) => Err(Error::usage(format!("there is no matmul_precision {other}"))),
        }
    }

    /// Post-block linear steering of rank 8, or with `--adapter lora` LoRA of rank 8 on all seven
    /// matrices, with initial values that are simple enough to be made again elsewhere.
    pub fn adapters(&self, policy: &Policy) -> Result<Vec<Box<dyn Adapter>>> {
        let config = policy.config();
        let mut adapter: Box<dyn Adapter> = match self.value("--adapter") {
            Some("lora") => Box::new(Lora::new(LoraConfig::all_linear(), config, 0, &Device::Cpu)?),
            _ => {
                let steering = SteeringConfig::post_block(config);
                Box::new(Steering::new(steering, config, 0, &Device::Cpu)?)
            }
        };
        let mut values = BTreeMap::new();
        for (key, old) in adapter.parameters() {
            let first = key.contains("lora_A") || key.contains(".down.");
            let bound = if first { 1.0 / (old.dims()[1] as f64).sqrt() } else { 0.0 };
            let value = |i: usize| (((i * 7919 % 1000) as f64 / 500.0 - 1.0) * bound) as f32;
            let all: Vec<f32> = (0..old.elem_count()).map(value).collect();
            values.insert(key.clone(), Tensor::from_vec(all, old.shape(), &Device::Cpu)?);
        }
        adapter.set_parameters(values);
        Ok(vec![adapter])
    }
}

/// Token `i` of an endless text.
pub fn token(i: usize) -> u32 {
    (i * 7919 % 49_000) as u32
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Peak resident memory of this process, MiB.
pub fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0u64) / 1024
}

/// Seconds that this process's threads have run, in user and kernel mode.
pub fn cpu_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    ticks as f64 / 100.0
}
