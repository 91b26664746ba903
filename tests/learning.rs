//! Policy-gradient training learns: every method with every adapter raises a simple reward on a tiny
//! model, for every seed.
//!
//! `STEERSMAN_UPDATE_DOCS=1 cargo test --release --test learning -- --nocapture` runs all of it and
//! writes `docs/results/rl_learns.md`; without the variable the first seed alone is run.

mod common;

use std::fmt::Write;
use std::time::Instant;

use common::shared;
use datasets::{Prompt, PromptRow, Row};
use reward::{Reward, RewardSet, Sample, Score};
use steersman::adapter::SteeringKind;
use steersman::config::{
    Adapter, AdvantageEstimator, GrpoConfig, ImportanceSamplingLevel, LossType, RunConfig,
    ScaleRewards,
};
use steersman::model::{LoadedModel, TextModel};
use steersman::ops::Engine;
use steersman::train::grpo::GrpoTrainer;
use steersman::train::loss::advantage::{deviation, mean};
use steersman::train::prompts::PromptData;
use steersman::train::run::Trainer;

/// The share of the letter a among the letters of a completion.
struct LetterA;

impl Reward for LetterA {
    fn name(&self) -> &str {
        "letter_a"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
        let share = |text: &str| {
            let letters = text.chars().filter(|c| c.is_alphabetic()).count();
            text.matches(['a', 'A']).count() as f64 / letters.max(1) as f64
        };
        samples.iter().map(|sample| Score::Value(share(sample.completion))).collect()
    }
}

const STEPS: i64 = 60;
/// What the mean reward of the last ten steps must be above that of the first five.
const MARGIN: f64 = 0.5;
const SEEDS: [u64; 3] = [1, 2, 3];
const METHODS: [&str; 4] = ["grpo", "dr_grpo", "rloo", "gspo"];
const ADAPTERS: [(&str, Adapter, SteeringKind, f64); 4] = [
    ("vector", Adapter::Steering, SteeringKind::Vector, 2e-2),
    ("linear", Adapter::Steering, SteeringKind::Linear, 1e-2),
    ("lora", Adapter::Lora, SteeringKind::Linear, 1e-2),
    ("joint", Adapter::Joint, SteeringKind::Linear, 5e-3),
];

fn config(
    method: &str,
    (_, adapter, kind, rate): (&str, Adapter, SteeringKind, f64),
    seed: u64,
) -> GrpoConfig {
    let mut config = GrpoConfig::default();
    config.data.dataset_name = Some("toy".to_string());
    config.adapter.adapter = adapter;
    config.adapter.steering_kind = kind;
    config.optim.learning_rate = Some(rate);
    config.sampling.max_completion_length = Some(16);
    config.grpo.prompts_per_step = 4;
    config.train.max_steps = STEPS;
    config.train.seed = seed;
    match method {
        "dr_grpo" => {
            config.grpo.loss_type = LossType::DrGrpo;
            config.grpo.scale_rewards = ScaleRewards::None;
        }
        "rloo" => config.grpo.advantage_estimator = AdvantageEstimator::Rloo,
        "gspo" => {
            config.grpo.importance_sampling_level = ImportanceSamplingLevel::Sequence;
            config.grpo.loss_type = LossType::Grpo;
            // two steps on the same completions, so that the ratio is not always 1
            config.grpo.num_iterations = 2;
        }
        _ => {}
    }
    config.validate().unwrap();
    config
}

fn prompts() -> PromptData {
    let texts = ["Once upon a time", "Lily likes", "The dog", "One day"];
    let row = |(id, text): (u64, &str)| PromptRow {
        id,
        prompt: Prompt::Text(text.into()),
        columns: Row::new(),
    };
    let train = (0..).zip(texts).map(row).collect();
    PromptData { name: "toy".to_string(), train, test: Vec::new(), grader: None }
}

/// Mean rewards of the first five and the last ten samplings of a run.
fn learn(model: &LoadedModel, text: &TextModel, config: &GrpoConfig) -> (f64, f64) {
    let shape = model.policy.config();
    let (prompts, _) = prompts().tokenise(text, shape.max_position_embeddings).unwrap();
    let adapters =
        config.adapter.build(shape, config.train.seed, model.policy.engine().device()).unwrap();
    let mut trainer = GrpoTrainer::new(config, (&model.policy, text), adapters, &prompts).unwrap();
    let mut rewards = RewardSet::new(vec![Box::new(LetterA)], Vec::new()).unwrap();
    let mut series = Vec::new();
    while !trainer.learner().is_done() {
        let rollouts = trainer.take_up().unwrap_or_else(|| {
            let mut collection = trainer.collect();
            while let Some(prompts) = trainer.next_prompts(&mut collection) {
                let groups = trainer.sample(&prompts).unwrap();
                collection.add(trainer.score(groups, &mut rewards).unwrap(), (0.0, 0.0));
            }
            trainer.prepare(collection, &rewards.names()).unwrap()
        });
        let gradients = trainer.gradients(&rollouts).unwrap();
        let report = trainer.update(rollouts, gradients, Instant::now()).unwrap();
        series.extend(report.metrics.get("reward"));
    }
    (mean(&series[..5]), mean(&series[series.len() - 10..]))
}

#[test]
fn every_method_learns_with_every_adapter() {
    let Some(folder) = shared("models/stories260k") else { return };
    let keep = std::env::var_os("STEERSMAN_UPDATE_DOCS").is_some();
    let seeds = if keep { &SEEDS[..] } else { &SEEDS[..1] };
    let model = LoadedModel::load(folder.to_str().unwrap(), None, &Engine::cpu()).unwrap();
    let text = TextModel::load(&model.source, None, model.policy.config().vocab_size).unwrap();
    let mut table = String::new();
    for method in METHODS {
        for adapter in ADAPTERS {
            let runs: Vec<(f64, f64)> = seeds
                .iter()
                .map(|seed| learn(&model, &text, &config(method, adapter, *seed)))
                .collect();
            for ((before, after), seed) in runs.iter().zip(seeds) {
                let name = adapter.0;
                assert!(after - before >= MARGIN, "{method} {name} seed {seed}: {before} {after}");
            }
            let (before, after): (Vec<f64>, Vec<f64>) = runs.into_iter().unzip();
            // t(0.975, n - 1) of three runs
            let half = 4.303 * deviation(&after) / (after.len() as f64).sqrt();
            writeln!(
                table,
                "| {method} | {} | {:.3} | {:.3} | {:.3} to {:.3} |",
                adapter.0,
                mean(&before),
                mean(&after),
                mean(&after) - half,
                mean(&after) + half
            )
            .unwrap();
        }
    }
    println!("{table}");
    if keep {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/results");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("rl_learns.md"), HEAD.to_string() + &table).unwrap();
    }
}

const HEAD: &str = "\
# Policy-gradient training on a tiny model

`STEERSMAN_UPDATE_DOCS=1 cargo test --release --test learning` writes this file. The model is stories260K,
the reward the share of the letter a among a completion's letters, four prompts with eight completions of
16 tokens a step, 60 optimizer steps, seeds 1, 2 and 3. Means over the seeds of the sampled reward of the
first five and of the last ten samplings, and a 95 % t interval of the latter; every single run gains at
least 0.1.

| method | adapter | first | last | 95 % interval |
|---|---|---|---|---|
";
