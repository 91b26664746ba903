//! Accuracy of a policy on a task's problems, by generation.

use datasets::{Grader, Problem};
use reward::{Outcome, grade};
use tracing::debug_span;

use super::Tally;
use crate::Result;
use crate::adapter::Adapter;
use crate::model::{LoadedModel, TextModel};
use crate::report::Progress;
use crate::rollout::{GenerateOptions, Generator, Request, StopReason};

/// One graded answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Number of the problem in its split.
    pub id: u64,
    /// The generated text.
    pub completion: String,
    /// What a right answer comes to.
    pub gold: String,
    /// The grader's verdict.
    pub outcome: Outcome,
    /// Why the text ended.
    pub stop: StopReason,
}

/// All answers of an evaluation.
#[derive(Clone, Debug)]
pub struct Accuracy {
    /// The answers in the order of the problems.
    pub answers: Vec<Answer>,
    /// New tokens in all.
    pub new_tokens: usize,
}

impl Accuracy {
    /// How many answers came to each outcome.
    pub fn tally(&self) -> Tally {
        Tally::new(self.answers.iter().map(|answer| answer.outcome))
    }
}

/// Answers every problem and grades the answers, with progress on stderr.
///
/// # Errors
/// If a prompt cannot be rendered or does not fit the context.
pub fn accuracy(
    model: &LoadedModel,
    text: &TextModel,
    adapters: &[Box<dyn Adapter>],
    (problems, grader): (&[Problem], Grader),
    options: &GenerateOptions,
) -> Result<Accuracy> {
    let tokenize = debug_span!("tokenize").entered();
    let requests = problems
        .iter()
        .map(|problem| {
            let prompt = text.chat_prompt(&problem.prompt)?;
            Ok(Request { prompt, prompt_id: problem.id, sample: 0 })
        })
        .collect::<Result<Vec<_>>>()?;
    drop(tokenize);
    let generator = Generator::new(&model.policy, adapters, options, None);
    let mut progress = Progress::new("answers", requests.len());
    let completions = generator.run(&requests, &mut |done| progress.set(done))?;
    drop(progress);
    let _phase = debug_span!("grade").entered();
    let new_tokens = completions.iter().map(|completion| completion.tokens.len()).sum();
    let answers = problems.iter().zip(completions).map(|(problem, completion)| {
        let said = text.tokenizer.decode(&completion.tokens, true)?;
        let outcome = grade(grader, &said, &problem.gold);
        let (id, gold, stop) = (problem.id, problem.gold.clone(), completion.stop);
        Ok(Answer { id, completion: said, gold, outcome, stop })
    });
    Ok(Accuracy { answers: answers.collect::<Result<_>>()?, new_tokens })
}
