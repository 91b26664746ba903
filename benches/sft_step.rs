//! Seconds, processor seconds and peak memory of one SFT step on the default model: 8 x 256 random
//! tokens, all in the loss, post-block linear steering of rank 8 (or `--lora`), in the micro-batches
//! that `sft` chooses where memory does not matter (`--micro_batch_tokens 0`: in one).
//!
//! `cargo bench --bench sft_step -- [--lora] [--checkpointing] [--steps N] [--sequences N]
//! [--length T] [--micro_batch_tokens N] [--dtype f32|bf16]
//! [--matmul_precision highest|high|medium]`

use std::time::Instant;

use candle_core::Device;
use steersman::Result;
use steersman::adapter::{Adapter, Lora, LoraConfig, Steering, SteeringConfig};
use steersman::model::{LoadedModel, Policy, part_tokens};
use steersman::ops::{Engine, GradientSums, MatmulPrecision, WeightDtype};
use steersman::train::batching::micro_batches;
use steersman::train::example::{PackedExamples, TokenExample};
use steersman::train::objective::{Passes, Totals, accumulate_gradients};

fn main() -> Result<()> {
    steersman::cli::keep_freed_pages();
    let args: Vec<String> = std::env::args().collect();
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let value = |flag: &str| args.iter().position(|arg| arg == flag).map(|i| args[i + 1].clone());
    let number = |flag: &str, default| value(flag).map_or(default, |n| n.parse().expect(flag));
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
    let examples = examples(number("--sequences", 8), number("--length", 256));
    let tokens = number("--micro_batch_tokens", part_tokens());
    let passes = Passes { gradient_checkpointing: has("--checkpointing"), neftune: None };
    let (mut seconds, mut cpu_seconds) = (Vec::new(), Vec::new());
    for step in 0..number("--steps", 3) + 1 {
        let (start, cpu) = (Instant::now(), cpu_time());
        let totals = one_step(&model.policy, &adapters, &examples, tokens, passes)?;
        let (taken, cpu) = (start.elapsed().as_secs_f64(), cpu_time() - cpu);
        println!("step {step}: {taken:.3} s, cpu {cpu:.2} s, loss {:.9}", totals.loss());
        if step > 0 {
            seconds.push(taken);
            cpu_seconds.push(cpu);
        }
    }
    let (median, cpu) = (median(seconds), median(cpu_seconds));
    let tokens: usize = examples.iter().map(|example| example.input_ids.len()).sum();
    let rate = tokens as f64 / median;
    let peak = status_kib("VmHWM") / 1024;
    println!("median_s {median:.3} cpu_s {cpu:.2} tokens_per_s {rate:.1} peak_mib {peak}");
    Ok(())
}

fn examples(sequences: usize, length: usize) -> Vec<TokenExample> {
    let id = |i: usize| (i * 7919 % 49_000) as u32;
    let ids = |sequence: usize| (sequence * length..(sequence + 1) * length).map(id);
    (0..sequences)
        .map(|sequence| TokenExample::completion(&[], &ids(sequence).collect::<Vec<_>>(), true))
        .collect()
}

fn one_step(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    examples: &[TokenExample],
    micro_batch_tokens: usize,
    passes: Passes,
) -> Result<Totals> {
    let n = examples.iter().map(TokenExample::targets).sum();
    let order: Vec<usize> = (0..examples.len()).collect();
    let lengths: Vec<usize> = examples.iter().map(|example| example.input_ids.len()).collect();
    let (mut totals, mut sums) = (Totals::default(), GradientSums::new());
    for chosen in micro_batches(&order, &lengths, micro_batch_tokens) {
        let packed = PackedExamples::new(chosen.iter().map(|i| (*i as u64, &examples[*i])));
        totals += accumulate_gradients(policy, adapters, &packed, n, passes, &mut sums)?;
    }
    sums.finish(policy.engine())?;
    Ok(totals)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A size in this process's status, KiB.
fn status_kib(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(key));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0)
}

/// Seconds that this process's threads have run, in user and kernel mode.
fn cpu_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    ticks as f64 / 100.0
}
