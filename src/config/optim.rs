//! Keys of the optimisation: rates, schedule, AdamW, memory.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::check::{require, require_positive};
use super::choices::LrSchedulerType;
use super::memory::MemoryBudget;
use crate::Result;

/// How a step is made.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Optimisation", rename_all = "snake_case")]
#[serde(default)]
pub struct OptimArgs {
    /// Peak learning rate; unset = by adapter; in sft: steering 2e-3 (vector 1e-2), lora and joint
    /// 2e-4; in grpo: steering 3e-4 (vector 2e-3), lora 3e-4, joint 2e-4.
    pub learning_rate: Option<f64>,
    /// Course of the learning rate.
    pub lr_scheduler_type: LrSchedulerType,
    /// cosine_with_min_lr: where the rate ends, as a share of its peak.
    pub lr_scheduler_min_lr_rate: f64,
    /// Steps of linear warm-up; below 1: share of all steps; 0 = off.
    pub warmup_steps: f64,
    /// Decoupled weight decay of AdamW; 0 = off.
    pub weight_decay: f64,
    /// AdamW's decay of the gradient's mean.
    pub adam_beta1: f64,
    /// AdamW's decay of the gradient's square.
    pub adam_beta2: f64,
    /// AdamW's addend to the denominator.
    pub adam_epsilon: f64,
    /// Global gradient norm above which gradients are scaled down; 0 = off.
    pub max_grad_norm: f64,
    /// Most tokens computed at once; changes memory, not results; 0 = a whole batch, unset = 512 for
    /// each thread (1024 to 8192), fewer where memory_budget asks for it.
    pub micro_batch_tokens: Option<usize>,
    /// Recompute activations in the backward pass; changes memory and time, not results; unset =
    /// where memory_budget asks for it.
    pub gradient_checkpointing: Option<bool>,
    /// Memory that the run may take, such as 4GiB; auto = what is free here, less a tenth.
    pub memory_budget: MemoryBudget,
}

impl Default for OptimArgs {
    fn default() -> Self {
        Self {
            learning_rate: None,
            lr_scheduler_type: LrSchedulerType::Linear,
            lr_scheduler_min_lr_rate: 0.1,
            warmup_steps: 0.03,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            micro_batch_tokens: None,
            gradient_checkpointing: None,
            memory_budget: MemoryBudget::Auto,
        }
    }
}

impl OptimArgs {
    /// Refuses values that cannot be meant.
    pub fn validate(&self) -> Result<()> {
        self.learning_rate.map_or(Ok(()), |rate| require_positive("learning_rate", rate))?;
        self.validate_schedule()?;
        for (key, beta) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            let in_range = (0.0..1.0).contains(&beta);
            require(in_range, &format!("{key} must be at least 0 and below 1, not {beta}"))?;
        }
        require_positive("adam_epsilon", self.adam_epsilon)?;
        for (key, value) in
            [("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)]
        {
            let at_least_0 = value.is_finite() && value >= 0.0;
            require(at_least_0, &format!("{key} must be at least 0, not {value}"))?;
        }
        Ok(())
    }

    fn validate_schedule(&self) -> Result<()> {
        let warmup = self.warmup_steps;
        require(
            (0.0..1.0).contains(&warmup) || (warmup >= 1.0 && warmup.fract() == 0.0),
            &format!("warmup_steps must be a share below 1 or a whole number, not {warmup}"),
        )?;
        require(
            (0.0..=1.0).contains(&self.lr_scheduler_min_lr_rate),
            "lr_scheduler_min_lr_rate must be from 0 to 1",
        )
    }
}
