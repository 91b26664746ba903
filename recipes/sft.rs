//! Supervised tuning of adapters: GSM8K, ListOps, instruction data, or anyone's own rows.
//!
//! `cargo run --release --bin sft -- recipes/gsm8k_sft.toml --learning_rate 1e-3`
//! `cargo run --release --bin sft -- recipes/custom_sft.toml --dataset_name my.jsonl`
//!
//! loss = mean negative log-likelihood of the completion's tokens, its end included
//!
//! Every key of the TOML file is a flag too; `--help` lists them, `docs/configuration.md` explains.

use std::process::ExitCode;

use steersman::adapter::warn_of_other_model;
use steersman::config::{self, EvalAccuracy, MemoryBudget, Request, RunConfig, SftConfig};
use steersman::eval::{Tally, accuracy};
use steersman::model::{LoadedModel, ModelConfig, ModelSource, TextModel};
use steersman::rollout::GenerateOptions;
use steersman::train::claim::{check_output_dir, claim_output_dir};
use steersman::train::data::SftData;
use steersman::train::held_out::{HeldOut, check_rows};
use steersman::train::run::{Run, Trainer};
use steersman::train::sft::SftTrainer;
use steersman::train::tokenize::Encoder;
use steersman::{Result, cli, profile};

#[global_allocator]
static HEAP: steersman::heap::Heap = steersman::heap::Heap;

fn main() -> ExitCode {
    cli::main(|args| match config::load::<SftConfig>(args)? {
        Request::Run(config) => profile::during(config.profile(), || run(&config)),
        Request::Print(text) => cli::print(&text),
    })
}

fn run(config: &SftConfig) -> Result<()> {
    // ---- data: rows, then tokens -------------------------------------------------------------
    let run_args = &config.train;
    let find = if run_args.dry_run { ModelSource::rehearse } else { ModelSource::resolve };
    let source = find(&config.model.model_name_or_path)?;
    let shape = ModelConfig::load(&source)?;
    let template = config.model.chat_template_path.as_deref();
    let text = TextModel::load(&source, template, shape.vocab_size)?;
    let encoder = Encoder::new(&text)?;
    let data = SftData::load(&config.data, &config.sequence, config.train.seed)?;
    if config.train.eval_accuracy != EvalAccuracy::No {
        data.graded()?;
    }
    let keys = (&config.data, &config.sequence);
    let (train, test) = data.tokenise(&encoder, keys, shape.max_position_embeddings)?;
    check_rows(config, &train, &test)?;
    let engine = config.model.engine()?;
    let adapters = config.adapter.build(&shape, config.train.seed, engine.device())?;
    let resolved = config::to_toml(config)?;
    if run_args.dry_run {
        check_output_dir(run_args, &resolved)?;
        return cli::print(&resolved);
    }

    // ---- model and trainer -------------------------------------------------------------------
    let claim = claim_output_dir(run_args, &resolved)?;
    let (model_args, engine) = (&config.model, config.model.engine()?);
    let name = &model_args.model_name_or_path;
    let (model, base) = LoadedModel::load_with_base(name, model_args.storage(), &engine)?;
    warn_of_other_model(config.adapter.adapter_name_or_path.as_slice(), || Ok(base.clone()))?;
    let mut trainer = SftTrainer::new(config, &model.policy, adapters, &train)?;
    let options = GenerateOptions {
        max_new_tokens: config.generation.longest_answer(config.data.dataset()?),
        eos_token_ids: text.stop_token_ids.clone(),
        keep_rounded: config.optim.memory_budget == MemoryBudget::Auto,
        ..Default::default()
    };
    let measure = |trainer: &SftTrainer| -> Result<Tally> {
        let (problems, adapters) = (data.graded()?, trainer.learner().adapters());
        let answers = accuracy(&model, &text, adapters, problems, &options)?;
        Ok(answers.tally())
    };
    let held_out = HeldOut { examples: &test, accuracy: &measure };

    // ---- the run -----------------------------------------------------------------------------
    let mut run = Run::start(config, base, claim, &mut trainer)?;
    run.evaluate_before(&mut trainer, &held_out)?;
    while run.goes_on(&trainer) {
        run.step(&mut trainer, SftTrainer::step)?;
        if run.evaluates_now(&trainer) {
            run.evaluate(&mut trainer, &held_out)?;
        }
        if run.saves_now(&trainer) {
            run.save(&trainer)?;
        }
    }
    run.finish(&mut trainer, &held_out)
}
