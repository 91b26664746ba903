//! Keys of supervised sequences: how rows become tokens with a loss.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::check::require;
use super::choices::TruncationMode;
use super::data::DataArgs;
use crate::Result;

/// How rows become the sequences of supervised tuning.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Data", rename_all = "snake_case")]
#[serde(default)]
pub struct SequenceArgs {
    /// Jinja template over a row's columns that makes the completion.
    pub completion_template: Option<String>,
    /// Longest sequence in tokens, prompt and completion; 0 = the model's context.
    pub max_length: usize,
    /// What becomes of a row with more tokens: the run does not start, or the row's start is kept, as TRL does.
    pub truncation_mode: TruncationMode,
    /// Fill each sequence of a batch with several rows, up to max_length tokens.
    pub packing: bool,
    /// Loss on the completion only, where rows have a prompt.
    pub completion_only_loss: bool,
    /// Loss on the assistant's turns only, where rows are messages.
    pub assistant_only_loss: bool,
}

impl Default for SequenceArgs {
    fn default() -> Self {
        Self {
            completion_template: None,
            max_length: 1024,
            truncation_mode: TruncationMode::default(),
            packing: false,
            completion_only_loss: true,
            assistant_only_loss: false,
        }
    }
}

impl SequenceArgs {
    /// Refuses values that cannot be meant and keys that contradict each other or those of `data`.
    pub fn validate(&self, data: &DataArgs) -> Result<()> {
        require(self.max_length != 1, "max_length must be at least 2, or 0 for no limit")?;
        require(
            !self.packing || self.max_length > 0,
            "packing fills sequences up to max_length: set max_length above 0",
        )?;
        require(
            !self.assistant_only_loss
                || (data.prompt_template.is_none() && self.completion_template.is_none()),
            "assistant_only_loss is for rows of messages, which prompt_template and \
             completion_template replace: use completion_only_loss",
        )
    }
}
