//! Completions as text, and what their rewards are.

use std::path::Path;
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

/// The rewards that a configuration names.
///
/// # Errors
/// Usage: names the reward that there is not.
pub fn rewards(
    args: &RewardArgs,
    grader: Option<Grader>,
    max_completion_length: usize,
    output_dir: &Path,
) -> Result<RewardSet> {
    let options = ParseOptions {
        default_grader: grader,
        max_completion_length,
        timeout: Duration::from_secs_f64(args.reward_timeout),
        num_workers: args.reward_num_workers,
        stderr_dir: Some(output_dir.join("rewards")),
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
    Ok(texts.into_iter().zip(judged).map(|(text, judged)| Scored { text, judged }).collect())
}

/// Why the first of the scores that failed did, if more than `most` of all samples have one.
pub fn too_many_failures(judged: &[&Judged], names: &[&str], most: f64) -> Option<String> {
    let failure = |score: &Score| match score {
        Score::Timeout => Some("it did not answer in time".to_string()),
        Score::Error(reason) => Some(reason.clone()),
        _ => None,
    };
    let of_sample = |judged: &&Judged| {
        judged.scores.iter().zip(names).find_map(|(score, name)| Some((*name, failure(score)?)))
    };
    let failed: Vec<(&str, String)> = judged.iter().filter_map(of_sample).collect();
    if failed.len() as f64 <= most * judged.len() as f64 {
        return None;
    }
    let (name, reason) = failed.first()?;
    let (count, all) = (failed.len(), judged.len());
    Some(format!("{name} failed for {count} of {all} completions: {reason}"))
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
