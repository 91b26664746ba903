//! The configuration inside a GGUF file, as llama.cpp reads it: architectures `llama` (also
//! Mistral, SmolLM2), `qwen2`, `qwen3` and `gemma3`.

use candle_core::DType;
use candle_core::quantized::gguf_file::Value;

use crate::error::{Error, Result};
use crate::model::config::{Activation, Family, LayerConfig, ModelConfig};
use crate::model::config_layers::yarn_mscale;
use crate::model::config_rope::{Rope, RopeScaling, Yarn};
use crate::model::gguf::{Gguf, number};

const ARCHITECTURES: [(&str, Family); 4] = [
    ("llama", Family::Llama),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("gemma3", Family::Gemma3),
];

impl ModelConfig {
    /// Reads the configuration of a GGUF file. What the file says by its tensors is read from
    /// them: a tied head (no `output.weight`), biases, Llama 3's rotary divisors.
    ///
    /// # Errors
    /// Usage: another architecture (the served ones are listed) or a feature that is not served.
    /// Failure: a key is missing.
    pub fn from_gguf(gguf: &Gguf) -> Result<ModelConfig> {
        let found = gguf.architecture();
        let known = ARCHITECTURES.iter().find(|(name, _)| *name == found);
        let (_, family) = *known.ok_or_else(|| {
            let names = ARCHITECTURES.map(|(name, _)| name).join(", ");
            Error::usage(format!(
                "GGUF architecture '{found}' is not supported; supported: {names}"
            ))
        })?;
        if gguf.number("expert_count").is_some_and(|count| count > 0.0) {
            return Err(Error::usage("mixtures of experts are not supported"));
        }
        let config = read(family, gguf)?;
        config.check()?;
        Ok(config)
    }
}

fn read(family: Family, gguf: &Gguf) -> Result<ModelConfig> {
    let hidden_size = size(gguf, "embedding_length")?;
    let heads = size(gguf, "attention.head_count")?;
    let head_dim = match gguf.number("attention.key_length") {
        Some(_) => size(gguf, "attention.key_length")?,
        None => hidden_size / heads.max(1),
    };
    let vocab_size = gguf.shape("token_embd.weight").and_then(|shape| shape.first().copied());
    let has = |name: &str| gguf.contains(&format!("blk.0.{name}.bias"));
    let gemma = family == Family::Gemma3;
    Ok(ModelConfig {
        family,
        vocab_size: vocab_size.ok_or_else(|| missing("token_embd.weight"))?,
        hidden_size,
        intermediate_size: size(gguf, "feed_forward_length")?,
        num_attention_heads: heads,
        num_key_value_heads: match gguf.number("attention.head_count_kv") {
            Some(_) => size(gguf, "attention.head_count_kv")?,
            None => heads,
        },
        head_dim,
        rms_norm_eps: required(gguf, "attention.layer_norm_rms_epsilon")?,
        max_position_embeddings: size(gguf, "context_length")?,
        tie_word_embeddings: !gguf.contains("output.weight"),
        hidden_act: if gemma { Activation::GeluTanh } else { Activation::Silu },
        attention_bias: has("attn_q"),
        o_bias: has("attn_output"),
        mlp_bias: has("ffn_up"),
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        sandwich_norms: gemma,
        norm_plus_one: false,
        embedding_scale: gemma.then(|| (hidden_size as f64).sqrt()),
        attention_scale: attention_scale(family, gguf, hidden_size / heads.max(1), head_dim)?,
        final_logit_softcapping: gguf.number("final_logit_softcapping").filter(|cap| *cap > 0.0),
        layers: layers(family, gguf)?,
        ropes: ropes(family, gguf, head_dim)?,
    })
}

/// The 27B model of Gemma 3, told by its 62 layers, scales by hidden size over heads (168) where
/// the others scale by the width of a head.
fn attention_scale(family: Family, gguf: &Gguf, share: usize, head_dim: usize) -> Result<f64> {
    if let Some(scale) = gguf.number("attention.scale") {
        return Ok(scale);
    }
    let large = family == Family::Gemma3 && size(gguf, "block_count")? == 62;
    Ok((if large { share } else { head_dim } as f64).powf(-0.5))
}

/// Gemma 3: every sixth layer is global unless the file has a pattern. The other architectures
/// have no windows in llama.cpp.
fn layers(family: Family, gguf: &Gguf) -> Result<Vec<LayerConfig>> {
    let count = size(gguf, "block_count")?;
    if count > 10_000 {
        return Err(Error::usage(format!("'block_count' is {count}; at most 10000")));
    }
    let window = match gguf.number("attention.sliding_window") {
        Some(window) if family == Family::Gemma3 && window > 0.0 => {
            Some(size(gguf, "attention.sliding_window")?)
        }
        _ => None,
    };
    let slides = sliding_pattern(gguf, count);
    let layer = |i: usize| {
        let slides = family == Family::Gemma3 && slides(i);
        LayerConfig { window: window.filter(|_| slides), rope: usize::from(slides) }
    };
    Ok((0..count).map(layer).collect())
}

/// Which layers slide: `attention.sliding_window_pattern` is one flag per layer or a period.
fn sliding_pattern(gguf: &Gguf, count: usize) -> impl Fn(usize) -> bool + use<> {
    let key = format!("{}.attention.sliding_window_pattern", gguf.architecture());
    let (flags, period) = match gguf.metadata().get(&key) {
        Some(Value::Array(flags)) if flags.len() == count => {
            (flags.iter().map(|flag| number(flag) == Some(1.0)).collect(), 6)
        }
        other => (Vec::new(), other.and_then(number).unwrap_or(6.0).max(1.0) as usize),
    };
    move |i| flags.get(i).copied().unwrap_or(!(i + 1).is_multiple_of(period))
}

fn ropes(family: Family, gguf: &Gguf, head_dim: usize) -> Result<Vec<Rope>> {
    let rotated = gguf.number("rope.dimension_count").unwrap_or(head_dim as f64);
    if rotated != head_dim as f64 {
        return Err(Error::usage(format!(
            "{rotated} of {head_dim} rotated dimensions: all must be"
        )));
    }
    let gemma = family == Family::Gemma3;
    let default = if gemma { 1_000_000.0 } else { 10_000.0 };
    let theta = gguf.number("rope.freq_base").unwrap_or(default);
    let mut ropes = vec![Rope { theta, head_dim, scaling: scaling(gguf, head_dim)? }];
    if gemma {
        let theta = gguf.number("rope.freq_base_swa").unwrap_or(10_000.0);
        ropes.push(Rope { theta, head_dim, scaling: RopeScaling::Default });
    }
    Ok(ropes)
}

fn scaling(gguf: &Gguf, head_dim: usize) -> Result<RopeScaling> {
    if gguf.contains("rope_freqs.weight") {
        let divisors = gguf.read("rope_freqs.weight")?.to_dtype(DType::F32)?.flatten_all()?;
        let divisors: Vec<f32> = divisors.to_vec1()?;
        return match divisors.len() * 2 == head_dim {
            true => Ok(RopeScaling::Divisors(divisors)),
            false => Err(Error::failure("'rope_freqs.weight' does not fit the width of a head")),
        };
    }
    let key = format!("{}.rope.scaling.type", gguf.architecture());
    let kind = match gguf.metadata().get(&key) {
        Some(Value::String(kind)) => kind.as_str(),
        _ => "none",
    };
    let factor = gguf.number("rope.scaling.factor").filter(|factor| *factor > 0.0);
    match (kind, factor) {
        ("none", _) => Ok(RopeScaling::Default),
        ("linear", Some(factor)) => Ok(RopeScaling::Linear { factor }),
        ("yarn", Some(factor)) => Ok(RopeScaling::Yarn(yarn(gguf, factor)?)),
        ("linear" | "yarn", None) => Err(missing("rope.scaling.factor")),
        _ => Err(Error::usage(format!("rope scaling '{kind}' of GGUF files is not supported"))),
    }
}

/// llama.cpp multiplies its own `1 + 0.1 ln(factor)` by the file's attention factor.
fn yarn(gguf: &Gguf, factor: f64) -> Result<Yarn> {
    let or = |key: &str, default: f64| gguf.number(key).unwrap_or(default);
    let attention = or("rope.scaling.attn_factor", 1.0);
    Ok(Yarn {
        factor,
        attention_factor: attention * yarn_mscale(factor, 1.0),
        beta_fast: or("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow: or("rope.scaling.yarn_beta_slow", 1.0),
        original_max_position_embeddings: or(
            "rope.scaling.original_context_length",
            required(gguf, "context_length")?,
        ),
        truncate: true,
    })
}

fn size(gguf: &Gguf, key: &str) -> Result<usize> {
    match required(gguf, key)? {
        value if (0.0..2e9).contains(&value) && value.fract() == 0.0 => Ok(value as usize),
        value => Err(Error::failure(format!("GGUF key '{key}' must be a size, found {value}"))),
    }
}

fn required(gguf: &Gguf, key: &str) -> Result<f64> {
    gguf.number(key).ok_or_else(|| missing(key))
}

fn missing(key: &str) -> Error {
    Error::failure(format!("the GGUF file lacks '{key}'"))
}
