//! Configuration of a run. One struct per recipe is the single source of its TOML keys, flags,
//! `--help`, and the resolved `config.toml`: a field's name is the key, its doc comment the help,
//! the struct's `Default` the default. Keys are flat and spelled as TRL and PEFT spell them.
//!
//! ```
//! use steersman::config::{Request, SftConfig, load};
//! let flags = ["--dataset_name", "listops", "--learning-rate=1e-3"];
//! let Request::Run(config) = load::<SftConfig>(flags.map(String::from))? else { panic!() };
//! assert_eq!(config.optim.learning_rate, Some(1e-3));
//! # Ok::<(), steersman::Error>(())
//! ```

use std::path::Path;

mod adapter;
mod batch;
mod build;
mod check;
mod choices;
mod command;
mod data;
mod device;
mod foreign;
mod grpo;
mod help;
mod load;
mod memory;
mod model;
mod optim;
mod profile;
mod repeated;
mod reward;
mod run;
mod sampling;
mod sequence;
mod sft;
mod suggest;
mod values;

pub use adapter::{AdapterArgs, LearningRates};
pub use batch::BatchArgs;
pub(crate) use build::precision_note;
pub use choices::{
    Adapter, AdvantageEstimator, BestMetric, Dtype, EvalAccuracy, ImportanceSamplingLevel,
    KlEstimator, LossType, LrSchedulerType, MatmulPrecision, Reference, ReportTo, ScaleRewards,
    TruncationMode, word,
};
pub use command::to_toml;
pub use data::DataArgs;
pub use device::Device;
pub use grpo::{GrpoArgs, GrpoConfig};
pub use help::help;
pub use load::{Request, arguments, load, read_toml};
pub use memory::MemoryBudget;
pub use model::{GenerationArgs, ModelArgs};
pub use optim::OptimArgs;
pub use profile::{ProfileArgs, ProfileTo};
pub use reward::RewardArgs;
pub use run::TrainArgs;
pub use sampling::SamplingArgs;
pub use sequence::SequenceArgs;
pub use sft::SftConfig;
pub use suggest::{did_you_mean, nearest};
pub use values::{Columns, LORA_MODULES, Layers, Numbers, Repeated, Resume, TargetModules};

/// The configuration of one recipe: a struct of flattened key groups.
pub trait RunConfig:
    clap::Args + serde::Serialize + serde::de::DeserializeOwned + Default + Clone
{
    /// The command's name, for `--help`.
    const COMMAND: &'static str;
    /// What the command does, in a line, for `--help`.
    const ABOUT: &'static str;

    /// Refuses contradictions that can be seen without loading data or weights.
    fn validate(&self) -> crate::Result<()>;

    /// The file of the trace, if the program is to measure itself.
    fn profile(&self) -> Option<&Path> {
        None
    }
}

/// The configuration of a training run.
pub trait TrainConfig: RunConfig {
    /// Length, folder, logging, evaluation, checkpoints.
    fn train(&self) -> &TrainArgs;

    /// How a step is made.
    fn optim(&self) -> &OptimArgs;

    /// How a step is made, to put in what was chosen for unset keys.
    fn optim_mut(&mut self) -> &mut OptimArgs;
}
