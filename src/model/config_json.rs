//! `config.json` of a Hugging Face folder, in the spelling of transformers 4 (`rope_theta`,
//! `rope_scaling`) and 5 (`rope_parameters`). Missing keys take the defaults of transformers 5;
//! what would change the computation and is not served is refused, never skipped.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::config::{Activation, Family, ModelConfig};
use crate::model::config_fields::Fields;
use crate::model::config_layers::{layers, ropes};

/// Every `model_type` that is served.
const MODEL_TYPES: [(&str, Family); 6] = [
    ("llama", Family::Llama),
    ("mistral", Family::Mistral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("gemma3_text", Family::Gemma3),
    ("gemma3", Family::Gemma3),
];

/// Keys that, when set, ask for a computation none of the served families has.
const REFUSED: [&str; 9] = [
    "attention_sinks",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "quantization_config",
    "use_bidirectional_attention",
    "no_rope_layers",
    "per_layer_config",
    "mrope_section",
];

impl ModelConfig {
    /// Reads a parsed `config.json`. A multimodal `gemma3` is read as its text model.
    ///
    /// # Errors
    /// Usage: an unknown `model_type` (the served ones are listed), a value of the wrong kind,
    /// sizes that do not fit together, or a feature that is not served.
    pub fn from_json(json: &Value) -> Result<ModelConfig> {
        let outer = Fields::new(json)?;
        let family = family(&outer)?;
        let text = match outer.get("text_config") {
            Some(text) => Fields::new(text)?,
            None if outer.get("model_type").and_then(Value::as_str) == Some("gemma3") => {
                return Err(Error::usage("'gemma3' needs a 'text_config'; text alone is served"));
            }
            None => Fields::new(json)?,
        };
        outer.refuse(&REFUSED)?;
        text.refuse(&REFUSED)?;
        let mut config = read(family, &text)?;
        config.tie_word_embeddings =
            outer.flag("tie_word_embeddings", config.tie_word_embeddings)?;
        config.check()?;
        Ok(config)
    }

    /// Sizes that must fit together whatever file they came from.
    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers.len()),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::usage(format!("'{name}' must be at least 1")));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::usage(format!(
                "'num_attention_heads' ({heads}) must be a multiple of 'num_key_value_heads' \
                 ({kv_heads})"
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            let dim = self.head_dim;
            return Err(Error::usage(format!(
                "'head_dim' must be even to be rotated, found {dim}"
            )));
        }
        if self.layers.iter().any(|layer| layer.window == Some(0)) {
            return Err(Error::usage("'sliding_window' must be at least 1"));
        }
        Ok(())
    }
}

fn family(fields: &Fields) -> Result<Family> {
    let names = MODEL_TYPES.map(|(name, _)| name).join(", ");
    let Some(found) = fields.text("model_type")? else {
        return Err(Error::usage(format!("'model_type' is missing; supported are {names}")));
    };
    let known = MODEL_TYPES.iter().find(|(name, _)| *name == found);
    let (_, family) = known.ok_or_else(|| {
        Error::usage(format!("model_type '{found}' is not supported; supported are {names}"))
    })?;
    Ok(*family)
}

/// transformers 5's defaults of one family: the configuration of its first released model.
struct Defaults {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    /// `None`: as many as query heads.
    num_key_value_heads: Option<usize>,
    /// `None`: hidden size over heads.
    head_dim: Option<usize>,
    max_position_embeddings: usize,
}

fn defaults(family: Family) -> Defaults {
    let llama = Defaults {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: None,
        head_dim: None,
        max_position_embeddings: 2048,
    };
    match family {
        Family::Llama => llama,
        Family::Mistral => Defaults {
            intermediate_size: 14_336,
            num_key_value_heads: Some(8),
            max_position_embeddings: 131_072,
            ..llama
        },
        Family::Qwen2 | Family::Qwen3 => Defaults {
            vocab_size: 151_936,
            intermediate_size: 22_016,
            num_key_value_heads: Some(32),
            head_dim: (family == Family::Qwen3).then_some(128),
            max_position_embeddings: 32_768,
            ..llama
        },
        Family::Gemma3 => Defaults {
            vocab_size: 262_208,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_hidden_layers: 26,
            num_attention_heads: 8,
            num_key_value_heads: Some(4),
            head_dim: Some(256),
            max_position_embeddings: 131_072,
        },
    }
}

fn read(family: Family, fields: &Fields) -> Result<ModelConfig> {
    let defaults = defaults(family);
    let size = |key: &str, default: usize| Ok::<_, Error>(fields.size(key)?.unwrap_or(default));
    let hidden_size = size("hidden_size", defaults.hidden_size)?;
    let heads = size("num_attention_heads", defaults.num_attention_heads)?;
    let absent_or = |key: &str, default: Option<usize>| match fields.has(key) {
        true => fields.size(key),
        false => Ok(default),
    };
    let kv_heads = absent_or("num_key_value_heads", defaults.num_key_value_heads)?;
    let head_dim = absent_or("head_dim", defaults.head_dim)?;
    let head_dim = head_dim.unwrap_or(hidden_size / heads.max(1));
    let max_position = size("max_position_embeddings", defaults.max_position_embeddings)?;
    let gemma = family == Family::Gemma3;
    let bias = attention_bias(family, fields)?;
    let count = size("num_hidden_layers", defaults.num_hidden_layers)?;
    if count > 10_000 {
        return Err(Error::usage(format!("'num_hidden_layers' is {count}; at most 10000")));
    }
    Ok(ModelConfig {
        family,
        vocab_size: size("vocab_size", defaults.vocab_size)?,
        hidden_size,
        intermediate_size: size("intermediate_size", defaults.intermediate_size)?,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads.unwrap_or(heads),
        head_dim,
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        max_position_embeddings: max_position,
        tie_word_embeddings: fields.flag("tie_word_embeddings", gemma)?,
        hidden_act: activation(family, fields)?,
        attention_bias: bias,
        o_bias: bias && family != Family::Qwen2,
        mlp_bias: mlp_bias(family, fields)?,
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        sandwich_norms: gemma,
        norm_plus_one: gemma,
        embedding_scale: gemma.then(|| (hidden_size as f64).sqrt()),
        attention_scale: attention_scale(family, fields, head_dim)?,
        final_logit_softcapping: softcapping(family, fields)?,
        layers: layers(family, fields, count)?,
        ropes: ropes(family, fields, head_dim, max_position)?,
    })
}

/// Whether q, k and v have a bias; o follows but for Qwen2.
fn attention_bias(family: Family, fields: &Fields) -> Result<bool> {
    let asked = fields.flag("attention_bias", family == Family::Qwen2)?;
    match (family, asked) {
        (Family::Mistral, true) => Err(Error::usage("'attention_bias' is not a mistral feature")),
        (Family::Qwen2, false) => Err(Error::usage("qwen2 always has biases on q, k and v")),
        _ => Ok(asked),
    }
}

fn mlp_bias(family: Family, fields: &Fields) -> Result<bool> {
    match (family, fields.flag("mlp_bias", false)?) {
        (Family::Llama, asked) => Ok(asked),
        (_, false) => Ok(false),
        _ => Err(Error::usage(format!("'mlp_bias' is not a {family} feature"))),
    }
}

fn activation(family: Family, fields: &Fields) -> Result<Activation> {
    let (key, default) = match family {
        Family::Gemma3 => ("hidden_activation", "gelu_pytorch_tanh"),
        _ => ("hidden_act", "silu"),
    };
    match fields.text(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::Gelu),
        other => Err(Error::usage(format!(
            "'{key}' is '{other}'; supported are silu, gelu and gelu_pytorch_tanh"
        ))),
    }
}

fn attention_scale(family: Family, fields: &Fields, head_dim: usize) -> Result<f64> {
    let scalar = match family {
        Family::Gemma3 => fields.number("query_pre_attn_scalar")?.unwrap_or(256.0),
        _ => head_dim as f64,
    };
    if scalar > 0.0 {
        return Ok(scalar.powf(-0.5));
    }
    Err(Error::usage(format!("'query_pre_attn_scalar' must be positive, found {scalar}")))
}

/// The cap of the logits. `attn_logit_softcapping` of Gemma 3 is left alone on purpose:
/// transformers 5 stores it and never applies it, and released checkpoints have null.
fn softcapping(family: Family, fields: &Fields) -> Result<Option<f64>> {
    match (family, fields.number("final_logit_softcapping")?) {
        (Family::Gemma3, cap) => Ok(cap),
        (_, None) => Ok(None),
        _ => Err(Error::usage(format!("'final_logit_softcapping' is not a {family} feature"))),
    }
}
