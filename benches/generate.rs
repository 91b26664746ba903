//! Seconds to draw all completions on the default model: `--sequences` samples of random prompts,
//! `--group` samples a prompt, drawn at temperature 1 without an end; a first, short run is not
//! counted.
//!
//! `cargo bench --bench generate -- [--sequences 64] [--group 1] [--prompt_tokens 100]
//! [--new_tokens 64] [--steps 1] [--adapter steering|lora] [--dtype f32|bf16]
//! [--matmul_precision highest|high|medium] [--profile TRACE]`
//!
//! The last line of the output is `key value ...`; new tokens a second count the prompts' time.

mod common;

use std::time::Instant;

use common::{Flags, median, peak_mib, token};
use steersman::rollout::{GenerateOptions, Generator, Request, SamplingParams};
use steersman::{Result, profile};

fn main() -> Result<()> {
    steersman::cli::start_up()?;
    let flags = Flags::new();
    profile::during(flags.profile(), || run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let count = |flag: &str, or: usize| flags.count(flag).unwrap_or(or);
    let (sequences, group) = (count("--sequences", 64), count("--group", 1));
    let (prompt_tokens, new_tokens) = (count("--prompt_tokens", 100), count("--new_tokens", 64));
    let model = flags.model()?;
    let adapters = flags.adapters(&model.policy)?;
    let request = |i: usize| {
        let start = i / group * prompt_tokens;
        let prompt = (start..start + prompt_tokens).map(token).collect();
        Request { prompt, prompt_id: (i / group) as u64, sample: (i % group) as u64 }
    };
    let requests: Vec<Request> = (0..sequences).map(request).collect();
    let draw = |max_new_tokens: usize| -> Result<f64> {
        let options = GenerateOptions {
            max_new_tokens,
            sampling: SamplingParams::default(),
            max_batch: sequences,
            ..GenerateOptions::default()
        };
        let start = Instant::now();
        Generator::new(&model.policy, &adapters, &options, None).run(&requests, &mut |_| {})?;
        Ok(start.elapsed().as_secs_f64())
    };
    draw(2)?;
    let seconds = (0..count("--steps", 1)).map(|_| draw(new_tokens));
    let seconds = median(seconds.collect::<Result<_>>()?);
    let rate = (sequences * new_tokens) as f64 / seconds;
    println!("median_s {seconds:.3} tokens_per_s {rate:.1} peak_mib {}", peak_mib());
    Ok(())
}
