//! New tokens a second on the default model: `--sequences` samples of random prompts, `--group`
//! samples a prompt, drawn at temperature 1 without an end.
//!
//! `cargo bench --bench generate -- [--sequences 64] [--group 1] [--prompt_tokens 100]
//! [--new_tokens 64] [--dtype f32|bf16] [--matmul_precision highest|high|medium] [--runs 3]`

use std::time::Instant;

use candle_core::Device;
use steersman::Result;
use steersman::adapter::{Adapter, Steering, SteeringConfig};
use steersman::model::LoadedModel;
use steersman::ops::{Engine, MatmulPrecision, WeightDtype};
use steersman::rollout::{GenerateOptions, Generator, Request, SamplingParams};

fn main() -> Result<()> {
    steersman::cli::start_up();
    let args: Vec<String> = std::env::args().collect();
    let value = |flag: &str| args.iter().position(|arg| arg == flag).map(|i| args[i + 1].clone());
    let number =
        |flag: &str, or: usize| value(flag).map_or(or, |n| n.parse().expect("a whole number"));
    let (sequences, group) = (number("--sequences", 64), number("--group", 1));
    let (prompt_tokens, new_tokens) = (number("--prompt_tokens", 100), number("--new_tokens", 64));
    let dtype = match value("--dtype").as_deref() {
        Some("f32") => WeightDtype::F32,
        _ => WeightDtype::Bf16,
    };
    let precision = match value("--matmul_precision").as_deref() {
        Some("high") => MatmulPrecision::High,
        Some("medium") => MatmulPrecision::Medium,
        Some("highest") | None => MatmulPrecision::Highest,
        Some(other) => panic!("no matmul_precision '{other}'"),
    };
    let engine = Engine::new(Device::Cpu, precision);
    let model = LoadedModel::load("smollm2-135m-instruct", Some(dtype), &engine)?;
    let steering = SteeringConfig::post_block(model.policy.config());
    let steering = Steering::new(steering, model.policy.config(), 0, &Device::Cpu)?;
    let adapters: Vec<Box<dyn Adapter>> = vec![Box::new(steering)];
    let requests: Vec<Request> = (0..sequences)
        .map(|i| {
            let (prompt_id, sample) = ((i / group) as u64, (i % group) as u64);
            let id = |t: usize| ((i / group * prompt_tokens + t) * 7919 % 49_000) as u32;
            Request { prompt: (0..prompt_tokens).map(id).collect(), prompt_id, sample }
        })
        .collect();
    let options = GenerateOptions {
        max_new_tokens: new_tokens,
        sampling: SamplingParams::default(),
        max_batch: sequences,
        ..GenerateOptions::default()
    };
    let generator = Generator::new(&model.policy, &adapters, &options, None);
    let mut rates = Vec::new();
    for run in 0..number("--runs", 3) {
        let start = Instant::now();
        let done = generator.run(&requests, &mut |_| {})?;
        let seconds = start.elapsed().as_secs_f64();
        let tokens: usize = done.iter().map(|completion| completion.tokens.len()).sum();
        let sum = done
            .iter()
            .flat_map(|c| &c.tokens)
            .fold(0u64, |sum, t| sum * 31 % 1_000_003 + *t as u64);
        println!("run {run}: {seconds:.3} s, {tokens} tokens, checksum {sum}");
        rates.push(tokens as f64 / seconds);
    }
    rates.sort_by(f64::total_cmp);
    println!("tokens_per_s {:.1} peak_mib {}", rates[rates.len() / 2], peak_mib());
    Ok(())
}

/// Peak resident memory of this process, MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0u64) / 1024
}
