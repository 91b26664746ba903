//! The shortest policy-gradient program with a reward of one's own in Rust: SmolLM2 is to answer in few
//! words, and to use the letter e.
//!
//! `cargo run --release --bin custom_reward`
//!
//! Left out, and to be found in `recipes/grpo.rs`: checkpoints and resuming, evaluation, tables of
//! completions. A reward in Python needs no program at all: `docs/rewards.md`.

use std::process::ExitCode;
use std::time::Instant;

use datasets::{Message, Prompt, PromptRow, Row};
use reward::{Reward, RewardSet, Sample, Score};
use steersman::config::{GrpoConfig, RunConfig};
use steersman::model::{LoadedModel, TextModel, fetch};
use steersman::ops::Engine;
use steersman::report::{Event, MetricLine, Sink, Terminal};
use steersman::train::grpo::GrpoTrainer;
use steersman::train::prompts::PromptData;
use steersman::train::run::Trainer;
use steersman::{Error, Result, cli};

/// The share of e among the letters, less a hundredth for each word.
struct ShortAndEasy;

impl Reward for ShortAndEasy {
    fn name(&self) -> &str {
        "short_and_easy"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
        let of = |text: &str| {
            let letters = text.chars().filter(|c| c.is_alphabetic()).count().max(1) as f64;
            let words = text.split_whitespace().count() as f64;
            text.matches('e').count() as f64 / letters - 0.01 * words
        };
        samples.iter().map(|sample| Score::Value(of(sample.completion))).collect()
    }
}

const QUESTIONS: [&str; 4] =
    ["What is rain?", "Why do birds sing?", "How is bread made?", "What does a tree need?"];

#[global_allocator]
static HEAP: steersman::heap::Heap = steersman::heap::Heap;

fn main() -> ExitCode {
    cli::main(|args| match args.first() {
        None => run(),
        Some(arg) => Err(Error::usage(format!("custom_reward takes no arguments, not '{arg}'"))),
    })
}

fn run() -> Result<()> {
    let mut config = GrpoConfig::default();
    config.data.dataset_name = Some("questions".to_string());
    config.sampling.max_completion_length = Some(24);
    config.grpo.prompts_per_step = QUESTIONS.len();
    config.train.max_steps = 30;
    config.validate()?;

    fetch::fetch_smollm2()?;
    let model = LoadedModel::load(fetch::SMOLLM2, None, &Engine::cpu())?;
    let shape = model.policy.config();
    let text = TextModel::load(&model.source, None, shape.vocab_size)?;
    let (prompts, _) = prompts().tokenise(&text, shape.max_position_embeddings)?;
    let adapters =
        config.adapter.build(shape, config.train.seed, model.policy.engine().device())?;
    let mut trainer = GrpoTrainer::new(&config, (&model.policy, &text), adapters, &prompts)?;
    let rewards: Vec<Box<dyn Reward>> = vec![Box::new(ShortAndEasy)];
    let mut rewards = RewardSet::new(rewards, Vec::new()).map_err(Error::usage)?;

    let mut terminal = Terminal::stderr();
    let (name, total_steps) = ("custom_reward".to_string(), trainer.learner().total_steps());
    terminal.take(&Event::RunStarted { name, done_steps: 0, total_steps })?;
    while !trainer.learner().is_done() {
        let start = Instant::now();
        let mut collection = trainer.collect();
        while let Some(prompts) = trainer.next_prompts(&mut collection) {
            let groups = trainer.sample(&prompts)?;
            collection
                .add(trainer.score(groups, &mut rewards)?, (start.elapsed().as_secs_f64(), 0.0));
        }
        let rollouts = trainer.prepare(collection, &rewards.names())?;
        let gradients = trainer.gradients(&rollouts)?;
        let report = trainer.update(rollouts, gradients, start)?;
        terminal.take(&Event::Logged(MetricLine::new(report.step, report.metrics.metrics())))?;
        for warning in trainer.warnings(&report) {
            terminal.take(&Event::Warning(warning))?;
        }
    }
    steersman::adapter::save(
        "runs/custom_reward".as_ref(),
        trainer.learner().adapters(),
        &model.base()?,
    )
}

/// The questions as conversations.
fn prompts() -> PromptData {
    let row = |(id, question): (u64, &&str)| PromptRow {
        id,
        prompt: Prompt::Messages(vec![Message::user(*question).to_json()]),
        columns: Row::new(),
    };
    let train = (0..).zip(&QUESTIONS).map(row).collect();
    PromptData { name: "questions".to_string(), train, test: Vec::new(), grader: None }
}
