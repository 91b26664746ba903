//! Seconds of one SFT step on the default model: 8 x 256 random tokens, all in the loss, post-block
//! linear steering of rank 8 (or `--lora`).
//!
//! `cargo bench --bench sft_step -- [--lora] [--checkpointing] [--steps N] [--dtype f32|bf16]
//! [--matmul_precision highest|high|medium]`

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use steersman::Result;
use steersman::adapter::{Adapter, Lora, LoraConfig, Steering, SteeringConfig};
use steersman::model::{Batch, LoadedModel, Policy};
use steersman::ops::{Engine, MatmulPrecision, Tape, Target, WeightDtype};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEQUENCES: usize = 8;
const LENGTH: usize = 256;

fn main() -> Result<()> {
    steersman::cli::start_up();
    let args: Vec<String> = std::env::args().collect();
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let value = |flag: &str| args.iter().position(|arg| arg == flag).map(|i| args[i + 1].clone());
    let steps = value("--steps").and_then(|steps| steps.parse().ok()).unwrap_or(3);
    let dtype = match value("--dtype").as_deref() {
        Some("bf16") => WeightDtype::Bf16,
        _ => WeightDtype::F32,
    };
    let precision = match value("--matmul_precision").as_deref() {
        Some("high") => MatmulPrecision::High,
        Some("medium") => MatmulPrecision::Medium,
        Some("highest") | None => MatmulPrecision::Highest,
        Some(other) => panic!("no matmul_precision '{other}'"),
    };
    let engine = Engine::new(Device::Cpu, precision);
    let model = LoadedModel::load("smollm2-135m-instruct", Some(dtype), &engine)?;
    let config = model.policy.config();
    let adapter: Box<dyn Adapter> = match has("--lora") {
        true => Box::new(Lora::new(LoraConfig::all_linear(), config, 0, &Device::Cpu)?),
        false => {
            let steering = SteeringConfig::post_block(config);
            Box::new(Steering::new(steering, config, 0, &Device::Cpu)?)
        }
    };
    let adapters = vec![adapter];
    let mut seconds = Vec::new();
    for step in 0..steps + 1 {
        let start = Instant::now();
        let loss = one_step(&model.policy, &adapters, has("--checkpointing"))?;
        let taken = start.elapsed().as_secs_f64();
        println!("step {step}: {taken:.3} s, loss {loss:.6}");
        if step > 0 {
            seconds.push(taken);
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let rate = (SEQUENCES * LENGTH) as f64 / median;
    println!("median_s {median:.3} tokens_per_s {rate:.1} peak_mib {}", peak_mib());
    Ok(())
}

fn one_step(policy: &Policy, adapters: &[Box<dyn Adapter>], checkpointing: bool) -> Result<f32> {
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
    let (dh, _) = tape.backward_to_input(&loss, one, &h)?;
    if let Some(dh) = dh {
        trace.backward(dh)?;
    }
    Ok(value)
}

/// Peak resident memory of this process, MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0u64) / 1024
}
