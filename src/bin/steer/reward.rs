//! `steer reward test`: what rewards say of a file of completions, without a model.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use datasets::{PromptRow, Row, Template, read_rows};
use reward::{Judged, Outcome, ParseOptions, RewardSet, Sample, Score, parse};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use steersman::config::{RewardArgs, RunConfig};
use steersman::train::prompts::{fill, uneven};
use steersman::{Error, Result, cli, notice};

/// Flags of `steer reward test`.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[command(rename_all = "snake_case")]
#[serde(default)]
pub struct RewardTestArgs {
    /// JSONL, JSON or parquet file with a column completion, usually prompt, and what else rewards
    /// read
    completions: Option<PathBuf>,
    /// Longest completion in tokens, for rewards by length; words are counted for tokens here
    max_completion_length: usize,
    #[command(flatten)]
    #[serde(flatten)]
    reward: RewardArgs,
}

impl Default for RewardTestArgs {
    fn default() -> Self {
        let (completions, reward) = (None, RewardArgs::default());
        RewardTestArgs { completions, max_completion_length: 512, reward }
    }
}

impl RunConfig for RewardTestArgs {
    const COMMAND: &'static str = "steer reward test";
    const ABOUT: &'static str = "What rewards say of a file of completions";

    fn validate(&self) -> Result<()> {
        self.reward.validate()?;
        match &self.completions {
            Some(_) => Ok(()),
            None => Err(Error::usage("steer reward test needs --completions, a file")),
        }
    }
}

/// A completion of the file.
struct Tried {
    row: PromptRow,
    completion: String,
    ids: Vec<u32>,
}

/// Runs the command.
pub fn run(args: &RewardTestArgs) -> Result<()> {
    let tried = read(args)?;
    let options = ParseOptions {
        default_grader: None,
        max_completion_length: args.max_completion_length,
        timeout: Duration::from_secs_f64(args.reward.reward_timeout),
        num_workers: args.reward.reward_num_workers,
        stderr_dir: None,
    };
    let rewards = args.reward.specs().iter().map(|spec| parse(spec, &options)).collect::<Vec<_>>();
    let rewards: std::result::Result<Vec<_>, String> = rewards.into_iter().collect();
    let mut set =
        RewardSet::new(rewards.map_err(Error::usage)?, args.reward.reward_weights.0.clone())
            .map_err(Error::usage)?;
    set.start().map_err(Error::failure)?;
    let samples: Vec<Sample> = tried
        .iter()
        .map(|tried| Sample {
            prompt: &tried.row.prompt,
            completion: &tried.completion,
            completion_ids: &tried.ids,
            columns: &tried.row.columns,
        })
        .collect();
    let start = Instant::now();
    let judged = set.score(&samples);
    let seconds = start.elapsed().as_secs_f64();
    cli::print(&table(&judged, &set.names(), seconds))?;
    let failed = judged.iter().filter(|judged| judged.outcome() >= Some(Outcome::Timeout)).count();
    match failed {
        0 => Ok(()),
        failed => Err(Error::failure(format!(
            "a reward failed for {failed} of {} completions",
            judged.len()
        ))),
    }
}

/// The rows of the file.
fn read(args: &RewardTestArgs) -> Result<Vec<Tried>> {
    let path = args.completions.as_deref().unwrap_or_else(|| std::path::Path::new(""));
    let rows = read_rows(path)?;
    let row = |(i, row): (usize, &Row)| -> Result<Tried> {
        let mut row = row.clone();
        let named = |what: &str| Error::usage(format!("{}: row {}: {what}", path.display(), i + 1));
        let said = row.shift_remove("completion");
        let completion = said.as_ref().and_then(text_of);
        let completion = completion.ok_or_else(|| named("no column completion with a text"))?;
        row.entry("prompt").or_insert(Value::String(String::new()));
        let row = Template::default().prompt_row(i as u64, &row);
        let row = row.map_err(|error| named(&error.to_string()))?;
        let words = completion.split_whitespace().count() as u32;
        Ok(Tried { row, completion, ids: (0..words).collect() })
    };
    let mut tried = rows.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?;
    let rows: Vec<&PromptRow> = tried.iter().map(|tried| &tried.row).collect();
    uneven(&path.display().to_string(), &rows).iter().for_each(|text| notice::warn(text));
    fill(&mut tried.iter_mut().map(|tried| &mut tried.row).collect::<Vec<_>>());
    Ok(tried)
}

/// The text of a completion: text itself, or the content of its one message.
fn text_of(value: &Value) -> Option<String> {
    let text = match value {
        Value::Array(messages) => &messages.first()?["content"],
        other => other,
    };
    text.as_str().map(str::to_string)
}

/// A line for each completion, then what they come to together.
fn table(judged: &[Judged], names: &[&str], seconds: f64) -> String {
    let mut lines = vec![format!("  row    reward  {}", names.join("  "))];
    for (i, judged) in judged.iter().enumerate() {
        let reward = judged.reward.map_or("none".to_string(), |reward| format!("{reward:.4}"));
        let scores = names.iter().zip(&judged.scores);
        let scores: Vec<String> = scores
            .map(|(name, score)| format!("{:<width$}", told(score), width = name.len()))
            .collect();
        lines.push(
            format!("{:>5}  {reward:>8}  {}", i + 1, scores.join("  ")).trim_end().to_string(),
        );
    }
    let known: Vec<f64> = judged.iter().filter_map(|judged| judged.reward).collect();
    let mean = match known.len() {
        0 => "none".to_string(),
        n if n > 1 && known.iter().all(|reward| *reward == known[0]) => {
            format!("{:.4}, all the same", known[0])
        }
        n => format!("{:.4}", known.iter().sum::<f64>() / n as f64),
    };
    let mut counts = format!("{} of {} completions have a reward", known.len(), judged.len());
    for outcome in Outcome::ALL {
        match judged.iter().filter(|judged| judged.outcome() == Some(outcome)).count() {
            0 => {}
            count => counts += &format!(", {count} {outcome}"),
        }
    }
    lines.push(format!("{counts}; mean {mean}; {seconds:.3} s\n"));
    lines.join("\n")
}

fn told(score: &Score) -> String {
    match score {
        Score::Value(value) => format!("{value}"),
        Score::Graded(value, outcome) => format!("{value} ({outcome})"),
        Score::NotApplicable => "none".to_string(),
        Score::Timeout => "no answer within reward_timeout".to_string(),
        Score::Error(reason) => reason.clone(),
    }
}
