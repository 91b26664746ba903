//! Tokenizer of a Hugging Face model folder.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::tokenizer::{Tokenizer, broken};
use super::tokenizer_gguf::bos_eos_template;
use crate::{Error, Result};

/// The named special tokens of `transformers`, in its order.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Loads the tokenizer of `folder`; see [`Tokenizer::from_folder`].
pub(super) fn load(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    if !path.exists() && folder.join("tokenizer.model").exists() {
        return Err(Error::failure(format!(
            "{}: only tokenizer.model is here and tokenizer.json is needed; make it with \
             transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            folder.display()
        )));
    }
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
        .map_err(|error| Error::failure(format!("{}: not readable: {error}", path.display())))?;

    let mut config = read_object(&folder.join("tokenizer_config.json"))?;
    for (name, value) in read_object(&folder.join("special_tokens_map.json"))? {
        config.entry(name).or_insert(value);
    }
    add_missing_tokens(&mut inner, &config)?;
    let special = named_tokens(&config);
    mark_special(&mut inner, &special)?;
    apply_bos_eos(&mut inner, &config, &special)?;
    Tokenizer::new(inner, special)
}

/// A JSON object of a file; empty if there is no such file.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(Error::io(path)(error)),
    };
    serde_json::from_str(&text)
        .map_err(|error| Error::failure(format!("{}: not a JSON object: {error}", path.display())))
}

/// Adds tokens that only `added_tokens_decoder` of the configuration lists, under their own ids.
fn add_missing_tokens(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
) -> Result<()> {
    let Some(listed) = config.get("added_tokens_decoder").and_then(Value::as_object) else {
        return Ok(());
    };
    let mut missing = BTreeMap::new();
    for (id, value) in listed {
        let (Ok(id), Some(token)) = (id.parse::<u32>(), added_token(value)) else {
            return Err(Error::failure(format!(
                "tokenizer_config.json: added_tokens_decoder has a damaged entry '{id}'"
            )));
        };
        if inner.token_to_id(&token.content).is_none() {
            missing.insert(id, token);
        }
    }
    for (id, token) in missing {
        let text = token.content.clone();
        inner.add_tokens([token]).map_err(|error| broken("added tokens", error))?;
        if inner.token_to_id(&text) != Some(id) {
            return Err(Error::failure(format!(
                "tokenizer_config.json gives the token '{text}' the id {id}, which does not follow \
                 the vocabulary of tokenizer.json; save the tokenizer again with transformers"
            )));
        }
    }
    Ok(())
}

/// An entry of `added_tokens_decoder`, if it is whole.
fn added_token(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
    let token = AddedToken::from(value.get("content")?.as_str()?, flag("special"));
    Some(
        token
            .normalized(flag("normalized"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word")),
    )
}

/// The named special tokens, given as a string or as an object with `content`.
fn named_tokens(config: &Map<String, Value>) -> BTreeMap<String, String> {
    let text = |value: &Value| {
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
    };
    let named = NAMES.iter().filter_map(|name| Some((*name, config.get(*name)?)));
    let extra = config.get("extra_special_tokens").and_then(Value::as_object);
    let extra = extra.into_iter().flatten().map(|(name, value)| (name.as_str(), value));
    named.chain(extra).filter_map(|(name, v)| Some((name.to_string(), text(v)?))).collect()
}

/// Makes sure that the named tokens which the vocabulary has are special.
fn mark_special(
    inner: &mut tokenizers::Tokenizer,
    special: &BTreeMap<String, String>,
) -> Result<()> {
    let added = inner.get_added_tokens_decoder();
    let unmarked = |text: &&String| match inner.token_to_id(text) {
        None => false,
        Some(id) => added.get(&id).is_none_or(|token| !token.special),
    };
    let tokens: Vec<AddedToken> = special
        .values()
        .filter(unmarked)
        .map(|text| AddedToken::from(text.clone(), true))
        .collect();
    inner.add_special_tokens(tokens).map_err(|error| broken("special tokens", error))?;
    Ok(())
}

/// Applies `add_bos_token` / `add_eos_token`, where the configuration has them.
fn apply_bos_eos(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    special: &BTreeMap<String, String>,
) -> Result<()> {
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    let (add_bos, add_eos) = (flag("add_bos_token"), flag("add_eos_token"));
    if add_bos.is_none() && add_eos.is_none() {
        return Ok(());
    }
    let token = |wanted: Option<bool>, name: &str| {
        let text = special.get(name).filter(|_| wanted == Some(true))?;
        Some((text.clone(), inner.token_to_id(text)?))
    };
    let (bos, eos) = (token(add_bos, "bos_token"), token(add_eos, "eos_token"));
    let template = bos_eos_template(bos, eos)?;
    inner.with_post_processor(Some(template));
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    /// A folder with a tokenizer of the words a and b, and `</s>`; and this configuration.
    fn folder(config: Value) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = json!({
            "version": "1.0", "truncation": {"max_length": 1, "strategy": "LongestFirst",
            "stride": 0, "direction": "Right"}, "padding": null, "normalizer": null,
            "added_tokens": [{"id": 2, "content": "</s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "</s>": 2, "<s>": 3},
                "unk_token": "a"}
        });
        write(&folder, "tokenizer.json", &tokenizer.to_string());
        write(&folder, "tokenizer_config.json", &config.to_string());
        folder
    }

    fn write(folder: &TempDir, name: &str, text: &str) {
        std::fs::write(folder.path().join(name), text).unwrap();
    }

    fn error_of(folder: &TempDir) -> String {
        load(folder.path()).err().expect("it must be refused").to_string()
    }

    #[test]
    fn truncation_of_the_file_is_ignored() {
        let folder = folder(json!({}));
        assert_eq!(load(folder.path()).unwrap().encode("a b a", true).unwrap(), [0, 1, 0]);
    }

    #[test]
    fn special_tokens_come_from_both_files_and_become_special() {
        let folder = folder(json!({"bos_token": {"content": "<s>"}, "pad_token": null}));
        write(&folder, "special_tokens_map.json", r#"{"eos_token": "</s>", "bos_token": "a"}"#);
        let tokenizer = load(folder.path()).unwrap();
        assert_eq!(tokenizer.bos_token().unwrap().id, 3);
        assert_eq!(tokenizer.eos_token().unwrap().text, "</s>");
        assert_eq!(tokenizer.pad_token(), None);
        assert_eq!(tokenizer.decode(&[3, 0, 2], true).unwrap(), "a");
    }

    #[test]
    fn bos_and_eos_flags_of_the_configuration_count() {
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
        let tokenizer = load(folder(config).path()).unwrap();
        assert_eq!(tokenizer.encode("b", true).unwrap(), [3, 1]);
        assert_eq!(tokenizer.encode("b", false).unwrap(), [1]);
    }

    #[test]
    fn an_eos_that_is_no_token_is_refused() {
        let error = error_of(&folder(json!({"eos_token": "<eos>"})));
        assert!(error.contains("eos_token '<eos>' is not in its vocabulary"), "{error}");
    }

    #[test]
    fn tokens_listed_only_in_the_configuration_are_added() {
        let decoder = json!({"4": {"content": "<x>", "special": true}});
        let tokenizer = load(folder(json!({"added_tokens_decoder": decoder})).path()).unwrap();
        assert_eq!(tokenizer.encode("a<x>", false).unwrap(), [0, 4]);
        let decoder = json!({"9": {"content": "<x>", "special": true}});
        let error = error_of(&folder(json!({"added_tokens_decoder": decoder})));
        assert!(error.contains("'<x>' the id 9"), "{error}");
    }

    #[test]
    fn a_text_with_an_added_token_that_the_model_lacks_is_refused() {
        let decoder = json!({"4": {"content": "<x>", "special": true}});
        let mut tokenizer = load(folder(json!({"added_tokens_decoder": decoder})).path()).unwrap();
        tokenizer.check_vocab(4).unwrap();
        assert_eq!(tokenizer.encode("a", false).unwrap(), [0]);
        let error = tokenizer.encode("a <x>", false).unwrap_err().to_string();
        assert!(error.contains("'<x>' (id 4)"), "{error}");
    }

    #[test]
    fn tokens_that_overlap_a_span_are_marked() {
        let tokenizer = load(folder(json!({})).path()).unwrap();
        let (ids, mask) = tokenizer.encode_with_spans("a b a b", true, &[2..3, 6..7]).unwrap();
        assert_eq!((ids.len(), mask), (4, vec![false, true, false, true]));
    }

    #[test]
    fn missing_and_damaged_files_are_named() {
        let empty = tempfile::tempdir().unwrap();
        assert!(error_of(&empty).contains("tokenizer.json: no such file"));
        write(&empty, "tokenizer.model", "");
        assert!(error_of(&empty).contains("only tokenizer.model is here"));
        write(&empty, "tokenizer.json", "{");
        assert!(error_of(&empty).contains("tokenizer.json: not readable"));
        let folder = folder(json!({}));
        write(&folder, "tokenizer_config.json", "[");
        assert!(error_of(&folder).contains("tokenizer_config.json: not a JSON object"));
    }
}
