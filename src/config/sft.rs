//! The configuration of supervised fine-tuning.

use std::path::Path;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::adapter::AdapterArgs;
use super::batch::BatchArgs;
use super::check::require;
use super::choices::BestMetric;
use super::data::DataArgs;
use super::model::{GenerationArgs, ModelArgs};
use super::optim::OptimArgs;
use super::profile::ProfileArgs;
use super::run::TrainArgs;
use super::sequence::SequenceArgs;
use super::{RunConfig, TrainConfig};
use crate::Result;

/// All keys of `sft`, flat in TOML and on the command line.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SftConfig {
    /// The base model.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelArgs,
    /// The data.
    #[command(flatten)]
    #[serde(flatten)]
    pub data: DataArgs,
    /// How rows become sequences.
    #[command(flatten)]
    #[serde(flatten)]
    pub sequence: SequenceArgs,
    /// What is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub adapter: AdapterArgs,
    /// How a step is made.
    #[command(flatten)]
    #[serde(flatten)]
    pub optim: OptimArgs,
    /// What a step is made of.
    #[command(flatten)]
    #[serde(flatten)]
    pub batch: BatchArgs,
    /// How answers are generated.
    #[command(flatten)]
    #[serde(flatten)]
    pub generation: GenerationArgs,
    /// Length, folder, logging, evaluation, checkpoints.
    #[command(flatten)]
    #[serde(flatten)]
    pub train: TrainArgs,
    /// Whether the run measures itself.
    #[command(flatten)]
    #[serde(flatten)]
    pub profile: ProfileArgs,
}

impl RunConfig for SftConfig {
    const COMMAND: &'static str = "sft";
    const ABOUT: &'static str = "Supervised fine-tuning of adapters on a frozen language model";

    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.data.validate()?;
        self.sequence.validate(&self.data)?;
        self.adapter.validate()?;
        self.optim.validate()?;
        self.batch.validate()?;
        self.generation.validate()?;
        self.train.validate()?;
        require(
            self.train.metric_for_best_model != BestMetric::EvalReward,
            "metric_for_best_model = eval_reward is for reinforcement learning: use eval_loss, \
             eval_mean_token_accuracy or eval_accuracy",
        )
    }

    fn profile(&self) -> Option<&Path> {
        self.profile.path()
    }
}

impl TrainConfig for SftConfig {
    fn train(&self) -> &TrainArgs {
        &self.train
    }

    fn optim(&self) -> &OptimArgs {
        &self.optim
    }

    fn optim_mut(&mut self) -> &mut OptimArgs {
        &mut self.optim
    }
}
