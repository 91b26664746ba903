//! The configuration of supervised fine-tuning.

use std::path::Path;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::RunConfig;
use super::adapter::AdapterArgs;
use super::data::DataArgs;
use super::model::{GenerationArgs, ModelArgs};
use super::optim::OptimArgs;
use super::profile::ProfileArgs;
use super::run::TrainArgs;
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
    /// What is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub adapter: AdapterArgs,
    /// How a step is made.
    #[command(flatten)]
    #[serde(flatten)]
    pub optim: OptimArgs,
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
        self.adapter.validate()?;
        self.optim.validate()?;
        self.generation.validate()?;
        self.train.validate()
    }

    fn profile(&self) -> Option<&Path> {
        self.profile.path()
    }
}
