//! `steer model inspect`: what a model is and what each adapter would train, from its configuration
//! alone.

use std::path::Path;

use candle_core::Device;
use clap::Args;
use serde::{Deserialize, Serialize};
use steersman::adapter::{Adapter, LoraConfig, Site, Steering, SteeringConfig, SteeringKind};
use steersman::config::{ModelArgs, RunConfig};
use steersman::model::{Matrix, ModelConfig, ModelSource};
use steersman::train::memory::{MemoryModel, PassSize};
use steersman::{Error, Result, cli};

/// Flags of `steer model inspect`.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[command(rename_all = "snake_case")]
#[serde(default)]
pub struct InspectArgs {
    /// Model folder, GGUF file, known name or hub id; a folder or file with only config.json will do
    model_name_or_path: String,
    /// Rank of the low-rank adapters
    rank: usize,
    /// Tokens in a micro-batch, for the memory estimate
    micro_batch_tokens: usize,
}

impl Default for InspectArgs {
    fn default() -> Self {
        let model_name_or_path = ModelArgs::default().model_name_or_path;
        InspectArgs { model_name_or_path, rank: 8, micro_batch_tokens: 2048 }
    }
}

impl RunConfig for InspectArgs {
    const COMMAND: &'static str = "steer model inspect";
    const ABOUT: &'static str =
        "What a model is and what each adapter would train, from its configuration alone";

    fn validate(&self) -> Result<()> {
        match self.rank {
            0 => Err(Error::usage("rank must be at least 1")),
            _ => Ok(()),
        }
    }
}

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<()> {
    let config = load(&args.model_name_or_path)?;
    let tokens = args.micro_batch_tokens;
    let memory = memory(&config, args.rank, tokens)?;
    cli::print(&(sizes(&config) + &trainable(&config, args.rank) + &memory))
}

/// Reads a configuration; unlike other commands this one needs no weights.
fn load(name: &str) -> Result<ModelConfig> {
    let path = Path::new(name);
    if path.is_dir() || path.extension().is_none_or(|end| end != "json") {
        return ModelConfig::load(&ModelSource::find(name)?);
    }
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let damaged = |e| Error::failure(format!("{name} is not JSON: {e}"));
    ModelConfig::from_json(&serde_json::from_slice(&text).map_err(damaged)?)
}

fn sizes(config: &ModelConfig) -> String {
    let windows = config.layers.iter().filter(|layer| layer.window.is_some()).count();
    let rows = [
        ("family", config.family.to_string()),
        ("parameters", grouped(config.parameters())),
        ("layers", config.layers.len().to_string()),
        ("layers with a window", windows.to_string()),
        ("hidden size", config.hidden_size.to_string()),
        ("feed-forward size", config.intermediate_size.to_string()),
        ("attention heads", config.num_attention_heads.to_string()),
        ("key-value heads", config.num_key_value_heads.to_string()),
        ("head dim", config.head_dim.to_string()),
        ("vocabulary", grouped(config.vocab_size)),
        ("context", grouped(config.max_position_embeddings)),
        ("tied embeddings", config.tie_word_embeddings.to_string()),
        ("steering sites", Site::ALL.map(|site| site.to_string()).join(", ")),
        ("LoRA matrices", Matrix::ALL.map(|matrix| matrix.short_name()).join(", ")),
    ];
    rows.iter().map(|(name, value)| format!("{name:<24} {value}\n")).collect()
}

fn trainable(config: &ModelConfig, rank: usize) -> String {
    let steering = |kind| SteeringConfig { kind, rank, ..SteeringConfig::post_block(config) };
    let count = |kind| steering(kind).parameter_count(config.hidden_size);
    let lora = LoraConfig { r: rank, ..LoraConfig::all_linear() }.parameter_count(config);
    let linear = count(SteeringKind::Linear);
    let mut text = format!("\n{:<32} {:>14} {:>9}\n", "adapter", "trainable", "share");
    let rows = [
        ("steering vector".to_string(), count(SteeringKind::Vector)),
        (format!("steering linear, rank {rank}"), linear),
        (format!("lora, rank {rank}, all linear"), lora),
        (format!("joint, rank {rank}"), lora + linear),
    ];
    for (name, count) in rows {
        let share = 100.0 * count as f64 / config.parameters() as f64;
        text += &format!("{name:<32} {:>14} {share:>8.3} %\n", grouped(count));
    }
    let others = [SteeringKind::Silu, SteeringKind::Relu, SteeringKind::Gelu, SteeringKind::Tanh];
    let names = others.map(|kind| kind.to_string()).join(", ");
    text + &format!("({names}: as linear; the same at every site)\n")
}

/// What a training step takes with steering in every layer; LoRA takes about as much.
fn memory(config: &ModelConfig, rank: usize, tokens: usize) -> Result<String> {
    let mib = |bytes: usize| format!("{:.0} MiB", bytes as f64 / (1024.0 * 1024.0));
    let steering = SteeringConfig { rank, ..SteeringConfig::post_block(config) };
    let adapters: Vec<Box<dyn Adapter>> =
        vec![Box::new(Steering::new(steering, config, 0, &Device::Cpu)?)];
    let row = |name: &str, bytes: &dyn Fn(usize) -> usize| {
        let weights = config.parameters();
        format!("{name:<32} {:>14} {:>14}\n", mib(bytes(2 * weights)), mib(bytes(4 * weights)))
    };
    let peak = |gradient_checkpointing, weights| {
        let size = PassSize { tokens, longest: 0, gradient_checkpointing };
        MemoryModel::new(config, &adapters, weights).peak(size)
    };
    let title = format!("memory, {tokens} tokens at once");
    Ok(format!("\n{title:<32} {:>14} {:>14}\n", "bf16", "f32")
        + &row("weights", &|weights| weights)
        + &row("a training step", &|weights| peak(false, weights))
        + &row("with gradient_checkpointing", &|weights| peak(true, weights)))
}

/// 1234567 as 1,234,567.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
