//! Keys of the data: which rows, how they become text, and which tokens have a loss.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::check::require;
use super::values::Columns;
use crate::{Error, Result};

/// The data set, its columns and templates.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Data", rename_all = "snake_case")]
#[serde(default)]
pub struct DataArgs {
    /// Task name (gsm8k, listops, instruct), path of a JSONL, JSON or parquet file, or hub id.
    pub dataset_name: Option<String>,
    /// Split that is trained on.
    pub dataset_train_split: String,
    /// Split that is evaluated on.
    pub dataset_test_split: String,
    /// Most training rows, from the start of the split; 0 = all.
    pub max_train_samples: usize,
    /// Most evaluation rows, from the start of the split, 0 = all; of a single file, rows held out
    /// of it, at most half, 0 = none.
    pub max_eval_samples: usize,
    /// Jinja template over a row's columns that makes the prompt.
    pub prompt_template: Option<String>,
    /// Jinja template over a row's columns that makes the completion.
    pub completion_template: Option<String>,
    /// System message put before the prompt; Jinja over the row's columns.
    pub system_prompt: Option<String>,
    /// Renamed columns, ours = the file's: prompt=question,completion=answer.
    pub columns: Columns,
    /// ListOps: deepest nesting of operators.
    pub listops_max_depth: usize,
    /// ListOps: fewest arguments of an operator.
    pub listops_min_args: usize,
    /// ListOps: most arguments of an operator.
    pub listops_max_args: usize,
    /// Longest sequence in tokens, prompt and completion; 0 = the model's context.
    pub max_length: usize,
    /// Fill each sequence of a batch with several rows, up to max_length tokens.
    pub packing: bool,
    /// Loss on the completion only, where rows have a prompt.
    pub completion_only_loss: bool,
    /// Loss on the assistant's turns only, where rows are messages.
    pub assistant_only_loss: bool,
}

impl Default for DataArgs {
    fn default() -> Self {
        Self {
            dataset_name: None,
            dataset_train_split: "train".to_string(),
            dataset_test_split: "test".to_string(),
            max_train_samples: 0,
            max_eval_samples: 0,
            prompt_template: None,
            completion_template: None,
            system_prompt: None,
            columns: Columns::default(),
            listops_max_depth: 2,
            listops_min_args: 2,
            listops_max_args: 4,
            max_length: 1024,
            packing: false,
            completion_only_loss: true,
            assistant_only_loss: false,
        }
    }
}

impl DataArgs {
    /// The data set's name, or an error that says how to give one.
    pub fn dataset(&self) -> Result<&str> {
        self.dataset_name.as_deref().filter(|name| !name.is_empty()).ok_or_else(|| {
            Error::usage(
                "dataset_name is not set; give a task (gsm8k, listops, instruct), a file or a hub \
                 id",
            )
        })
    }

    /// Refuses values that cannot be meant and keys that contradict each other.
    pub fn validate(&self) -> Result<()> {
        self.dataset()?;
        require(!self.dataset_train_split.is_empty(), "dataset_train_split must not be empty")?;
        require(self.listops_max_depth > 0, "listops_max_depth must be at least 1")?;
        require(self.listops_min_args > 0, "listops_min_args must be at least 1")?;
        require(
            self.listops_min_args <= self.listops_max_args,
            "listops_min_args must not exceed listops_max_args",
        )?;
        require(self.max_length != 1, "max_length must be at least 2, or 0 for no limit")?;
        require(
            !self.packing || self.max_length > 0,
            "packing fills sequences up to max_length: set max_length above 0",
        )?;
        require(
            !self.assistant_only_loss
                || (self.prompt_template.is_none() && self.completion_template.is_none()),
            "assistant_only_loss is for rows of messages, which prompt_template and \
             completion_template replace: use completion_only_loss",
        )
    }
}
