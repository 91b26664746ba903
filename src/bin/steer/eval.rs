//! `steer eval`: greedy accuracy on a task's held-out problems, with its interval.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use steersman::adapter::{load_all, warn_of_other_model};
use steersman::config::{DataArgs, GenerationArgs, ModelArgs, ProfileArgs, Repeated, RunConfig};
use steersman::eval::{Accuracy, accuracy};
use steersman::files::write_atomic;
use steersman::model::{LoadedModel, TextModel};
use steersman::rollout::GenerateOptions;
use steersman::train::data::problems;
use steersman::{Error, Result, cli};

/// Flags of `steer eval`.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[command(rename_all = "snake_case")]
#[serde(default)]
pub struct EvalArgs {
    #[command(flatten)]
    #[serde(flatten)]
    model: ModelArgs,
    /// Task whose problems are answered: gsm8k or listops
    dataset_name: Option<String>,
    /// Split of the problems
    dataset_test_split: String,
    /// Most problems, from the start of the split; 0 = all
    max_eval_samples: usize,
    /// ListOps: deepest nesting of operators
    listops_max_depth: usize,
    /// ListOps: fewest arguments of an operator
    listops_min_args: usize,
    /// ListOps: most arguments of an operator
    listops_max_args: usize,
    #[command(flatten)]
    #[serde(flatten)]
    generation: GenerationArgs,
    /// Adapter folder, ours or PEFT's LoRA; may be given several times
    adapter: Repeated,
    /// JSONL file for every answer: id, completion, gold, outcome, stop
    output: Option<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    profile: ProfileArgs,
}

impl Default for EvalArgs {
    fn default() -> Self {
        let data = DataArgs::default();
        EvalArgs {
            model: ModelArgs::default(),
            dataset_name: data.dataset_name,
            dataset_test_split: data.dataset_test_split,
            max_eval_samples: data.max_eval_samples,
            listops_max_depth: data.listops_max_depth,
            listops_min_args: data.listops_min_args,
            listops_max_args: data.listops_max_args,
            generation: GenerationArgs::default(),
            adapter: Repeated::default(),
            output: None,
            profile: ProfileArgs::default(),
        }
    }
}

impl EvalArgs {
    /// The problems as keys of a data set.
    fn data(&self) -> DataArgs {
        DataArgs {
            dataset_name: self.dataset_name.clone(),
            dataset_test_split: self.dataset_test_split.clone(),
            max_eval_samples: self.max_eval_samples,
            listops_max_depth: self.listops_max_depth,
            listops_min_args: self.listops_min_args,
            listops_max_args: self.listops_max_args,
            ..DataArgs::default()
        }
    }
}

impl RunConfig for EvalArgs {
    const COMMAND: &'static str = "steer eval";
    const ABOUT: &'static str =
        "Greedy accuracy on a task's held-out problems, with its 95 % interval";

    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.data().validate()?;
        self.generation.validate()
    }

    fn profile(&self) -> Option<&Path> {
        self.profile.path()
    }
}

/// Runs the command.
pub fn run(args: &EvalArgs) -> Result<()> {
    let data = args.data();
    let (problems, grader) = problems(&data)?;
    let engine = args.model.engine()?;
    let model = LoadedModel::load(&args.model.model_name_or_path, args.model.storage(), &engine)?;
    let template = args.model.chat_template_path.as_deref();
    let text = TextModel::load(&model.source, template, model.policy.config().vocab_size)?;
    let adapters = load_all(&args.adapter.0, model.policy.config(), engine.device())?;
    warn_of_other_model(&args.adapter.0, || model.base())?;
    let options = GenerateOptions {
        max_new_tokens: args.generation.longest_answer(data.dataset()?),
        eos_token_ids: text.stop_token_ids.clone(),
        ..Default::default()
    };
    let start = Instant::now();
    let graded = (&problems[..], grader);
    let found = accuracy(&model, &text, &adapters, graded, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    args.output.as_ref().map_or(Ok(()), |path| write_answers(path, &found))?;
    cli::print(&told(&found, seconds))
}

fn told(found: &Accuracy, seconds: f64) -> String {
    let rate = found.new_tokens as f64 / seconds;
    format!("accuracy: {}\n{} new tokens, {rate:.0} tokens/s\n", found.tally(), found.new_tokens)
}

fn write_answers(path: &Path, found: &Accuracy) -> Result<()> {
    let mut lines = String::new();
    for answer in &found.answers {
        let line = json!({
            "id": answer.id,
            "completion": answer.completion,
            "gold": answer.gold,
            "outcome": answer.outcome.as_str(),
            "stop": answer.stop.as_str(),
        });
        lines += &serde_json::to_string(&line)
            .map_err(|e| Error::failure(format!("answer {} cannot be written: {e}", answer.id)))?;
        lines.push('\n');
    }
    write_atomic(path, lines.as_bytes())
}
