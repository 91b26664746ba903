//! Seconds, processor seconds and peak memory of one SFT step on the default model: 8 x 256 tokens, all
//! in the loss, AdamW included.
//!
//! `cargo bench --bench sft_step -- [--adapter steering|lora] [--steps N] [--losses N] [--sequences N]
//! [--length T] [--micro_batch_tokens N] [--checkpointing] [--dtype f32|bf16]
//! [--matmul_precision highest|high|medium]`
//!
//! Steering is post-block, linear, of rank 8; LoRA is of rank 8 on all seven matrices. The last line
//! of the output is `key value ...`; with `--losses` it is the loss of each of N steps.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{Device, Tensor};
use steersman::adapter::{Adapter, Lora, LoraConfig, Steering, SteeringConfig};
use steersman::config::LearningRates;
use steersman::model::{LoadedModel, Policy};
use steersman::ops::{Engine, GradientSums, Gradients, MatmulPrecision, WeightDtype};
use steersman::train::batching::micro_batches;
use steersman::train::example::{PackedExamples, TokenExample};
use steersman::train::objective::{Passes, Totals, accumulate_gradients};
use steersman::train::optimizer::{AdamW, AdamWConfig};
use steersman::train::update::apply;
use steersman::{Error, Result};

const RATES: LearningRates = LearningRates { steering: 1e-3, lora: 1e-3 };

fn main() -> Result<()> {
    steersman::cli::start_up();
    let args: Vec<String> = std::env::args().collect();
    let value = |flag: &str| args.iter().position(|arg| arg == flag).map(|i| args[i + 1].clone());
    let count = |flag: &str| value(flag).and_then(|n| n.parse::<usize>().ok());
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
    let examples = examples(count("--sequences").unwrap_or(8), count("--length").unwrap_or(256));
    let checkpointing = args.iter().any(|arg| arg == "--checkpointing");
    let passes = Passes { gradient_checkpointing: checkpointing, neftune: None };
    let tokens = count("--micro_batch_tokens").unwrap_or(0);
    let mut step = || -> Result<(f64, f64, f64)> {
        let (start, cpu) = (Instant::now(), cpu_time());
        let (totals, gradients) = gradients(&model.policy, &adapters, &examples, tokens, passes)?;
        update(&mut optimizer, &mut adapters, gradients)?;
        Ok((start.elapsed().as_secs_f64(), cpu_time() - cpu, totals.loss()))
    };
    if let Some(steps) = count("--losses") {
        let losses = (0..steps).map(|_| Ok(format!("{:.7}", step()?.2)));
        println!("losses {}", losses.collect::<Result<Vec<_>>>()?.join(" "));
        return Ok(());
    }
    step()?;
    let measured =
        (0..count("--steps").unwrap_or(3)).map(|_| step()).collect::<Result<Vec<_>>>()?;
    let seconds = median(measured.iter().map(|(seconds, ..)| *seconds).collect());
    let cpu = median(measured.iter().map(|(_, cpu, _)| *cpu).collect());
    let tokens: usize = examples.iter().map(|example| example.input_ids.len()).sum();
    let (rate, peak) = (tokens as f64 / seconds, status_kib("VmHWM") / 1024);
    println!("median_s {seconds:.3} cpu_s {cpu:.2} tokens_per_s {rate:.1} peak_mib {peak}");
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

fn examples(sequences: usize, length: usize) -> Vec<TokenExample> {
    let id = |i: usize| (i * 7919 % 49_000) as u32;
    let ids = |sequence: usize| (sequence * length..(sequence + 1) * length).map(id);
    (0..sequences)
        .map(|sequence| TokenExample::completion(&[], &ids(sequence).collect::<Vec<_>>(), true))
        .collect()
}

fn gradients(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    examples: &[TokenExample],
    micro_batch_tokens: usize,
    passes: Passes,
) -> Result<(Totals, Gradients)> {
    let n = examples.iter().map(TokenExample::targets).sum();
    let order: Vec<usize> = (0..examples.len()).collect();
    let lengths: Vec<usize> = examples.iter().map(|example| example.input_ids.len()).collect();
    let (mut totals, mut sums) = (Totals::default(), GradientSums::new());
    for chosen in micro_batches(&order, &lengths, micro_batch_tokens) {
        let packed = PackedExamples::new(chosen.iter().map(|i| (*i as u64, &examples[*i])));
        totals += accumulate_gradients(policy, adapters, &packed, n, passes, &mut sums)?;
    }
    Ok((totals, sums.finish(policy.engine())?))
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
