//! Keys of what is trained, and its default learning rates.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::check::{require, require_positive};
use super::choices::Adapter;
use super::values::{Layers, TargetModules};
use crate::Result;
use crate::adapter::{Positions, Site, SteeringKind};

/// The adapter: steering, LoRA or both.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Adapter", rename_all = "snake_case")]
#[serde(default)]
pub struct AdapterArgs {
    /// What is trained.
    pub adapter: Adapter,
    /// Trained adapter folder to start from, of the kinds that adapter and steering_kind name; its
    /// other settings win over the keys below.
    pub adapter_name_or_path: Option<PathBuf>,
    /// Parameterisation of the shift.
    pub steering_kind: SteeringKind,
    /// Tensor of the block that is shifted.
    pub steering_site: Site,
    /// Rank of the shift; without meaning for vector.
    pub steering_rank: usize,
    /// Factor of the shift; without meaning for vector.
    pub steering_alpha: f64,
    /// Steered blocks, counted from 0: all, or such as 0-3,7.
    pub steering_layers: Layers,
    /// Steered tokens: all, last (of the prompt), or such as first=2,last=3.
    pub steering_positions: Positions,
    /// Learning rate of steering; unset = learning_rate.
    pub steering_learning_rate: Option<f64>,
    /// Rank of LoRA's matrices.
    pub lora_r: usize,
    /// LoRA's scale is lora_alpha / lora_r; usually twice the rank.
    pub lora_alpha: f64,
    /// Probability of dropping an input of LoRA in training; 0 = off.
    pub lora_dropout: f64,
    /// Matrices with LoRA: all-linear, or such as q_proj,v_proj.
    pub lora_target_modules: TargetModules,
    /// Scale LoRA by lora_alpha / sqrt(lora_r) instead.
    pub use_rslora: bool,
    /// Learning rate of LoRA; unset = learning_rate.
    pub lora_learning_rate: Option<f64>,
}

impl Default for AdapterArgs {
    fn default() -> Self {
        Self {
            adapter: Adapter::Steering,
            adapter_name_or_path: None,
            steering_kind: SteeringKind::Linear,
            steering_site: Site::PostBlock,
            steering_rank: 8,
            steering_alpha: 1.0,
            steering_layers: Layers::All,
            steering_positions: Positions::All,
            steering_learning_rate: None,
            lora_r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            lora_target_modules: TargetModules::AllLinear,
            use_rslora: false,
            lora_learning_rate: None,
        }
    }
}

/// Peak learning rates of the two parts of an adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRates {
    /// Of the steering parameters.
    pub steering: f64,
    /// Of the LoRA matrices.
    pub lora: f64,
}

impl LearningRates {
    /// The default rates of supervised tuning:
    ///
    /// | adapter | steering vector | other steering | LoRA |
    /// |---|---|---|---|
    /// | steering | 1e-2 | 2e-3 | |
    /// | lora | | | 2e-4 |
    /// | joint | 1e-3 | 2e-4 | 2e-4 |
    ///
    /// Low-rank steering and joint follow arXiv:2603.00425 (sweeps of 5e-4 to 5e-3 for steering,
    /// 5e-5 to 1.5e-3 for LoRA, 2e-4 for both parts of joint).
    pub fn defaults(adapter: Adapter, kind: SteeringKind) -> Self {
        let steering = match (adapter, kind) {
            (Adapter::Joint, SteeringKind::Vector) => 1e-3,
            (Adapter::Joint, _) => 2e-4,
            (_, SteeringKind::Vector) => 1e-2,
            _ => 2e-3,
        };
        Self { steering, lora: 2e-4 }
    }

    /// The default rates of policy-gradient training:
    ///
    /// | adapter | steering vector | other steering | LoRA |
    /// |---|---|---|---|
    /// | steering | 2e-3 | 3e-4 | |
    /// | lora | | | 3e-4 |
    /// | joint | 1e-3 | 2e-4 | 2e-4 |
    pub fn rl_defaults(adapter: Adapter, kind: SteeringKind) -> Self {
        let steering = match (adapter, kind) {
            (Adapter::Joint, SteeringKind::Vector) => 1e-3,
            (Adapter::Joint, _) => 2e-4,
            (_, SteeringKind::Vector) => 2e-3,
            _ => 3e-4,
        };
        let lora = if adapter == Adapter::Joint { 2e-4 } else { 3e-4 };
        Self { steering, lora }
    }
}

impl AdapterArgs {
    /// The rates in force: a part's own key, else `learning_rate`, else the default of its kind.
    pub fn learning_rates(&self, learning_rate: Option<f64>) -> LearningRates {
        let defaults = LearningRates::defaults(self.adapter, self.steering_kind);
        self.learning_rates_or(learning_rate, defaults)
    }

    /// As [`AdapterArgs::learning_rates`], with other defaults.
    pub fn learning_rates_or(
        &self,
        learning_rate: Option<f64>,
        defaults: LearningRates,
    ) -> LearningRates {
        LearningRates {
            steering: self.steering_learning_rate.or(learning_rate).unwrap_or(defaults.steering),
            lora: self.lora_learning_rate.or(learning_rate).unwrap_or(defaults.lora),
        }
    }

    /// Refuses values that cannot be meant.
    pub fn validate(&self) -> Result<()> {
        require(self.steering_rank > 0, "steering_rank must be at least 1")?;
        require(
            self.steering_alpha.is_finite() && self.steering_alpha != 0.0,
            "steering_alpha must be a number other than 0",
        )?;
        require(self.lora_r > 0, "lora_r must be at least 1")?;
        require_positive("lora_alpha", self.lora_alpha)?;
        require(
            (0.0..1.0).contains(&self.lora_dropout),
            "lora_dropout must be at least 0 and below 1",
        )?;
        for (key, rate) in [
            ("steering_learning_rate", self.steering_learning_rate),
            ("lora_learning_rate", self.lora_learning_rate),
        ] {
            rate.map_or(Ok(()), |rate| require_positive(key, rate))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parts_own_rate_wins_over_the_common_one_and_that_over_the_default() {
        let mut args = AdapterArgs { adapter: Adapter::Joint, ..Default::default() };
        assert_eq!(args.learning_rates(None), LearningRates { steering: 2e-4, lora: 2e-4 });
        args.lora_learning_rate = Some(5e-5);
        assert_eq!(args.learning_rates(Some(1e-3)), LearningRates { steering: 1e-3, lora: 5e-5 });
    }

    #[test]
    fn defaults_are_the_vetted_rates() {
        let rates = |adapter, kind| LearningRates::defaults(adapter, kind);
        assert_eq!(rates(Adapter::Steering, SteeringKind::Linear).steering, 2e-3);
        assert_eq!(rates(Adapter::Steering, SteeringKind::Vector).steering, 1e-2);
        assert_eq!(rates(Adapter::Lora, SteeringKind::Linear).lora, 2e-4);
    }
}
