//! Seconds, processor seconds and peak memory of one SFT step on the default model: 8 x 256 tokens, all
//! in the loss, AdamW included, in the micro-batches that `sft` chooses where memory does not matter
//! (`--micro_batch_tokens 0`: in one).
//!
//! `cargo bench --bench sft_step -- [--adapter steering|lora] [--steps N] [--losses N] [--sequences N]
//! [--length T] [--micro_batch_tokens N] [--checkpointing] [--dtype f32|bf16]
//! [--matmul_precision highest|high|medium] [--learning_rate 1e-3] [--profile TRACE]`
//!
//! Steering is post-block, linear, of rank 8; LoRA is of rank 8 on all seven matrices. The last line
//! of the output is `key value ...`; with `--losses` it is the loss of each of N steps.

mod common;

use std::time::Instant;

use candle_core::Tensor;
use common::{Flags, cpu_time, median, peak_mib, token};
use steersman::adapter::Adapter;
use steersman::config::LearningRates;
use steersman::model::{Policy, part_tokens};
use steersman::ops::{GradientSums, Gradients};
use steersman::train::batching::micro_batches;
use steersman::train::example::{PackedExamples, TokenExample};
use steersman::train::objective::{Passes, Totals, accumulate_gradients};
use steersman::train::optimizer::{AdamW, AdamWConfig};
use steersman::train::update::apply;
use steersman::{Result, profile};

fn main() -> Result<()> {
    steersman::cli::start_up()?;
    let flags = Flags::new();
    profile::during(flags.profile(), || run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let count = |flag: &str| flags.count(flag);
    let model = flags.model()?;
    let mut adapters = flags.adapters(&model.policy)?;
    let mut optimizer = AdamW::new(AdamWConfig::default());
    let examples = examples(count("--sequences").unwrap_or(8), count("--length").unwrap_or(256));
    let passes = Passes { gradient_checkpointing: flags.has("--checkpointing"), neftune: None };
    let tokens = count("--micro_batch_tokens").unwrap_or_else(part_tokens);
    let rate = flags.value("--learning_rate").and_then(|rate| rate.parse().ok()).unwrap_or(1e-3);
    let rates = LearningRates { steering: rate, lora: rate };
    let mut step = || -> Result<(f64, f64, f64)> {
        let (start, cpu) = (Instant::now(), cpu_time());
        let (totals, gradients) = gradients(&model.policy, &adapters, &examples, tokens, passes)?;
        update(&mut optimizer, &mut adapters, gradients, rates)?;
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
    let (rate, peak) = (tokens as f64 / seconds, peak_mib());
    println!("median_s {seconds:.3} cpu_s {cpu:.2} tokens_per_s {rate:.1} peak_mib {peak}");
    Ok(())
}

fn examples(sequences: usize, length: usize) -> Vec<TokenExample> {
    let ids = |sequence: usize| (sequence * length..(sequence + 1) * length).map(token);
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
    rates: LearningRates,
) -> Result<()> {
    let flat = |(key, tensor): (String, Tensor)| Ok((key, tensor.flatten_all()?.to_vec1()?));
    let flat = gradients.into_iter().map(flat).collect::<Result<_>>()?;
    apply(optimizer, adapters, &flat, rates, 0.0)
}
