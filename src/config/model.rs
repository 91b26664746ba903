//! Keys of the base model, and of how it answers.

use std::path::PathBuf;

use clap::Args;
use datasets::Task;
use serde::{Deserialize, Serialize};

use super::check::require;
use super::choices::{Dtype, MatmulPrecision};
use super::device::Device;
use crate::Result;

/// The base model: where it comes from and how it is computed.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Model", rename_all = "snake_case")]
#[serde(default)]
pub struct ModelArgs {
    /// Known name, Hugging Face folder, GGUF file or hub id of the base model.
    pub model_name_or_path: String,
    /// Storage of the base's matrices; auto = the checkpoint's own, bf16 for quantised GGUF.
    pub dtype: Dtype,
    /// Products with frozen matrices: highest = f32; high = error about 4e-6 or less; medium = both
    /// operands rounded to bf16 or block integers, where the processor multiplies that faster than f32,
    /// and keys, values and results of attention to bf16.
    pub matmul_precision: MatmulPrecision,
    /// Device the model runs on: cpu, cuda or cuda:N (docs/devices.md).
    pub device: Device,
    /// Chat template (a Jinja file) in place of the model's own.
    pub chat_template_path: Option<PathBuf>,
}

impl Default for ModelArgs {
    fn default() -> Self {
        Self {
            model_name_or_path: "smollm2-135m-instruct".to_string(),
            dtype: Dtype::Auto,
            matmul_precision: MatmulPrecision::Highest,
            device: Device::Cpu,
            chat_template_path: None,
        }
    }
}

impl ModelArgs {
    /// Refuses values that cannot be meant.
    pub fn validate(&self) -> Result<()> {
        require(!self.model_name_or_path.is_empty(), "model_name_or_path must not be empty")
    }
}

/// How the model answers when it is evaluated (greedily).
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Generation", rename_all = "snake_case")]
#[serde(default)]
pub struct GenerationArgs {
    /// Longest answer in tokens; unset = the task's own (gsm8k 320, listops 8).
    pub max_completion_length: Option<usize>,
}

impl GenerationArgs {
    /// Longest answer in tokens to the problems of a data set: the key, else the task's own.
    pub fn longest_answer(&self, dataset: &str) -> usize {
        let of_task = Task::find(dataset).map_or(256, Task::max_completion_length);
        self.max_completion_length.unwrap_or(of_task)
    }

    /// Refuses values that cannot be meant.
    pub fn validate(&self) -> Result<()> {
        require(self.max_completion_length != Some(0), "max_completion_length must be at least 1")
    }
}
