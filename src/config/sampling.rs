//! Keys of the completions that are sampled to learn from.

use clap::Args;
use datasets::Task;
use serde::{Deserialize, Serialize};

use super::check::require;
use super::choices::MatmulPrecision;
use super::values::Repeated;
use crate::Result;
use crate::rollout::SamplingParams;

/// How completions are sampled.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Generation", rename_all = "snake_case")]
#[serde(default)]
pub struct SamplingArgs {
    /// Longest completion in tokens; unset = the task's own (gsm8k 320, aqua 256, arithmetic
    /// 128, listops 8), else 512.
    pub max_completion_length: Option<usize>,
    /// Divides the logits.
    pub temperature: f64,
    /// Keep the most likely tokens whose probability reaches this; 1 = all.
    pub top_p: f64,
    /// Keep the k most likely tokens; 0 = all.
    pub top_k: usize,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 = all.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens already seen; 1 = off.
    pub repetition_penalty: f64,
    /// Texts that end a completion; may be given several times.
    pub stop: Repeated,
    /// matmul_precision while sampling; unset = that of training. A lower one is faster, and the
    /// difference is corrected for (importance_sampling_cap).
    pub rollout_matmul_precision: Option<MatmulPrecision>,
    /// Sequences that are sampled at once; changes memory and speed, not results.
    pub max_num_seqs: usize,
}

impl Default for SamplingArgs {
    fn default() -> Self {
        Self {
            max_completion_length: None,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: Repeated::default(),
            rollout_matmul_precision: None,
            max_num_seqs: 64,
        }
    }
}

impl SamplingArgs {
    /// Longest completion in tokens for the rows of a data set: the key, else the task's own.
    pub fn longest_completion(&self, dataset: &str) -> usize {
        let of_task = Task::find(dataset).map_or(512, Task::max_completion_length);
        self.max_completion_length.unwrap_or(of_task)
    }

    /// The precision of products while sampling, if it is set.
    pub fn precision(&self) -> Option<crate::ops::MatmulPrecision> {
        self.rollout_matmul_precision.map(MatmulPrecision::of_ops)
    }

    /// How tokens are drawn.
    pub fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }

    /// Refuses values that cannot be meant.
    pub fn validate(&self) -> Result<()> {
        require(self.max_completion_length != Some(0), "max_completion_length must be at least 1")?;
        require(
            self.temperature >= 1e-6,
            "temperature must be above 0: greedy completions of a prompt are all the same",
        )?;
        require(self.max_num_seqs > 0, "max_num_seqs must be at least 1")?;
        require(self.stop.0.iter().all(|text| !text.is_empty()), "stop must not be empty")?;
        self.params().validate()
    }
}
