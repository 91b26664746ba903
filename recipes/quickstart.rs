//! The shortest whole run: get SmolLM2, train rank-8 linear post-block steering on generated ListOps,
//! and print the accuracy on held-out problems before and after.
//!
//! `cargo run --release --bin quickstart`
//!
//! Left out, and to be found in `recipes/sft.rs`: checkpoints and resuming, evaluation during
//! training, other data, other adapters.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use datasets::{Grader, Problem};
use steersman::adapter::{Adapter, Steering, SteeringConfig, save};
use steersman::config::{RunConfig, SftConfig};
use steersman::eval::{Tally, accuracy};
use steersman::model::{LoadedModel, TextModel, fetch};
use steersman::ops::Engine;
use steersman::report::{Event, MetricLine, Sink, Terminal};
use steersman::rollout::GenerateOptions;
use steersman::train::data::SftData;
use steersman::train::example::TokenExample;
use steersman::train::run::{StepReport, Trainer};
use steersman::train::sft::SftTrainer;
use steersman::train::tokenize::Encoder;
use steersman::{Error, Result, cli};

const HELP: &str = "\
usage: quickstart

Gets SmolLM2, trains rank-8 linear post-block steering on generated ListOps, and prints the accuracy on
held-out problems before and after. The adapter goes to runs/quickstart.
";

const SEED: u64 = 1;

#[global_allocator]
static HEAP: steersman::heap::Heap = steersman::heap::Heap;

fn main() -> ExitCode {
    cli::main(|args| match args.first().map(String::as_str) {
        None => run(&free_folder()),
        Some("--help" | "-h") => cli::print(HELP),
        Some(arg) => Err(Error::usage(format!("quickstart takes no arguments, not '{arg}'"))),
    })
}

/// `runs/quickstart`, or the first of `runs/quickstart-2`, `-3`, ... that is not there yet.
fn free_folder() -> PathBuf {
    let first = PathBuf::from("runs/quickstart");
    let others = (2..).map(|i| PathBuf::from(format!("runs/quickstart-{i}")));
    std::iter::once(first.clone()).chain(others).find(|path| !path.exists()).unwrap_or(first)
}

fn run(output_dir: &Path) -> Result<()> {
    fetch::fetch_smollm2()?;
    let model = LoadedModel::load(fetch::SMOLLM2, None, &Engine::cpu())?;
    let config = model.policy.config();
    let text = TextModel::load(&model.source, None, config.vocab_size)?;
    let encoder = Encoder::new(&text)?;

    let recipe = recipe()?;
    let data = SftData::load(&recipe.data, &recipe.sequence, SEED)?;
    let keys = (&recipe.data, &recipe.sequence);
    let (train, _) = data.tokenise(&encoder, keys, config.max_position_embeddings)?;
    let steering = SteeringConfig::post_block(config);
    let steering = Steering::new(steering, config, SEED, model.policy.engine().device())?;
    let (trained, all) = (steering.parameter_count(), config.parameters());
    cli::print(&format!("training {trained} of {all} parameters\n"))?;

    let before = measure(&model, &text, &[], data.graded()?)?;
    cli::print(&format!("accuracy before: {before}\n"))?;
    let adapters = fit(&recipe, &model, Box::new(steering), &train)?;
    let after = measure(&model, &text, &adapters, data.graded()?)?;

    std::fs::create_dir_all(output_dir).map_err(Error::io(output_dir))?;
    save(output_dir, &adapters, &model.base()?)?;
    let folder = output_dir.display();
    cli::print(&format!("accuracy before: {before}\naccuracy after:  {after}\nadapter: {folder}\n"))
}

/// One pass over the rows in batches of 16 at a rate of 2e-3, falling to 0.
fn recipe() -> Result<SftConfig> {
    let mut recipe = SftConfig::default();
    recipe.data.dataset_name = Some("listops".into());
    recipe.data.max_train_samples = 1600;
    recipe.data.max_eval_samples = 300;
    recipe.optim.learning_rate = Some(2e-3);
    recipe.batch.per_device_train_batch_size = 16;
    recipe.train.seed = SEED;
    recipe.validate()?;
    Ok(recipe)
}

/// Trains `adapter` on `train`, with a progress bar.
fn fit(
    recipe: &SftConfig,
    model: &LoadedModel,
    adapter: Box<dyn Adapter>,
    train: &[TokenExample],
) -> Result<Vec<Box<dyn Adapter>>> {
    let mut trainer = SftTrainer::new(recipe, &model.policy, vec![adapter], train)?;
    let mut bar = Terminal::stderr();
    let (name, total_steps) = ("quickstart".to_string(), trainer.learner().total_steps());
    bar.take(&Event::RunStarted { name, done_steps: 0, total_steps })?;
    while !trainer.learner().is_done() {
        let start = Instant::now();
        let StepReport { step, tokens, metrics } = trainer.step()?;
        let (tokens, seconds) = (tokens as u64, start.elapsed().as_secs_f64());
        bar.take(&Event::Step { step, tokens, seconds })?;
        if step % 20 == 0 {
            bar.take(&Event::Logged(MetricLine::new(step, metrics.metrics())))?;
        }
    }
    let message = "trained".to_string();
    bar.take(&Event::RunEnded { step: total_steps, message })?;
    Ok(trainer.into_adapters())
}

/// What the greedy answers to `problems` come to.
fn measure(
    model: &LoadedModel,
    text: &TextModel,
    adapters: &[Box<dyn Adapter>],
    problems: (&[Problem], Grader),
) -> Result<Tally> {
    let options = GenerateOptions {
        max_new_tokens: 8,
        eos_token_ids: text.stop_token_ids.clone(),
        ..Default::default()
    };
    Ok(accuracy(model, text, adapters, problems, &options)?.tally())
}
