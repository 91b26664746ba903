//! What a supervised run is evaluated on.

use super::example::TokenExample;
use super::run::{Evaluation, check_evaluations};
use super::sft::SftTrainer;
use crate::adapter::Positions;
use crate::config::{Adapter, SftConfig};
use crate::eval::Tally;
use crate::report::Metrics;
use crate::{Error, Result};

/// Measures the accuracy of the current adapters, if the data can be graded.
pub type AccuracyCheck<'a> = &'a dyn Fn(&SftTrainer) -> Result<Tally>;

/// What is evaluated.
#[derive(Clone, Copy)]
pub struct HeldOut<'a> {
    /// Examples whose loss is taken.
    pub examples: &'a [TokenExample],
    /// Greedy accuracy on the test problems.
    pub accuracy: AccuracyCheck<'a>,
}

impl Evaluation<SftTrainer<'_>> for HeldOut<'_> {
    fn loss(&self, trainer: &SftTrainer) -> Result<Metrics> {
        if self.examples.is_empty() {
            return Ok(Metrics::new());
        }
        let totals = trainer.evaluate(self.examples)?;
        Ok(Metrics::new()
            .with("eval_loss", totals.loss())
            .with("eval_mean_token_accuracy", totals.mean_token_accuracy()))
    }

    fn answers(&self, trainer: &SftTrainer) -> Result<(Metrics, Option<String>)> {
        let mut metrics = Metrics::new();
        (self.accuracy)(trainer)?.write(&mut metrics);
        Ok((metrics, None))
    }
}

/// Refuses, before anything is trained, a run that its rows cannot serve: evaluations that are to
/// decide something without a row to evaluate on, and steering of prompts that rows do not have.
///
/// # Errors
/// Usage: names the key, and the row.
pub fn check_rows(config: &SftConfig, train: &[TokenExample], test: &[TokenExample]) -> Result<()> {
    let (run, adapter) = (&config.train, &config.adapter);
    check_evaluations(run, test.len())?;
    let steers = adapter.adapter != Adapter::Lora && adapter.adapter_name_or_path.is_none();
    if steers && adapter.steering_positions != Positions::All {
        let all = train.iter().chain(test);
        if let Some(example) = all.into_iter().find(|example| example.prompt_length == 0) {
            let (row, positions) = (example.row, adapter.steering_positions);
            return Err(Error::usage(format!(
                "row {row} has no prompt, and steering_positions = \"{positions}\" steers nothing \
                 else: use rows with prompt and completion, or steering_positions = \"all\""
            )));
        }
    }
    Ok(())
}
