//! Seconds of the gradients of a GRPO step on the default model: 8 prompts of 128 tokens with 8
//! completions of 128 tokens each, every completion token in the loss, on-policy. A group's prompt is
//! one segment that its completions continue.
//!
//! `cargo bench --bench grpo_update -- [--steps 1] [--repeat_prompts] [--checkpointing]
//! [--adapter steering|lora] [--dtype f32|bf16] [--matmul_precision highest|high|medium]
//! [--profile TRACE]`
//!
//! `--repeat_prompts` gives each completion a prompt of its own, as trainers without shared prefixes
//! do. The last line of the output is `key value ...`.

mod common;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use common::{Flags, cpu_time, median, peak_mib, token};
use steersman::adapter::Adapter;
use steersman::model::{Batch, Policy};
use steersman::ops::{GradientSums, Tape, Target};
use steersman::{Result, profile};

const PROMPTS: usize = 8;
const COMPLETIONS: usize = 8;
const LENGTH: usize = 128;

fn main() -> Result<()> {
    steersman::cli::start_up()?;
    let flags = Flags::new();
    profile::during(flags.profile(), || run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let model = flags.model()?;
    let adapters = flags.adapters(&model.policy)?;
    let step = || -> Result<(f64, f64, f64)> {
        let (start, cpu) = (Instant::now(), cpu_time());
        let mut sums = GradientSums::new();
        let mut loss = 0.0;
        for prompt in 0..PROMPTS {
            let (batch, targets, weights) = group(prompt, flags.has("--repeat_prompts"));
            let checkpointing = flags.has("--checkpointing");
            let batch = (&batch, targets.as_slice(), weights.as_slice());
            loss += gradients(&model.policy, &adapters, batch, checkpointing, &mut sums)?;
        }
        sums.finish(model.policy.engine())?;
        Ok((start.elapsed().as_secs_f64(), cpu_time() - cpu, loss))
    };
    let (.., loss) = step()?;
    let measured = (0..flags.count("--steps").unwrap_or(1)).map(|_| step());
    let measured = measured.collect::<Result<Vec<_>>>()?;
    let seconds = median(measured.iter().map(|(seconds, ..)| *seconds).collect());
    let cpu = median(measured.iter().map(|(_, cpu, _)| *cpu).collect());
    println!("median_s {seconds:.3} cpu_s {cpu:.2} loss {loss:.6} peak_mib {}", peak_mib());
    Ok(())
}

/// A prompt's completions with their targets, sorted by row, and weights: -advantage / tokens, which
/// on-policy is the gradient of the clipped objective in the log-prob.
fn group(prompt: usize, repeat_prompts: bool) -> (Batch, Vec<Target>, Vec<f32>) {
    let ids = |sequence: usize| -> Vec<u32> {
        (sequence * LENGTH..(sequence + 1) * LENGTH).map(token).collect()
    };
    let mut batch = Batch::new();
    let shared = (!repeat_prompts).then(|| batch.push(&ids(prompt), LENGTH, None));
    let mut loss: Vec<(Target, f32)> = Vec::new();
    for sample in 0..COMPLETIONS {
        let completion = ids(PROMPTS + prompt * COMPLETIONS + sample);
        let parent = shared.unwrap_or_else(|| batch.push(&ids(prompt), LENGTH, None));
        let last = batch.segments()[parent];
        let (last, start) = (last.start + last.len - 1, batch.len());
        batch.push(&completion, LENGTH, Some(parent));
        let advantage = sample as f32 - (COMPLETIONS - 1) as f32 / 2.0;
        let weight = -advantage / (PROMPTS * COMPLETIONS * LENGTH) as f32;
        for (t, token) in completion.into_iter().enumerate() {
            let row = if t == 0 { last } else { start + t - 1 };
            loss.push((Target { row: row as u32, token }, weight));
        }
    }
    loss.sort_by_key(|(target, _)| target.row);
    let (targets, weights) = loss.into_iter().unzip();
    (batch, targets, weights)
}

/// Adds the group's gradients to `sums`; returns its part of the sum of weight * log-prob.
fn gradients(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    (batch, targets, weights): (&Batch, &[Target], &[f32]),
    checkpointing: bool,
    sums: &mut GradientSums,
) -> Result<f64> {
    let embedded = policy.embed(&batch.input_ids)?;
    let trace = policy.trace(batch, embedded, adapters, checkpointing)?;
    let tape = Tape::recording(policy.engine());
    let h = tape.input(trace.output());
    let (loss, _) = policy.weighted_logps(&tape, &h, targets, weights)?;
    let value = f64::from(loss.tensor().to_vec1::<f32>()?[0]);
    let one = Tensor::ones(1, DType::F32, &Device::Cpu)?;
    if let (Some(dh), _) = tape.backward_to_input(&loss, one, &h)? {
        trace.backward_into(dh, sums)?;
    }
    Ok(value)
}
