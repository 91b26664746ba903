//! Keys of the rewards.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::check::{require, require_positive};
use super::values::{Numbers, Repeated};
use crate::Result;

/// What completions are rewarded for.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Rewards", rename_all = "snake_case")]
#[serde(default)]
pub struct RewardArgs {
    /// Rewards: built in, such as accuracy_reward, a Python file with a function, a command, or the
    /// address of a server (docs/rewards.md); may be given several times; unset = accuracy_reward.
    pub reward_funcs: Repeated,
    /// Factor of each reward, such as 1,0.5; unset = 1 each.
    pub reward_weights: Numbers,
    /// Seconds that a reward in a process of its own, or of a server, may take for a step's completions.
    pub reward_timeout: f64,
    /// Processes of each such reward, or requests at once, which share a step's completions.
    pub reward_num_workers: usize,
    /// Share of a step's completions whose reward may fail before the run stops.
    pub max_reward_failures: f64,
}

impl Default for RewardArgs {
    fn default() -> Self {
        Self {
            reward_funcs: Repeated::default(),
            reward_weights: Numbers::default(),
            reward_timeout: 30.0,
            reward_num_workers: 1,
            max_reward_failures: 0.5,
        }
    }
}

impl RewardArgs {
    /// The rewards, the default one if none is named.
    pub fn specs(&self) -> Vec<String> {
        match self.reward_funcs.0.is_empty() {
            true => vec!["accuracy_reward".to_string()],
            false => self.reward_funcs.0.clone(),
        }
    }

    /// Refuses values that cannot be meant.
    pub fn validate(&self) -> Result<()> {
        let (weights, rewards) = (self.reward_weights.0.len(), self.specs().len());
        require(
            weights == 0 || weights == rewards,
            &format!("reward_weights has {weights} numbers for {rewards} reward_funcs"),
        )?;
        require(
            self.reward_weights.0.iter().all(|weight| weight.is_finite()),
            "reward_weights must be finite numbers",
        )?;
        require_positive("reward_timeout", self.reward_timeout)?;
        require(self.reward_timeout <= 1e6, "reward_timeout must be at most 1000000 seconds")?;
        require(self.reward_num_workers > 0, "reward_num_workers must be at least 1")?;
        require(
            (0.0..=1.0).contains(&self.max_reward_failures),
            "max_reward_failures must be from 0 to 1",
        )
    }
}
