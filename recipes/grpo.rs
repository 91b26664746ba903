//! Policy-gradient training of adapters (the GRPO family): GSM8K, AQuA, ListOps, or anyone's own
//! prompts and rewards.
//!
//! `cargo run --release --bin grpo -- recipes/gsm8k_grpo.toml --adapter lora`
//! `cargo run --release --bin grpo -- recipes/custom_grpo.toml --dataset_name my.jsonl
//!  --reward_funcs ./my_reward.py`
//!
//! loss = - mean over tokens of min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL
//!
//! with r the importance ratio and A the completion's reward compared with its group's. Every key of
//! the TOML file is a flag too; `--help` lists them, `docs/grpo.md` explains.

use std::cell::RefCell;
use std::process::ExitCode;
use std::time::Instant;

use steersman::adapter::warn_of_other_model;
use steersman::config::{self, GrpoConfig, Request, RunConfig};
use steersman::model::{LoadedModel, ModelConfig, ModelSource, TextModel};
use steersman::report::Event;
use steersman::train::claim::{check_output_dir, claim_output_dir};
use steersman::train::grpo::GrpoTrainer;
use steersman::train::prompts::PromptData;
use steersman::train::reward_evaluation::RewardEvaluation;
use steersman::train::run::{Run, check_evaluations};
use steersman::train::scoring::rewards;
use steersman::{Error, Result, cli, notice, profile};

#[global_allocator]
static HEAP: steersman::heap::Heap = steersman::heap::Heap;

fn main() -> ExitCode {
    cli::main(|args| match config::load::<GrpoConfig>(args)? {
        Request::Run(config) => profile::during(config.profile(), || run(&config)),
        Request::Print(text) => cli::print(&text),
    })
}

fn run(config: &GrpoConfig) -> Result<()> {
    // ---- data: rows, then prompts as tokens; rewards ------------------------------------------
    let run_args = &config.train;
    let find = if run_args.dry_run { ModelSource::rehearse } else { ModelSource::resolve };
    let source = find(&config.model.model_name_or_path)?;
    let shape = ModelConfig::load(&source)?;
    let template = config.model.chat_template_path.as_deref();
    let text = TextModel::load(&source, template, shape.vocab_size)?;
    let data = PromptData::load(&config.data, run_args.seed)?;
    let longest = config.sampling.longest_completion(config.data.dataset()?);
    let logs = (!run_args.dry_run).then(|| run_args.output_dir.join("rewards"));
    let mut rewards = rewards(&config.reward, data.grader, longest, logs)?;
    data.advice().iter().for_each(|text| notice::warn(text));
    let (train, test) = data.tokenise(&text, shape.max_position_embeddings)?;
    check_evaluations(run_args, test.len())?;
    let engine = config.model.engine()?;
    let adapters = config.adapter.build(&shape, run_args.seed, engine.device())?;
    let resolved = config::to_toml(config)?;
    if run_args.dry_run {
        check_output_dir(run_args, &resolved)?;
        rewards.start().map_err(Error::failure)?;
        return cli::print(&resolved);
    }

    // ---- model and trainer -------------------------------------------------------------------
    let mut claim = claim_output_dir(run_args, &resolved)?;
    let name = &config.model.model_name_or_path;
    let (model, base) = LoadedModel::load_with_base(name, config.model.storage(), &engine)?;
    warn_of_other_model(config.adapter.adapter_name_or_path.as_slice(), || Ok(base.clone()))?;
    let mut trainer = GrpoTrainer::new(config, (&model.policy, &text), adapters, &train)?;
    rewards.start().map_err(Error::failure)?;
    if claim.checkpoint.is_none() {
        claim.warnings.extend(trainer.rehearse(&mut rewards)?);
    }
    let rewards = RefCell::new(rewards);
    let held_out = RewardEvaluation {
        prompts: &test,
        text: &text,
        stop: &config.sampling.stop.0,
        rewards: &rewards,
        most_failures: config.reward.max_reward_failures,
    };

    // ---- the run -----------------------------------------------------------------------------
    let mut run = Run::start(config, base, claim, &mut trainer)?;
    trainer.notes().into_iter().try_for_each(|note| run.tell(Event::Note(note)))?;
    run.evaluate_before(&mut trainer, &held_out)?;
    while run.goes_on(&trainer) {
        let shown = run.logs_next(&trainer).then_some(config.grpo.num_completions_to_print);
        let mut table = Vec::new();
        let report = run.step(&mut trainer, |trainer| {
            let rollouts = match trainer.take_up() {
                Some(rollouts) => rollouts,
                None => {
                    let rewards = &mut rewards.borrow_mut();
                    let mut collection = trainer.collect();
                    while let Some(prompts) = trainer.next_prompts(&mut collection) {
                        let start = Instant::now();
                        let groups = trainer.sample(&prompts)?;
                        let sampled = start.elapsed().as_secs_f64();
                        let scored = trainer.score(groups, rewards)?;
                        collection.add(scored, (sampled, start.elapsed().as_secs_f64() - sampled));
                    }
                    if config.grpo.log_completions && shown.is_some() {
                        table = trainer.rows(&collection, &rewards.names())?;
                    }
                    trainer.prepare(collection, &rewards.names())?
                }
            };
            let start = Instant::now();
            let gradients = trainer.gradients(&rollouts)?;
            trainer.update(rollouts, gradients, start)
        })?;
        if !table.is_empty() {
            run.tell(Event::Sampled { rows: table, shown: shown.unwrap_or(0) })?;
        }
        for warning in trainer.warnings(&report) {
            run.tell(Event::Warning(warning))?;
        }
        if run.evaluates_now(&trainer) {
            run.evaluate(&mut trainer, &held_out)?;
        }
        if run.saves_now(&trainer) {
            run.save(&trainer)?;
        }
    }
    run.finish(&mut trainer, &held_out)
}
