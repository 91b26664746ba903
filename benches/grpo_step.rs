//! Seconds of a whole GRPO step on the default model: 8 GSM8K questions with 8 completions of 128 tokens
//! each are sampled, rewarded and learnt from.
//!
//! `cargo bench --bench grpo_step -- [--steps 1] [--adapter steering|lora] [--dtype f32|bf16]
//! [--matmul_precision highest|high|medium] [--beta 0] [--micro_batch_tokens N]
//! [--steering_layers all] [--reuse_activations true|false] [--profile TRACE]`
//!
//! Nothing ends a completion before its 128 tokens. Needs gsm8k/train.jsonl (docs/data.md). The last line
//! of the output is `key value ...`.

mod common;

use std::time::Instant;

use common::{Flags, cpu_time, median, peak_mib};
use datasets::{Prompt, PromptRow, Row, Task, TaskOptions};
use reward::{Reward, RewardSet, Sample, Score};
use steersman::config::{Adapter, GrpoConfig, RunConfig};
use steersman::model::TextModel;
use steersman::train::grpo::GrpoTrainer;
use steersman::train::prompts::PromptData;
use steersman::train::run::Trainer;
use steersman::{Error, Result, profile};

/// Differs within nearly every group, so that every completion is learnt from.
struct CountE;

impl Reward for CountE {
    fn name(&self) -> &str {
        "count_e"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
        samples.iter().map(|s| Score::Value(s.completion.matches('e').count() as f64)).collect()
    }
}

fn main() -> Result<()> {
    steersman::cli::start_up()?;
    let flags = Flags::new();
    profile::during(flags.profile(), || run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let model = flags.model()?;
    let shape = model.policy.config();
    let mut text = TextModel::load(&model.source, None, shape.vocab_size)?;
    text.stop_token_ids.clear();
    let config = config(flags)?;
    let (prompts, _) = questions()?.tokenise(&text, shape.max_position_embeddings)?;
    let adapters = config.adapter.build(shape, 0, model.policy.engine().device())?;
    let mut trainer = GrpoTrainer::new(&config, (&model.policy, &text), adapters, &prompts)?;
    trainer.fit(None)?;
    let mut rewards = RewardSet::new(vec![Box::new(CountE)], Vec::new()).map_err(Error::usage)?;
    let mut step = || -> Result<[f64; 4]> {
        let (start, cpu) = (Instant::now(), cpu_time());
        let mut collection = trainer.collect();
        while let Some(prompts) = trainer.next_prompts(&mut collection) {
            let groups = trainer.sample(&prompts)?;
            let generated = start.elapsed().as_secs_f64();
            let scored = trainer.score(groups, &mut rewards)?;
            collection.add(scored, (generated, start.elapsed().as_secs_f64() - generated));
        }
        let rollouts = trainer.prepare(collection, &rewards.names())?;
        let begun = Instant::now();
        let gradients = trainer.gradients(&rollouts)?;
        let report = trainer.update(rollouts, gradients, begun)?;
        let generate = report.metrics.get("time/generate").unwrap_or(f64::NAN);
        let seconds = start.elapsed().as_secs_f64();
        Ok([seconds, cpu_time() - cpu, generate, begun.elapsed().as_secs_f64()])
    };
    step()?;
    let measured = (0..flags.count("--steps").unwrap_or(1)).map(|_| step());
    let measured = measured.collect::<Result<Vec<_>>>()?;
    let of = |i: usize| median(measured.iter().map(|numbers| numbers[i]).collect());
    println!(
        "median_s {:.3} cpu_s {:.2} generate_s {:.2} train_s {:.2} peak_mib {}",
        of(0),
        of(1),
        of(2),
        of(3),
        peak_mib()
    );
    Ok(())
}

fn config(flags: &Flags) -> Result<GrpoConfig> {
    let mut config = GrpoConfig::default();
    config.data.dataset_name = Some("gsm8k".to_string());
    config.sampling.max_completion_length = Some(128);
    config.train.max_steps = 1000;
    if flags.value("--adapter") == Some("lora") {
        config.adapter.adapter = Adapter::Lora;
    }
    if let Some(beta) = flags.value("--beta").and_then(|beta| beta.parse().ok()) {
        config.grpo.beta = beta;
    }
    config.optim.micro_batch_tokens = flags.count("--micro_batch_tokens");
    if let Some(layers) = flags.value("--steering_layers") {
        config.adapter.steering_layers = layers.parse().map_err(|e: String| Error::usage(e))?;
    }
    config.grpo.reuse_activations = match flags.value("--reuse_activations") {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(Error::usage("--reuse_activations expects true or false")),
    };
    config.validate()?;
    Ok(config)
}

/// The first training questions, as plain text.
fn questions() -> Result<PromptData> {
    let problems = Task::Gsm8k.problems("train", 64, &TaskOptions::default())?;
    let row = |problem: &datasets::Problem| PromptRow {
        id: problem.id,
        prompt: Prompt::Text(problem.prompt[0].content.clone()),
        columns: Row::new(),
    };
    let train = problems.iter().map(row).collect();
    Ok(PromptData { name: "gsm8k".to_string(), train, test: Vec::new(), grader: None })
}
