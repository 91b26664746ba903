//! Keys of the data: which rows, and how they become prompts.

use clap::Args;
use datasets::Task;
use serde::{Deserialize, Serialize};

use super::check::require;
use super::values::Columns;
use crate::{Error, Result};

/// The data set, its columns and templates.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Data", rename_all = "snake_case")]
#[serde(default)]
pub struct DataArgs {
    /// Task name (gsm8k, aqua, addsub, multiarith, singleeq, arithmetic, listops, instruct), path of a
    /// JSONL, JSON or parquet file, or hub id.
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
            system_prompt: None,
            columns: Columns::default(),
            listops_max_depth: 2,
            listops_min_args: 2,
            listops_max_args: 4,
        }
    }
}

impl DataArgs {
    /// The data set's name, or an error that says how to give one.
    pub fn dataset(&self) -> Result<&str> {
        self.dataset_name.as_deref().filter(|name| !name.is_empty()).ok_or_else(|| {
            let tasks = Task::names().join(", ");
            Error::usage(format!(
                "dataset_name is not set; give a task ({tasks}), a file or a hub id"
            ))
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
        )
    }
}
