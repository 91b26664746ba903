//! Seconds of one SFT step on the default model: 8 x 256 tokens, all in the loss, AdamW included.
//!
//! `cargo bench --bench sft_step -- [--adapter steering|lora] [--steps N] [--losses N]
//! [--dtype f32|bf16] [--matmul_precision highest|high|medium] [--checkpointing]`
//!
//! Steering is post-block, linear, of rank 8; LoRA is of rank 8 on all seven matrices. The last line
//! of the output is `key value ...`; with `--losses` it is the loss of each of N steps.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use steersman::adapter::{Adapter, Lora, LoraConfig, Steering, SteeringConfig};
use steersman::config::LearningRates;
use steersman::model::{Batch, LoadedModel, Policy};
use steersman::ops::{Engine, Gradients, MatmulPrecision, Tape, Target, WeightDtype};
use steersman::train::optimizer::{AdamW, AdamWConfig};
use steersman::train::update::apply;
use steersman::{Error, Result};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEQUENCES: usize = 8;
const LENGTH: usize = 256;
const RATES: LearningRates = LearningRates { steering: 1e-3, lora: 1e-3 };

fn main() -> Result<()> {
    steersman::cli::start_up();
    let args: Vec<String> = std::env::args().collect();
    let value = |flag: &str| args.iter().position(|arg| arg == flag).map(|i| args[i + 1].clone());
    let count = |flag: &str| value(flag).and_then(|steps| steps.parse::<usize>().ok());
    let dtype = match value("--dtype").as_deref() {
        Some("bf16") => WeightDtype::Bf16,
        _ => WeightDtype::F32,
    };
    let precision = match value("--matmul_precision").as_deref() {
        Some("high") => MatmulPrecision::High,
        Some("medium") => MatmulPrecision::Medium,
        Some("highest") | None => MatmulPrecision::Highest,
        Some(other) => return Err(Error::usage(format!("there is no matmul_precision {other}"))),
    };
    let engine = Engine::new(Device::Cpu, precision);
    let model = LoadedModel::load("smollm2-135m-instruct", Some(dtype), &engine)?;
    let mut adapters = vec![adapter(&model.policy, value("--adapter").as_deref() == Some("lora"))?];
    let mut optimizer = AdamW::new(AdamWConfig::default());
    let checkpointing = args.iter().any(|arg| arg == "--checkpointing");
    let mut step = || -> Result<(f64, f32)> {
        let start = Instant::now();
        let (loss, gradients) = gradients(&model.policy, &adapters, checkpointing)?;
        update(&mut optimizer, &mut adapters, gradients)?;
        Ok((start.elapsed().as_secs_f64(), loss))
    };
    if let Some(steps) = count("--losses") {
        let losses = (0..steps).map(|_| Ok(format!("{:.7}", step()?.1)));
        println!("losses {}", losses.collect::<Result<Vec<_>>>()?.join(" "));
        return Ok(());
    }
    step()?;
    let mut seconds =
        (0..count("--steps").unwrap_or(3)).map(|_| Ok(step()?.0)).collect::<Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let rate = (SEQUENCES * LENGTH) as f64 / median;
    println!("median_s {median:.3} tokens_per_s {rate:.1} peak_mib {}", peak_mib());
    Ok(())
}

/// The adapter, with initial values that are simple enough to be made again elsewhere.
fn adapter(policy: &Policy, lora: bool) -> Result<Box<dyn Adapter>> {
    let config = policy.config();
    let mut adapter: Box<dyn Adapter> = match lora {
        true => Box::new(Lora::new(LoraConfig::all_linear(), config, 0, &Device::Cpu)?),
        false => {
            Box::new(Steering::new(SteeringConfig::post_block(config), config, 0, &Device::Cpu)?)
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
    Ok(adapter)
}

/// Mean loss of the batch, and its gradients.
fn gradients(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    checkpointing: bool,
) -> Result<(f32, Gradients)> {
    let (mut batch, mut targets) = (Batch::new(), Vec::new());
    for sequence in 0..SEQUENCES {
        let id = |t: usize| ((sequence * LENGTH + t) * 7919 % 49_000) as u32;
        let ids: Vec<u32> = (0..LENGTH).map(id).collect();
        let start = batch.len() as u32;
        batch.push(&ids, 0, None);
        targets.extend((1..LENGTH).map(|t| Target { row: start + t as u32 - 1, token: ids[t] }));
    }
    let embedded = policy.embed(&batch.input_ids)?;
    let trace = policy.trace(&batch, embedded, adapters, checkpointing)?;
    let tape = Tape::recording(policy.engine());
    let h = tape.input(trace.output());
    let weights = vec![-1.0 / targets.len() as f32; targets.len()];
    let (loss, _) = policy.weighted_logps(&tape, &h, &targets, &weights)?;
    let value = loss.tensor().to_vec1::<f32>()?[0];
    let one = Tensor::ones(1, DType::F32, &Device::Cpu)?;
    match tape.backward_to_input(&loss, one, &h)? {
        (Some(dh), _) => Ok((value, trace.backward(dh)?)),
        (None, _) => Ok((value, Gradients::new())),
    }
}

fn update(
    optimizer: &mut AdamW,
    adapters: &mut [Box<dyn Adapter>],
    gradients: Gradients,
) -> Result<()> {
    let flat = |(key, tensor): (String, Tensor)| Ok((key, tensor.flatten_all()?.to_vec1()?));
    let flat = gradients.into_iter().map(flat).collect::<Result<_>>()?;
    apply(optimizer, adapters, &flat, RATES, 0.0)
}

/// Peak resident memory of this process, MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0u64) / 1024
}
