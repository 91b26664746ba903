//! Keys of a supervised step: its size and its noise.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::check::require;
use crate::Result;

/// What a supervised step is made of.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Optimisation", rename_all = "snake_case")]
#[serde(default)]
pub struct BatchArgs {
    /// Sequences of a batch.
    pub per_device_train_batch_size: usize,
    /// Batches of an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// NEFTune noise on the embeddings in training (arXiv:2310.05914); 0 = off.
    pub neftune_noise_alpha: f64,
}

impl Default for BatchArgs {
    fn default() -> Self {
        Self {
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            neftune_noise_alpha: 0.0,
        }
    }
}

impl BatchArgs {
    /// Sequences of an optimizer step.
    pub fn sequences_per_step(&self) -> usize {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// Refuses values that cannot be meant.
    pub fn validate(&self) -> Result<()> {
        let alpha = self.neftune_noise_alpha;
        let at_least_0 = alpha.is_finite() && alpha >= 0.0;
        require(at_least_0, &format!("neftune_noise_alpha must be at least 0, not {alpha}"))?;
        for (key, count) in [
            ("per_device_train_batch_size", self.per_device_train_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
        ] {
            let in_range = (1..=1 << 20).contains(&count);
            require(in_range, &format!("{key} must be from 1 to {}, not {count}", 1 << 20))?;
        }
        Ok(())
    }
}
