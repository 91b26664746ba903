//! PEFT's `adapter_config.json`: what is read from it, and what is written so that PEFT loads it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::LoraConfig;
use super::folder;
use super::lora::{Update, module};
use crate::model::{BaseModel, Matrix};
use crate::{Error, Result};

/// Values for the modules that a name matches, in the order of the file.
pub(super) type Pattern = Vec<(String, f64)>;

/// What some modules have of their own.
#[derive(Clone, Debug, Default)]
pub(super) struct Patterns {
    /// Numerators of the factor.
    pub alphas: Pattern,
    /// Ranks; nothing where the file names modules by regular expressions: the tensors tell.
    pub ranks: Option<Pattern>,
}

/// The fields of the file that change what a LoRA computes.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    target_modules: Json,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Json>>,
    #[serde(default)]
    rank_pattern: Option<Map<String, Json>>,
    #[serde(flatten)]
    rest: BTreeMap<String, Json>,
}

/// Reads the configuration with its `alpha_pattern` and `rank_pattern`.
///
/// # Errors
/// If the file is damaged or asks for something that is not computed here.
pub(super) fn read(path: &Path) -> Result<(LoraConfig, Patterns)> {
    let file: PeftConfig = folder::read_json(path)?;
    check(path, &file)?;
    let config = LoraConfig {
        r: file.r,
        lora_alpha: file.lora_alpha,
        lora_dropout: file.lora_dropout,
        use_rslora: file.use_rslora,
        target_modules: target_modules(&file.target_modules),
    };
    let alphas = file.alpha_pattern.unwrap_or_default();
    let alphas = alphas.into_iter().map(|(name, alpha)| pattern(path, name, &alpha));
    let ranks = file.rank_pattern.unwrap_or_default();
    let plain = ranks.keys().all(|name| is_plain(name));
    let ranks = ranks.into_iter().map(|(name, rank)| rank_of(path, name, &rank));
    let ranks = if plain { Some(ranks.collect::<Result<_>>()?) } else { None };
    Ok((config, Patterns { alphas: alphas.collect::<Result<_>>()?, ranks }))
}

/// The value of the first pattern that is `name` or its end after a dot, as PEFT's
/// `get_pattern_key` finds it.
pub(super) fn lookup(patterns: &Pattern, name: &str) -> Option<f64> {
    let matches = |pattern: &str| {
        name.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    patterns.iter().find(|(pattern, _)| matches(pattern)).map(|(_, value)| *value)
}

/// Whether a pattern is a name, and no regular expression.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    !name.is_empty() && name.chars().all(plain)
}

/// A module's own rank.
fn rank_of(path: &Path, name: String, rank: &Json) -> Result<(String, f64)> {
    let path = path.display();
    let bad = || Error::failure(format!("{path}: rank_pattern of '{name}' is not a whole number"));
    let rank = rank.as_u64().ok_or_else(bad)?;
    Ok((name, rank as f64))
}

/// Refuses a pattern that is more than a plain name, which PEFT reads as a regular expression.
fn pattern(path: &Path, name: String, alpha: &Json) -> Result<(String, f64)> {
    let path = path.display();
    if !is_plain(&name) {
        return Err(Error::failure(format!(
            "{path}: alpha_pattern has the key '{name}', but only plain module names such as \
             q_proj or layers.0.self_attn.q_proj are supported; write one key for each module"
        )));
    }
    let bad = || Error::failure(format!("{path}: alpha_pattern of '{name}' is not a number"));
    let alpha = alpha.as_f64().ok_or_else(bad)?;
    Ok((name, alpha))
}

/// Refuses what a PEFT configuration may ask for and this code does not compute.
fn check(path: &Path, file: &PeftConfig) -> Result<()> {
    let refuse =
        |what: &str| Error::failure(format!("{}: {what} is not supported", path.display()));
    if file.peft_type != "LORA" {
        return Err(refuse(&format!("peft_type {}", file.peft_type)));
    }
    let plain = |value: &Json| match value {
        Json::Null | Json::Bool(false) => true,
        Json::String(text) => text == "none",
        Json::Array(items) => items.is_empty(),
        Json::Object(items) => items.is_empty(),
        _ => false,
    };
    let special = [
        "bias",
        "fan_in_fan_out",
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "lora_bias",
        "modules_to_save",
        "layer_replication",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "target_parameters",
    ];
    match special.iter().find(|key| file.rest.get(**key).is_some_and(|value| !plain(value))) {
        Some(key) => Err(refuse(&format!("{key} = {}", file.rest[*key]))),
        None => Ok(()),
    }
}

fn target_modules(json: &Json) -> BTreeSet<Matrix> {
    let names: Vec<&str> = match json {
        Json::Array(items) => items.iter().filter_map(Json::as_str).collect(),
        _ => return Matrix::ALL.into(),
    };
    let named = |matrix: &Matrix| names.iter().any(|name| name.ends_with(matrix.short_name()));
    Matrix::ALL.into_iter().filter(named).collect()
}

/// The bytes of a configuration that describes `updates` of a model of `layer_count` layers.
///
/// # Errors
/// If a number has no JSON form.
pub(super) fn json(
    config: &LoraConfig,
    updates: &BTreeMap<(usize, Matrix), Update>,
    layer_count: usize,
    base: &BaseModel,
) -> Result<Vec<u8>> {
    let (target_modules, layers_to_transform) = targets(updates, layer_count);
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for ((layer, matrix), update) in updates {
        if update.r != config.r {
            ranks.insert(module(*layer, *matrix), json!(update.r));
        }
        if update.alpha != config.lora_alpha {
            alphas.insert(module(*layer, *matrix), json!(update.alpha));
        }
    }
    folder::pretty(&json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name_or_path,
        "base_model_sha256": base.sha256,
        "r": config.r,
        "rank_pattern": ranks,
        "lora_alpha": config.lora_alpha,
        "alpha_pattern": alphas,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": target_modules,
        "layers_to_transform": layers_to_transform,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
    }))
}

/// `target_modules` and `layers_to_transform`: short names where all chosen layers have the same
/// matrices, else the full name of every matrix.
fn targets(
    updates: &BTreeMap<(usize, Matrix), Update>,
    layer_count: usize,
) -> (Vec<String>, Option<Vec<usize>>) {
    let layers: BTreeSet<usize> = updates.keys().map(|(layer, _)| *layer).collect();
    let matrices: BTreeSet<Matrix> = updates.keys().map(|(_, matrix)| *matrix).collect();
    if updates.len() != layers.len() * matrices.len() {
        return (updates.keys().map(|(layer, matrix)| module(*layer, *matrix)).collect(), None);
    }
    let names = matrices.iter().map(|matrix| matrix.short_name().to_string()).collect();
    let some = layers.len() < layer_count;
    (names, some.then(|| layers.into_iter().collect()))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::testing::tiny_model;
    use super::super::{Adapter, Lora, load, save};
    use super::*;

    /// Reads a configuration with these keys beside the usual ones.
    fn read_with(more: &str) -> Result<(LoraConfig, Patterns)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter_config.json");
        let text = format!(r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, {more}}}"#);
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn the_first_alpha_in_the_file_that_names_a_module_counts() {
        let text = r#""alpha_pattern": {"q_proj": 1, "layers.0.self_attn.q_proj": 2, "proj": 3}"#;
        let (_, patterns) = read_with(text).unwrap();
        assert_eq!(lookup(&patterns.alphas, "model.layers.0.self_attn.q_proj"), Some(1.0));
        let text = r#""alpha_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 1}"#;
        let (_, patterns) = read_with(text).unwrap();
        let alphas = patterns.alphas;
        assert_eq!(lookup(&alphas, "model.layers.0.self_attn.q_proj"), Some(2.0));
        assert_eq!(lookup(&alphas, "model.layers.10.self_attn.q_proj"), Some(1.0));
        assert_eq!(lookup(&alphas, "model.layers.0.self_attn.k_proj"), None);
    }

    #[test]
    fn a_regular_expression_is_refused_by_its_name() {
        for name in ["^model.layers.0.q_proj", ".*q_proj", "q_proj|k_proj", "layers.[01]", ""] {
            let error = read_with(&format!(r#""alpha_pattern": {{"{name}": 1}}"#)).unwrap_err();
            let error = error.to_string();
            assert!(error.contains(&format!("the key '{name}'")), "{error}");
            assert!(error.contains("plain module names"), "{error}");
        }
        assert!(read_with(r#""alpha_pattern": null"#).unwrap().1.alphas.is_empty());
        let (_, patterns) = read_with(r#""rank_pattern": {".*q_proj": 2}"#).unwrap();
        assert!(patterns.ranks.is_none());
        let error = read_with(r#""rank_pattern": {"q_proj": 2.5}"#).unwrap_err().to_string();
        assert!(error.contains("rank_pattern of 'q_proj' is not a whole number"), "{error}");
    }

    #[test]
    fn tensors_of_another_rank_than_the_configuration_gives_are_refused() {
        let (model, key) = (tiny_model(), "base_model.model.model.layers.0.self_attn.q_proj");
        let fresh = Lora::new(LoraConfig::all_linear(), &model, 0, &Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &[Box::new(fresh)], &BaseModel::default()).unwrap();
        let path = dir.path().join("adapter_config.json");
        let mut json: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let mut loaded = |r: usize, ranks: Json| {
            json["r"] = json!(r);
            json["rank_pattern"] = ranks;
            std::fs::write(&path, json.to_string()).unwrap();
            load(dir.path(), &model, &Device::Cpu).map(drop).map_err(|error| error.to_string())
        };
        let width = model.hidden_size;
        let wanted = format!(
            "'{key}.lora_A.weight' has shape [8, {width}], this adapter's r wants [4, {width}]"
        );
        for (r, ranks) in [(4, Json::Null), (8, json!({"q_proj": 4}))] {
            let error = loaded(r, ranks).unwrap_err();
            assert!(error.contains(&wanted), "{error}");
        }
        loaded(8, json!({})).unwrap();
        loaded(4, json!({"proj": 4, "q_proj": 8})).unwrap_err();
        let each = Matrix::ALL.map(|matrix| (matrix.short_name().to_string(), json!(8)));
        loaded(4, Json::Object(each.into_iter().collect())).unwrap();
        loaded(4, json!({".*": 8})).unwrap();
    }

    /// A LoRA with these matrices and ranks, all of whose numbers are 1.
    fn lora(parts: &[(usize, Matrix, usize)], use_rslora: bool, alphas: &Pattern) -> Lora {
        let model = tiny_model();
        let mut parameters = BTreeMap::new();
        for (layer, matrix, r) in parts {
            let (inputs, outputs) = model.linear_shape(*matrix);
            for (factor, shape) in [("A", (*r, inputs)), ("B", (outputs, *r))] {
                let key =
                    format!("base_model.model.{}.lora_{factor}.weight", module(*layer, *matrix));
                let ones = Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
                parameters.insert(key, ones);
            }
        }
        let config = LoraConfig { r: 4, use_rslora, ..LoraConfig::all_linear() };
        let rank =
            |(layer, matrix, r): &(usize, Matrix, usize)| (module(*layer, *matrix), *r as f64);
        let ranks = Some(parts.iter().map(rank).collect());
        let patterns = Patterns { alphas: alphas.clone(), ranks };
        Lora::with_parameters(config, &model, parameters, &patterns, "test").unwrap()
    }

    /// Saves and loads; what was written, which must say the same as before.
    fn round_trip(before: Lora) -> Json {
        let dir = tempfile::tempdir().unwrap();
        let base = BaseModel::default();
        let wanted = before.files(&base).unwrap();
        save(dir.path(), &[Box::new(before)], &base).unwrap();
        let after = load(dir.path(), &tiny_model(), &Device::Cpu).unwrap();
        assert!(after[0].files(&base).unwrap() == wanted);
        serde_json::from_slice(&wanted[0].1).unwrap()
    }

    #[test]
    fn what_is_saved_describes_the_ranks_alphas_and_layers_of_the_tensors() {
        let (q, down) = (Matrix::ALL[0], Matrix::ALL[6]);
        let alphas = vec![("down_proj".to_string(), 3.0)];
        for use_rslora in [false, true] {
            let parts = [(1, q, 4), (1, down, 12), (2, q, 4), (2, down, 4)];
            let json = round_trip(lora(&parts, use_rslora, &alphas));
            assert_eq!(json["target_modules"], json!(["q_proj", "down_proj"]));
            assert_eq!(json["layers_to_transform"], json!([1, 2]));
            assert_eq!(json["rank_pattern"], json!({"model.layers.1.mlp.down_proj": 12}));
            let alphas = json["alpha_pattern"].as_object().unwrap();
            assert_eq!(alphas.len(), 2);
            assert_eq!(alphas["model.layers.2.mlp.down_proj"], 3.0);
            assert_eq!(json["use_rslora"], use_rslora);
        }
    }

    #[test]
    fn layers_with_different_matrices_are_saved_by_their_full_names() {
        let json =
            round_trip(lora(&[(0, Matrix::ALL[0], 4), (2, Matrix::ALL[6], 4)], false, &vec![]));
        let names = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"];
        assert_eq!(json["target_modules"], json!(names));
        assert_eq!(json["layers_to_transform"], Json::Null);
        let every: Vec<_> = (0..3).map(|layer| (layer, Matrix::ALL[0], 4)).collect();
        let json = round_trip(lora(&every, false, &vec![]));
        assert_eq!(json["layers_to_transform"], Json::Null);
        assert_eq!(json["rank_pattern"], json!({}));
    }
}
