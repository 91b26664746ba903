//! The keys that take one word of a fixed list. Each enum serves flags (clap) and TOML (serde).

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The word a choice is written as in flags, TOML and messages.
pub fn word<T: ValueEnum>(choice: &T) -> String {
    choice.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}

/// Storage of the base model's matrices; everything else is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Dtype {
    /// The checkpoint's own, and bf16 for quantised GGUF files.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

/// Precision of products with frozen matrices, named as PyTorch's `set_float32_matmul_precision`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum MatmulPrecision {
    /// f32 products.
    #[default]
    Highest,
    /// Operands split into bf16 halves, relative error about 4e-6.
    High,
    /// One product of operands rounded to bf16 or block integers; keys, values and results of attention in bf16.
    Medium,
}

/// What is trained; the base model stays frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Adapter {
    /// Shifts of activations (arXiv:2603.00425).
    #[default]
    Steering,
    /// Low-rank weight updates (arXiv:2106.09685).
    Lora,
    /// Steering and LoRA trained together.
    Joint,
}

/// Course of the learning rate over the run, named as in transformers' `get_scheduler`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// Warm-up, then linearly to 0.
    #[default]
    Linear,
    /// Warm-up, then half a cosine to 0.
    Cosine,
    /// Always the full rate; warm-up is ignored.
    Constant,
    /// Warm-up, then the full rate.
    ConstantWithWarmup,
    /// Warm-up, then half a cosine to `lr_scheduler_min_lr_rate` of the rate.
    CosineWithMinLr,
}

/// When the task's accuracy is measured by generating answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum EvalAccuracy {
    /// Never.
    #[default]
    No,
    /// Before and after training.
    Ends,
    /// Before, after, and at every evaluation in between.
    Steps,
}

/// The value that picks the best checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum BestMetric {
    /// Mean negative log-likelihood of the held-out targets.
    #[default]
    EvalLoss,
    /// Share of held-out target tokens that are the model's first choice.
    EvalMeanTokenAccuracy,
    /// Share of held-out problems answered rightly.
    EvalAccuracy,
    /// Mean reward of greedy completions of held-out prompts.
    EvalReward,
}

/// Where metrics go besides the terminal and `metrics.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ReportTo {
    /// Nowhere else.
    #[default]
    #[serde(rename = "none")]
    #[value(name = "none")]
    Nowhere,
}

/// How the losses of tokens become one number; the names are TRL's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LossType {
    /// The mean over completions of their mean over tokens.
    Grpo,
    /// The mean over all tokens of the step; `bnpo` is the same, since normalisers are over the step.
    #[default]
    #[serde(alias = "bnpo")]
    #[value(alias = "bnpo")]
    Dapo,
    /// The sum over tokens by completions times `max_completion_length`.
    DrGrpo,
    /// As `dapo`, with the objective of CISPO.
    Cispo,
}

/// Whose importance ratio a token's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ImportanceSamplingLevel {
    /// Its own.
    #[default]
    Token,
    /// The geometric mean over the completion (GSPO).
    Sequence,
}

/// By what a group's centred rewards are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The standard deviation of the group.
    #[default]
    Group,
    /// The standard deviation of all scores of the step.
    Batch,
    /// Nothing (Dr. GRPO, arXiv:2503.20783).
    None,
}

/// Estimator of the KL divergence from the policy to the reference at a sampled token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum KlEstimator {
    /// `log p - log q`: unbiased in value, of no use in a loss, since its expected gradient is 0.
    K1,
    /// `(log p - log q)^2 / 2`.
    K2,
    /// `q / p - 1 - log (q / p)`: unbiased, never negative.
    #[default]
    K3,
}

/// What a completion's reward is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum AdvantageEstimator {
    /// The mean of the group, scaled by `scale_rewards` (arXiv:2402.03300).
    #[default]
    Grpo,
    /// The mean of the others of the group, not scaled (arXiv:2402.14740).
    Rloo,
    /// The mean of the group, whitened over the step (arXiv:2501.03262).
    ReinforcePlusPlus,
}

/// Whose distribution the KL divergence is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Reference {
    /// The base model's, adapters off.
    #[default]
    Base,
    /// That of the adapter which training starts from (`adapter_name_or_path`).
    Adapter,
}

/// What becomes of a row that is longer than `max_length` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum TruncationMode {
    /// The run does not start.
    #[default]
    Refuse,
    /// Its first `max_length` tokens are kept, as TRL does; it is left out if none of those counts in the loss.
    KeepStart,
}
