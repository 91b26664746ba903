//! The configuration of policy-gradient training: the GRPO family.

use std::path::Path;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::adapter::{AdapterArgs, LearningRates};
use super::check::require;
use super::choices::{
    AdvantageEstimator, BestMetric, EvalAccuracy, ImportanceSamplingLevel, KlEstimator, LossType,
    Reference, ScaleRewards,
};
use super::data::DataArgs;
use super::model::ModelArgs;
use super::optim::OptimArgs;
use super::profile::ProfileArgs;
use super::reward::RewardArgs;
use super::run::TrainArgs;
use super::sampling::SamplingArgs;
use super::{RunConfig, TrainConfig};
use crate::{Error, Result};

/// What a step samples and what it makes of the rewards; names and defaults are TRL's.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "GRPO", rename_all = "snake_case")]
#[serde(default)]
pub struct GrpoArgs {
    /// Prompts of an optimizer step.
    pub prompts_per_step: usize,
    /// Completions of each prompt.
    pub num_generations: usize,
    /// Optimizer steps on the same completions.
    pub num_iterations: usize,
    /// What a completion's reward is compared with: grpo = its group's mean, rloo = the mean of the
    /// others, reinforce_plus_plus = the group's mean, whitened over the step.
    pub advantage_estimator: AdvantageEstimator,
    /// What the group's centred rewards are divided by.
    pub scale_rewards: ScaleRewards,
    /// How the losses of tokens become one number; bnpo is dapo here.
    pub loss_type: LossType,
    /// Whose importance ratio a token's is: its own, or that of its completion (GSPO).
    pub importance_sampling_level: ImportanceSamplingLevel,
    /// How far below 1 the importance ratio still counts.
    pub epsilon: f64,
    /// How far above 1; unset = epsilon. With loss_type cispo the cap of the ratio itself; unset = 5.
    pub epsilon_high: Option<f64>,
    /// Cap of the ratio where the advantage is negative (dual clip); unset = off.
    pub delta: Option<f64>,
    /// Weight of the KL divergence from the reference; 0 = off.
    pub beta: f64,
    /// Estimator of that divergence; k1 with kl_in_reward only.
    pub kl_estimator: KlEstimator,
    /// Subtract beta times the divergence (k1) from the reward instead of adding it to the loss.
    pub kl_in_reward: bool,
    /// Whose distribution it is from: base = adapters off, adapter = adapter_name_or_path.
    pub reference: Reference,
    /// Cap of the weights min(p / q, cap) of tokens that were sampled with probability q and have p in
    /// training, where rollout_matmul_precision makes them differ.
    pub importance_sampling_cap: f64,
    /// Weight of an entropy bonus in the loss, the mean entropy of the tokens that count; 0 = off.
    pub entropy_coef: f64,
    /// Learn from this share of the tokens only, those of highest entropy; 1 = from all.
    pub top_entropy_quantile: f64,
    /// Do not learn from completions that were cut at max_completion_length.
    pub mask_truncated_completions: bool,
    /// Replace groups whose rewards are all equal by those of further prompts.
    pub dynamic_sampling: bool,
    /// Rounds of replacing in a step at most.
    pub dynamic_sampling_rounds: usize,
    /// Keep the outputs of blocks while sampling, and where memory has room keys, values, results of attention and
    /// gradients at the head, and begin updates with them instead of a forward pass; on the cpu; changes memory and
    /// time, not results.
    pub reuse_activations: bool,
    /// Show some completions with their rewards at every logging step.
    pub log_completions: bool,
    /// How many of them.
    pub num_completions_to_print: usize,
}

impl Default for GrpoArgs {
    fn default() -> Self {
        Self {
            prompts_per_step: 8,
            num_generations: 8,
            num_iterations: 1,
            advantage_estimator: AdvantageEstimator::Grpo,
            scale_rewards: ScaleRewards::Group,
            loss_type: LossType::Dapo,
            importance_sampling_level: ImportanceSamplingLevel::Token,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            beta: 0.0,
            kl_estimator: KlEstimator::K3,
            kl_in_reward: false,
            reference: Reference::Base,
            importance_sampling_cap: 2.0,
            entropy_coef: 0.0,
            top_entropy_quantile: 1.0,
            mask_truncated_completions: false,
            dynamic_sampling: false,
            dynamic_sampling_rounds: 3,
            reuse_activations: false,
            log_completions: false,
            num_completions_to_print: 2,
        }
    }
}

impl GrpoArgs {
    /// The upper clip in force.
    pub fn epsilon_high(&self) -> f64 {
        let unset = if self.loss_type == LossType::Cispo { 5.0 } else { self.epsilon };
        self.epsilon_high.unwrap_or(unset)
    }

    /// Whether the loss holds the KL divergence.
    pub fn kl_in_loss(&self) -> bool {
        self.beta != 0.0 && !self.kl_in_reward
    }

    /// Refuses values that cannot be meant and keys that contradict each other.
    pub fn validate(&self) -> Result<()> {
        require(self.prompts_per_step > 0, "prompts_per_step must be at least 1")?;
        require(
            self.num_generations >= 2,
            "num_generations must be at least 2: a group's completions are compared with each other",
        )?;
        require(self.num_iterations > 0, "num_iterations must be at least 1")?;
        for (key, value) in [
            ("epsilon", self.epsilon),
            ("epsilon_high", self.epsilon_high()),
            ("beta", self.beta),
            ("entropy_coef", self.entropy_coef),
        ] {
            let at_least_0 = value.is_finite() && value >= 0.0;
            require(at_least_0, &format!("{key} must be at least 0, not {value}"))?;
        }
        require(
            self.delta.is_none_or(|delta| delta.is_finite() && delta > 1.0),
            "delta caps the importance ratio and must be above 1",
        )?;
        require(
            self.top_entropy_quantile > 0.0 && self.top_entropy_quantile <= 1.0,
            "top_entropy_quantile must be above 0 and at most 1",
        )?;
        require(
            self.importance_sampling_cap.is_finite() && self.importance_sampling_cap > 0.0,
            "importance_sampling_cap must be above 0",
        )?;
        self.validate_together()
    }

    fn validate_together(&self) -> Result<()> {
        let sequence = self.importance_sampling_level == ImportanceSamplingLevel::Sequence;
        require(
            !sequence || self.loss_type == LossType::Grpo,
            "importance_sampling_level = sequence (GSPO) wants loss_type = grpo",
        )?;
        require(
            self.kl_in_reward || self.kl_estimator != KlEstimator::K1 || self.beta == 0.0,
            "kl_estimator = k1 has no gradient in the loss: use k3 or k2, or kl_in_reward = true",
        )?;
        require(
            !self.kl_in_reward || self.kl_estimator == KlEstimator::K1,
            "kl_in_reward = true wants kl_estimator = k1",
        )?;
        require(!self.kl_in_reward || self.beta > 0.0, "kl_in_reward = true wants beta above 0")?;
        require(
            self.advantage_estimator == AdvantageEstimator::Grpo
                || self.scale_rewards == ScaleRewards::Group,
            "scale_rewards is for advantage_estimator = grpo",
        )
    }
}

/// All keys of `grpo`, flat in TOML and on the command line.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GrpoConfig {
    /// The base model.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelArgs,
    /// The data.
    #[command(flatten)]
    #[serde(flatten)]
    pub data: DataArgs,
    /// The rewards.
    #[command(flatten)]
    #[serde(flatten)]
    pub reward: RewardArgs,
    /// What is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub adapter: AdapterArgs,
    /// What a step samples and learns.
    #[command(flatten)]
    #[serde(flatten)]
    pub grpo: GrpoArgs,
    /// How a step is made.
    #[command(flatten)]
    #[serde(flatten)]
    pub optim: OptimArgs,
    /// How completions are sampled.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingArgs,
    /// Length, folder, logging, evaluation, checkpoints.
    #[command(flatten)]
    #[serde(flatten)]
    pub train: TrainArgs,
    /// Whether the run measures itself.
    #[command(flatten)]
    #[serde(flatten)]
    pub profile: ProfileArgs,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        GrpoConfig {
            model: ModelArgs::default(),
            data: DataArgs::default(),
            reward: RewardArgs::default(),
            adapter: AdapterArgs::default(),
            grpo: GrpoArgs::default(),
            // a warm-up begins with a step at a rate of 0, whose completions would be wasted
            optim: OptimArgs { warmup_steps: 0.0, ..OptimArgs::default() },
            sampling: SamplingArgs::default(),
            train: TrainArgs {
                output_dir: "runs/grpo".into(),
                logging_steps: 1,
                save_steps: 50,
                eval_accuracy: EvalAccuracy::Steps,
                metric_for_best_model: BestMetric::EvalReward,
                ..TrainArgs::default()
            },
            profile: ProfileArgs::default(),
        }
    }
}

impl GrpoConfig {
    /// The peak learning rates in force.
    pub fn learning_rates(&self) -> LearningRates {
        let (adapter, kind) = (self.adapter.adapter, self.adapter.steering_kind);
        let defaults = LearningRates::rl_defaults(adapter, kind);
        self.adapter.learning_rates_or(self.optim.learning_rate, defaults)
    }
}

impl RunConfig for GrpoConfig {
    const COMMAND: &'static str = "grpo";
    const ABOUT: &'static str =
        "Policy-gradient training of adapters on a frozen language model (GRPO family)";

    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.data.validate()?;
        self.reward.validate()?;
        self.adapter.validate()?;
        self.grpo.validate()?;
        self.optim.validate()?;
        self.sampling.validate()?;
        self.train.validate()?;
        require(
            self.adapter.lora_dropout == 0.0,
            "lora_dropout must be 0 here: a policy with dropout is not the one that sampled",
        )?;
        require(
            self.grpo.reference == Reference::Base || self.adapter.adapter_name_or_path.is_some(),
            "reference = adapter wants adapter_name_or_path",
        )?;
        let of_sampling = self.sampling.rollout_matmul_precision;
        let other = of_sampling.is_some_and(|p| p != self.model.matmul_precision);
        require(
            !(other && self.grpo.reuse_activations),
            "reuse_activations = true wants rollout_matmul_precision unset: another precision computes \
             something else",
        )?;
        match self.train.metric_for_best_model {
            BestMetric::EvalReward | BestMetric::EvalAccuracy => Ok(()),
            _ => Err(Error::usage(
                "metric_for_best_model must be eval_reward or eval_accuracy: no loss is taken on \
                 held-out rows",
            )),
        }
    }

    fn profile(&self) -> Option<&Path> {
        self.profile.path()
    }
}

impl TrainConfig for GrpoConfig {
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

#[cfg(test)]
mod tests {
    use super::super::choices::MatmulPrecision;
    use super::*;

    fn refused(change: impl FnOnce(&mut GrpoConfig)) -> String {
        let mut config = GrpoConfig::default();
        config.data.dataset_name = Some("gsm8k".into());
        config.validate().unwrap();
        change(&mut config);
        let error = config.validate().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn contradictions_are_refused_with_what_to_use() {
        let text =
            refused(|c| c.grpo.importance_sampling_level = ImportanceSamplingLevel::Sequence);
        assert!(text.contains("wants loss_type = grpo"), "{text}");
        let text = refused(|c| (c.grpo.beta, c.grpo.kl_estimator) = (0.1, KlEstimator::K1));
        assert!(text.contains("k1 has no gradient in the loss"), "{text}");
        let text = refused(|c| (c.grpo.beta, c.grpo.kl_in_reward) = (0.1, true));
        assert!(text.contains("wants kl_estimator = k1"), "{text}");
        let text = refused(|c| c.adapter.lora_dropout = 0.1);
        assert!(text.contains("lora_dropout must be 0"), "{text}");
        let text = refused(|c| c.sampling.temperature = 0.0);
        assert!(text.contains("temperature must be above 0"), "{text}");
        let text = refused(|c| c.reward.reward_weights.0 = vec![1.0, 2.0]);
        assert!(text.contains("2 numbers for 1 reward_funcs"), "{text}");
        let text = refused(|c| {
            c.sampling.rollout_matmul_precision = Some(MatmulPrecision::Medium);
            c.grpo.reuse_activations = true;
        });
        assert!(text.contains("rollout_matmul_precision unset"), "{text}");
        let text = refused(|c| c.grpo.reference = Reference::Adapter);
        assert!(text.contains("wants adapter_name_or_path"), "{text}");
        let text = refused(|c| c.train.metric_for_best_model = BestMetric::EvalLoss);
        assert!(text.contains("eval_reward or eval_accuracy"), "{text}");
    }

    #[test]
    fn the_upper_clip_is_the_lower_one_unless_cispo_caps_the_ratio() {
        let mut args = GrpoArgs { epsilon: 0.3, ..Default::default() };
        assert_eq!(args.epsilon_high(), 0.3);
        args.loss_type = LossType::Cispo;
        assert_eq!(args.epsilon_high(), 5.0);
        args.epsilon_high = Some(2.0);
        assert_eq!(args.epsilon_high(), 2.0);
    }
}
