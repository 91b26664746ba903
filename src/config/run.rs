//! Keys of a training run: its length, folder, logging, evaluation and checkpoints.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::check::require;
use super::choices::{BestMetric, EvalAccuracy, ReportTo};
use super::values::Resume;
use crate::Result;

/// How long a run goes, what it writes and when.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Run", rename_all = "snake_case")]
#[serde(default)]
pub struct TrainArgs {
    /// Folder of the run; it must not hold another run.
    pub output_dir: PathBuf,
    /// Name shown in logs; unset = the folder's name.
    pub run_name: Option<String>,
    /// Seed of everything random.
    pub seed: u64,
    /// Passes over the training rows; may be a fraction.
    pub num_train_epochs: f64,
    /// Optimizer steps in all, in place of num_train_epochs; -1 = by epochs.
    pub max_steps: i64,
    /// Steps between two lines of metrics.
    pub logging_steps: usize,
    /// Steps between two evaluations; 0 = before and after training only.
    pub eval_steps: usize,
    /// When accuracy is measured by generating answers: no, ends (before and after training) or
    /// steps (at every evaluation too).
    pub eval_accuracy: EvalAccuracy,
    /// Steps between two checkpoints; 0 = at the end only.
    pub save_steps: usize,
    /// Checkpoints kept, the best one besides; 0 = all.
    pub save_total_limit: usize,
    /// End with the best checkpoint; one is saved at every evaluation that is the best so far.
    pub load_best_model_at_end: bool,
    /// Value that tells the best checkpoint.
    pub metric_for_best_model: BestMetric,
    /// Whether more of metric_for_best_model is better; unset = by the metric.
    pub greater_is_better: Option<bool>,
    /// Stop after so many evaluations without a new best; 0 = off.
    pub early_stopping_patience: usize,
    /// Continue a run: true or latest = from its newest undamaged checkpoint, or a checkpoint's
    /// path.
    pub resume_from_checkpoint: Resume,
    /// Where metrics go besides the terminal and metrics.jsonl.
    pub report_to: ReportTo,
    /// Check the configuration, print it and stop before any weights are loaded.
    pub dry_run: bool,
}

impl Default for TrainArgs {
    fn default() -> Self {
        Self {
            output_dir: PathBuf::from("runs/sft"),
            run_name: None,
            seed: 42,
            num_train_epochs: 1.0,
            max_steps: -1,
            logging_steps: 10,
            eval_steps: 0,
            eval_accuracy: EvalAccuracy::No,
            save_steps: 500,
            save_total_limit: 0,
            load_best_model_at_end: false,
            metric_for_best_model: BestMetric::EvalLoss,
            greater_is_better: None,
            early_stopping_patience: 0,
            resume_from_checkpoint: Resume::No,
            report_to: ReportTo::Nowhere,
            dry_run: false,
        }
    }
}

impl TrainArgs {
    /// The run's name: `run_name`, else the last part of `output_dir`.
    pub fn name(&self) -> String {
        let folder = || Path::new(&self.output_dir).file_name().map(|name| name.to_string_lossy());
        self.run_name.clone().or_else(|| Some(folder()?.into_owned())).unwrap_or_default()
    }

    /// Whether a larger `metric_for_best_model` is better.
    pub fn greater_is_better(&self) -> bool {
        self.greater_is_better.unwrap_or(self.metric_for_best_model != BestMetric::EvalLoss)
    }

    /// `max_steps` where it is given, else `None`: the number of steps follows from the epochs.
    pub fn step_limit(&self) -> Option<u64> {
        u64::try_from(self.max_steps).ok()
    }

    /// Refuses values that cannot be meant and keys that contradict each other.
    pub fn validate(&self) -> Result<()> {
        require(!self.output_dir.as_os_str().is_empty(), "output_dir must not be empty")?;
        require(self.seed <= i64::MAX as u64, "seed must be below 2^63")?;
        require(
            self.max_steps == -1 || self.max_steps > 0,
            "max_steps must be at least 1, or -1 to go by num_train_epochs",
        )?;
        require(
            self.num_train_epochs.is_finite() && self.num_train_epochs > 0.0,
            "num_train_epochs must be above 0",
        )?;
        require(self.logging_steps > 0, "logging_steps must be at least 1")?;
        self.validate_evaluation()
    }

    fn validate_evaluation(&self) -> Result<()> {
        require(
            self.eval_steps > 0 || !self.load_best_model_at_end,
            "load_best_model_at_end compares evaluations: set eval_steps above 0",
        )?;
        require(
            self.eval_steps > 0 || self.early_stopping_patience == 0,
            "early_stopping_patience counts evaluations: set eval_steps above 0",
        )?;
        let chooses = self.load_best_model_at_end || self.early_stopping_patience > 0;
        let by_accuracy = self.metric_for_best_model == BestMetric::EvalAccuracy;
        require(
            !(chooses && by_accuracy) || self.eval_accuracy == EvalAccuracy::Steps,
            "metric_for_best_model = \"eval_accuracy\" needs eval_accuracy = \"steps\"",
        )
    }
}
