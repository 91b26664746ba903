//! The parts of `config.json` that differ by layer: sliding windows and rotary tables.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::config::{Family, LayerConfig};
use crate::model::config_fields::Fields;
use crate::model::config_rope::{Llama3, Rope, RopeScaling, Yarn};

/// Every key a `rope_scaling` or `rope_parameters` object may hold; one that its type does not use
/// is passed over, as transformers does.
const ROPE_KEYS: [&str; 15] = [
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
];

/// One entry per block. In Gemma 3 global layers use rotary table 0 and sliding ones table 1;
/// everywhere else there is one table.
pub(crate) fn layers(family: Family, fields: &Fields, count: usize) -> Result<Vec<LayerConfig>> {
    let window = window(family, fields)?;
    let sliding = match fields.get("layer_types") {
        Some(types) => layer_types(family, types, count, window)?,
        None => default_sliding(family, fields, count, window)?,
    };
    if window.is_none() && sliding.contains(&true) {
        return Err(Error::usage("layers with a sliding window need 'sliding_window'"));
    }
    let layer = |slides: bool| LayerConfig {
        window: window.filter(|_| slides),
        rope: usize::from(slides && family == Family::Gemma3),
    };
    Ok(sliding.into_iter().map(layer).collect())
}

/// The window of the layers that have one.
fn window(family: Family, fields: &Fields) -> Result<Option<usize>> {
    let stated = match fields.has("sliding_window") {
        true => fields.size("sliding_window")?,
        false => Some(4096).filter(|_| family != Family::Llama),
    };
    match family {
        Family::Llama if stated.is_some() => {
            Err(Error::usage("'sliding_window' is not a llama feature"))
        }
        Family::Qwen2 | Family::Qwen3 if !fields.flag("use_sliding_window", false)? => Ok(None),
        _ => Ok(stated),
    }
}

/// Which layers slide, from an explicit `layer_types`.
fn layer_types(
    family: Family,
    types: &Value,
    count: usize,
    window: Option<usize>,
) -> Result<Vec<bool>> {
    let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if types.len() != count {
        let found = types.len();
        return Err(Error::usage(format!("'layer_types' has {found} entries for {count} layers")));
    }
    let slides = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(Error::usage(format!("layer type {kind} is not supported"))),
    };
    let sliding = types.iter().map(slides).collect::<Result<Vec<_>>>()?;
    let uniform = matches!(family, Family::Llama | Family::Mistral);
    if uniform && sliding.iter().any(|&slides| slides != window.is_some()) {
        return Err(Error::usage(format!("{family} has the same attention in every layer")));
    }
    Ok(sliding)
}

/// Which layers slide where `layer_types` is not given.
fn default_sliding(
    family: Family,
    fields: &Fields,
    count: usize,
    window: Option<usize>,
) -> Result<Vec<bool>> {
    let first = match family {
        Family::Llama | Family::Mistral => 0,
        Family::Qwen2 | Family::Qwen3 => fields.size("max_window_layers")?.unwrap_or(28),
        Family::Gemma3 => {
            let pattern = fields.size("sliding_window_pattern")?;
            let pattern = pattern.or(fields.size("_sliding_window_pattern")?).unwrap_or(6).max(1);
            return Ok((1..=count).map(|i| !i.is_multiple_of(pattern)).collect());
        }
    };
    Ok((0..count).map(|i| window.is_some() && i >= first).collect())
}

/// The distinct rotary tables, in the order that [`layers`] refers to.
pub(crate) fn ropes(
    family: Family,
    fields: &Fields,
    head_dim: usize,
    max_position: usize,
) -> Result<Vec<Rope>> {
    refuse_partial(fields)?;
    let parameters = fields.object("rope_parameters")?;
    let scaling = fields.object("rope_scaling")?;
    let table = |dict: Option<&Fields>, theta: f64| {
        Table { fields, dict, theta, head_dim, max_position }.rope()
    };
    let theta = fields.number("rope_theta")?;
    if family != Family::Gemma3 {
        let dict = scaling.as_ref().or(parameters.as_ref());
        return Ok(vec![table(dict, theta.unwrap_or(10_000.0))?]);
    }
    if let Some(key) =
        parameters.iter().flat_map(Fields::keys).find(|key| !LAYER_KINDS.contains(key))
    {
        return Err(Error::usage(format!(
            "'rope_parameters' of gemma3 is one object per layer type, found the key '{key}'"
        )));
    }
    let of = |kind: &str| parameters.as_ref().map_or(Ok(None), |p| p.object(kind));
    let global = of(LAYER_KINDS[0])?;
    let global = scaling.as_ref().or(global.as_ref());
    let local = of(LAYER_KINDS[1])?;
    let local_theta = fields.number("rope_local_base_freq")?.unwrap_or(10_000.0);
    Ok(vec![table(global, theta.unwrap_or(1_000_000.0))?, table(local.as_ref(), local_theta)?])
}

/// Gemma 3's kinds of layers, in the order of their rotary tables.
const LAYER_KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

fn refuse_partial(fields: &Fields) -> Result<()> {
    match fields.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => {
            Err(Error::usage("'partial_rotary_factor' other than 1 is not supported"))
        }
        _ => Ok(()),
    }
}

/// Where one rotary table is described.
struct Table<'a> {
    /// The whole configuration.
    fields: &'a Fields<'a>,
    /// Its `rope_scaling` or `rope_parameters`, if any.
    dict: Option<&'a Fields<'a>>,
    /// Base if `dict` names none.
    theta: f64,
    head_dim: usize,
    max_position: usize,
}

impl Table<'_> {
    fn rope(&self) -> Result<Rope> {
        let (theta, head_dim) = (positive("rope_theta", self.theta)?, self.head_dim);
        let Some(dict) = self.dict else {
            return Ok(Rope { theta, head_dim, scaling: RopeScaling::Default });
        };
        if let Some(key) = dict.keys().find(|key| !ROPE_KEYS.contains(key)) {
            return Err(Error::usage(format!("rope parameter '{key}' is not supported")));
        }
        refuse_partial(dict)?;
        let theta = positive("rope_theta", dict.number("rope_theta")?.unwrap_or(theta))?;
        let kind = dict.text("rope_type")?.or(dict.text("type")?).unwrap_or("default");
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: required(dict, "factor")? },
            "llama3" => RopeScaling::Llama3(self.llama3(dict)?),
            "yarn" => RopeScaling::Yarn(self.yarn(dict)?),
            _ => {
                return Err(Error::usage(format!(
                    "rope_type '{kind}' is not supported; supported are default, linear, llama3 \
                     and yarn"
                )));
            }
        };
        Ok(Rope { theta, head_dim, scaling })
    }

    fn llama3(&self, dict: &Fields) -> Result<Llama3> {
        Ok(Llama3 {
            factor: required(dict, "factor")?,
            low_freq_factor: required(dict, "low_freq_factor")?,
            high_freq_factor: required(dict, "high_freq_factor")?,
            original_max_position_embeddings: self.original_context(dict)?,
        })
    }

    fn yarn(&self, dict: &Fields) -> Result<Yarn> {
        let context = self.original_context(dict)?;
        let factor = dict.number("factor")?.unwrap_or(self.max_position as f64 / context);
        let factor = positive("factor", factor)?;
        let some = |key: &str| Ok::<_, Error>(dict.number(key)?.filter(|value| *value != 0.0));
        let attention_factor = match (dict.number("attention_factor")?, some("mscale")?) {
            (Some(stated), _) => stated,
            (None, Some(mscale)) => match some("mscale_all_dim")? {
                Some(all) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all),
                None => yarn_mscale(factor, 1.0),
            },
            (None, None) => yarn_mscale(factor, 1.0),
        };
        Ok(Yarn {
            factor,
            attention_factor,
            beta_fast: some("beta_fast")?.unwrap_or(32.0),
            beta_slow: some("beta_slow")?.unwrap_or(1.0),
            original_max_position_embeddings: context,
            truncate: dict.flag("truncate", true)?,
        })
    }

    /// A value beside the rope object wins over one inside it; without either, the full context.
    fn original_context(&self, dict: &Fields) -> Result<f64> {
        let key = "original_max_position_embeddings";
        let stated = self.fields.number(key)?.or(dict.number(key)?);
        positive(key, stated.unwrap_or(self.max_position as f64))
    }
}

/// YaRN's factor on cos and sin for a stretch (arXiv:2309.00071, equation 22).
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn required(dict: &Fields, key: &str) -> Result<f64> {
    let value = dict.number(key)?;
    positive(key, value.ok_or_else(|| Error::usage(format!("rope parameters lack '{key}'")))?)
}

fn positive(key: &str, value: f64) -> Result<f64> {
    if value > 0.0 {
        return Ok(value);
    }
    Err(Error::usage(format!("'{key}' must be positive, found {value}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::ModelConfig;

    #[test]
    fn only_a_whole_rotation_is_taken_inside_rope_parameters() {
        let load = |factor: f64| {
            ModelConfig::from_json(&json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "hidden_act": "silu", "hidden_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8,
                "vocab_size": 8, "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": factor},
            }))
        };
        assert!(load(1.0).is_ok());
        let error = load(0.5).unwrap_err().to_string();
        assert!(error.contains("partial_rotary_factor"), "{error}");
    }
}
