//! The rows of a supervised run, as examples and as problems to grade.

use datasets::{Grader, Problem, gsm8k, listops};

use super::example::TokenExample;
use super::tokenize::{Encoder, check_lengths};
use crate::config::DataArgs;
use crate::{Error, Result};

/// The data of a supervised run before tokenisation.
pub struct SftData {
    /// Training problems.
    pub train: Vec<Problem>,
    /// Held-out problems.
    pub test: Vec<Problem>,
    /// How answers are graded.
    pub grader: Grader,
}

impl SftData {
    /// Loads.
    pub fn load(args: &DataArgs, _seed: u64) -> Result<Self> {
        let (mut train, mut test, grader) = match args.dataset()? {
            "listops" => {
                let n = if args.max_train_samples == 0 { 2000 } else { args.max_train_samples };
                let m = if args.max_eval_samples == 0 { 300 } else { args.max_eval_samples };
                (listops::generate(0, n, 1), listops::generate(1, m, 1), Grader::Digit)
            }
            "gsm8k" => {
                let dir = std::path::Path::new("../shared/data/gsm8k");
                let train = gsm8k::load(&dir.join("train.jsonl"))?;
                (train, gsm8k::load(&dir.join("test.jsonl"))?, Grader::Numeric)
            }
            other => return Err(Error::usage(format!("unknown dataset {other}"))),
        };
        if args.max_train_samples > 0 {
            train.truncate(args.max_train_samples);
        }
        if args.max_eval_samples > 0 {
            test.truncate(args.max_eval_samples);
        }
        Ok(SftData { train, test, grader })
    }
}

impl SftData {
    /// Tokenised.
    pub fn tokenise(
        &self,
        encoder: &Encoder,
        args: &DataArgs,
        context: usize,
    ) -> Result<(Vec<TokenExample>, Vec<TokenExample>)> {
        let train = examples(encoder, &self.train, args, context, "train")?;
        Ok((train, examples(encoder, &self.test, args, context, "test")?))
    }

    /// Graded.
    pub fn graded(&self) -> Result<(&[Problem], Grader)> {
        Ok((&self.test, self.grader))
    }
}

/// Tokenises.
pub fn examples(
    encoder: &Encoder,
    problems: &[Problem],
    args: &DataArgs,
    context: usize,
    what: &str,
) -> Result<Vec<TokenExample>> {
    let whole = !args.completion_only_loss;
    let encode = |problem: &Problem| {
        let messages: Vec<_> = problem
            .prompt
            .iter()
            .map(|m| serde_json::json!({"role": m.role, "content": m.content}))
            .collect();
        encoder.chat(&messages, &problem.target, whole)
    };
    let examples = problems.iter().map(encode).collect::<Result<Vec<_>>>()?;
    check_lengths(&examples, args.max_length, context, what)?;
    Ok(examples)
}
