//! Completions as text, and what their rewards are.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use datasets::Grader;
use reward::{Judged, Outcome, ParseOptions, RewardSet, Sample, Score, parse};
use tracing::debug_span;

use super::prompts::PromptTokens;
use crate::config::RewardArgs;
use crate::model::Tokenizer;
use crate::report::{Fold, StepMetrics};
use crate::rollout::Completion;
use crate::train::loss::advantage::{deviation, mean};
use crate::{Error, Result};

/// The rewards that a configuration names; what their processes write to their standard error goes
/// into files of `stderr_dir`, or without it to that of this program.
///
/// # Errors
/// Usage: names the reward that there is not.
pub fn rewards(
    args: &RewardArgs,
    grader: Option<Grader>,
    max_completion_length: usize,
    stderr_dir: Option<PathBuf>,
) -> Result<RewardSet> {
    let options = ParseOptions {
        default_grader: grader,
        max_completion_length,
        timeout: Duration::from_secs_f64(args.reward_timeout),
        num_workers: args.reward_num_workers,
        stderr_dir,
    };
    let named = |spec: &String| {
        parse(spec, &options).map_err(|error| Error::usage(format!("reward_funcs: {error}")))
    };
    let parsed = args.specs().iter().map(named).collect::<Result<_>>()?;
    RewardSet::new(parsed, args.reward_weights.0.clone())
        .map_err(|error| Error::usage(error.to_string()))
}

/// A completion with its text and what its rewards say.
pub struct Scored {
    /// Its text, without the tokens that end it.
    pub text: String,
    /// Number of its prompt's row, from 1.
    pub row: u64,
    /// Its reward, and the score of each reward function.
    pub judged: Judged,
}

/// Scores completions, each given with the prompt that it continues.
///
/// # Errors
/// If a completion's tokens are no text.
pub fn score(
    tokenizer: &Tokenizer,
    rewards: &mut RewardSet,
    completions: &[(&PromptTokens, &Completion)],
) -> Result<Vec<Scored>> {
    let _phase = debug_span!("reward", completions = completions.len()).entered();
    let texts =
        completions.iter().map(|(_, completion)| tokenizer.decode(&completion.tokens, true));
    let texts = texts.collect::<Result<Vec<_>>>()?;
    let samples: Vec<Sample> = completions
        .iter()
        .zip(&texts)
        .map(|((prompt, completion), text)| Sample {
            prompt: &prompt.row.prompt,
            completion: text,
            completion_ids: &completion.tokens,
            columns: &prompt.row.columns,
        })
        .collect();
    let judged = rewards.score(&samples);
    let rows = completions.iter().map(|(prompt, _)| prompt.row.id + 1);
    let all = rows.zip(texts).zip(judged);
    Ok(all.map(|((row, text), judged)| Scored { text, row, judged }).collect())
}

/// Completions whose rewards failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failures {
    /// How many they are.
    pub count: usize,
    /// How many completions were scored.
    pub all: usize,
    /// The reward that failed for the first of them.
    pub name: String,
    /// Why it did.
    pub reason: String,
    /// Number of that completion's row, from 1.
    pub row: u64,
    /// The file with what the reward said besides, if it said anything.
    pub log: Option<PathBuf>,
}

impl Failures {
    /// Those among scored completions, if there are any.
    pub fn of(scored: &[Scored], rewards: &RewardSet) -> Option<Self> {
        let failed = || scored.iter().filter(|scored| scored.judged.failure().is_some());
        let first = failed().next()?;
        let (reward, reason) = first.judged.failure()?;
        Some(Failures {
            count: failed().count(),
            all: scored.len(),
            name: rewards.names()[reward].to_string(),
            reason: reason.to_string(),
            row: first.row,
            log: rewards.logs().swap_remove(reward),
        })
    }

    /// Their share of all completions.
    pub fn share(&self) -> f64 {
        self.count as f64 / self.all as f64
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failures { count, all, name, reason, row, log } = self;
        let which = if count < all { format!(", first in row {row}") } else { String::new() };
        write!(f, "reward {name} failed for {count} of {all} completions{which}: {reason}")?;
        log.as_ref().map_or(Ok(()), |log| write!(f, " (more in {})", log.display()))
    }
}

/// The rewards of a step under TRL's names, and how many completions came to each outcome.
pub fn metrics(judged: &[&Judged], names: &[&str]) -> StepMetrics {
    let mut metrics = StepMetrics::new();
    for (i, name) in names.iter().enumerate() {
        let values: Vec<f64> = judged.iter().filter_map(|j| value(&j.scores[i])).collect();
        if !values.is_empty() {
            metrics.push(Fold::Mean, format!("rewards/{name}/mean"), mean(&values));
            metrics.push(Fold::Mean, format!("rewards/{name}/std"), deviation(&values));
        }
    }
    let outcomes: Vec<Outcome> = judged.iter().filter_map(|judged| judged.outcome()).collect();
    for outcome in Outcome::ALL {
        let count = outcomes.iter().filter(|found| **found == outcome).count();
        metrics.push(Fold::Sum, outcome.metric(), count as f64);
    }
    metrics
}

/// The number that a score is, if it is one.
pub fn value(score: &Score) -> Option<f64> {
    match score {
        Score::Value(value) | Score::Graded(value, _) => Some(*value),
        _ => None,
    }
}
