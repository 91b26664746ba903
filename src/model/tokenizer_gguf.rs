//! Tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file.
//!
//! Key names and defaults are llama.cpp's (`llama-vocab.cpp`); the pipelines are those of the
//! models' own `tokenizer.json`, so that ids equal the Hugging Face tokenizer's.

use std::collections::{BTreeMap, HashMap};

use candle_core::quantized::gguf_file::Value;
use tokenizers::AddedToken;
use tokenizers::processors::template::TemplateProcessing;

use super::tokenizer::{Tokenizer, broken};
use super::{tokenizer_bpe, tokenizer_spm};
use crate::{Error, Result};

/// What a GGUF file says of one token (llama.cpp's `llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A learnt piece of text.
    Normal,
    /// The unknown token.
    Unknown,
    /// A special token such as BOS; it gives no text when special tokens are skipped.
    Control,
    /// Matched whole in the text before anything else, but plain text.
    UserDefined,
    /// Fills the vocabulary; never matched.
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

/// Special tokens which end a turn in the families served here, whichever is named EOS.
const END_OF_TURN: [&str; 6] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"];

/// Builds the tokenizer; see [`Tokenizer::from_gguf`].
pub(super) fn load(metadata: &HashMap<String, Value>) -> Result<Tokenizer> {
    let meta = Metadata(metadata);
    let model = meta.text("tokenizer.ggml.model")?.ok_or_else(|| missing("model"))?;
    let (mut inner, tokens, kinds) = match model {
        "gpt2" => tokenizer_bpe::build(&meta)?,
        "llama" => tokenizer_spm::build(&meta)?,
        other => {
            return Err(Error::failure(format!(
                "the GGUF file's tokenizer is of kind '{other}' and only gpt2 (byte-level BPE) \
                 and llama (SentencePiece) are supported; use the model's Hugging Face folder"
            )));
        }
    };
    let ids = special_ids(&meta, model)?;
    let added = added_tokens(&tokens, &kinds, &ids);
    inner.add_tokens(added).map_err(|error| broken("added tokens", error))?;

    let mut special = BTreeMap::new();
    for (name, id) in &ids {
        let text = tokens.get(*id as usize).ok_or_else(|| {
            Error::failure(format!(
                "the GGUF file's {name} has id {id}, beyond its {} tokens",
                tokens.len()
            ))
        })?;
        special.insert((*name).to_string(), text.clone());
    }
    let token = |wanted: bool, name: &str| {
        let id = ids.get(name).filter(|_| wanted)?;
        Some((tokens[*id as usize].clone(), *id))
    };
    let bos = token(add_bos(&meta, model)?, "bos_token");
    let eos = token(meta.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false), "eos_token");
    inner.with_post_processor(Some(bos_eos_template(bos, eos)?));
    let end_of_turn = end_of_turn(&meta, &tokens, &kinds)?;
    Ok(Tokenizer::new(inner, special)?.with_end_of_turn(end_of_turn))
}

/// Whether a text begins with BOS: as stated, else by llama.cpp's default for the kind.
fn add_bos(meta: &Metadata, model: &str) -> Result<bool> {
    let default = model == "llama" || tokenizer_bpe::adds_bos(meta)?;
    Ok(meta.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(default))
}

/// Ids of the named special tokens. SentencePiece files may leave out the usual 0, 1, 2.
fn special_ids(meta: &Metadata, model: &str) -> Result<BTreeMap<&'static str, u32>> {
    const KEYS: [(&str, &str, u32); 3] = [
        ("unk_token", "tokenizer.ggml.unknown_token_id", 0),
        ("bos_token", "tokenizer.ggml.bos_token_id", 1),
        ("eos_token", "tokenizer.ggml.eos_token_id", 2),
    ];
    let mut ids = BTreeMap::new();
    for (name, key, usual) in KEYS {
        if let Some(id) = meta.id(key)?.or((model == "llama").then_some(usual)) {
            ids.insert(name, id);
        }
    }
    if let Some(id) = meta.id("tokenizer.ggml.padding_token_id")? {
        ids.insert("pad_token", id);
    }
    Ok(ids)
}

/// Tokens that are found in the text before the model sees it: control, unknown, user-defined, and
/// the named special ones whatever their kind.
fn added_tokens(
    tokens: &[String],
    kinds: &[Kind],
    ids: &BTreeMap<&'static str, u32>,
) -> Vec<AddedToken> {
    let named = |id: usize| ids.values().any(|named| *named as usize == id);
    let token = |(id, (text, kind)): (usize, (&String, &Kind))| {
        let special = matches!(kind, Kind::Control | Kind::Unknown) || named(id);
        let added = special || *kind == Kind::UserDefined;
        added.then(|| AddedToken::from(text.clone(), special).normalized(false))
    };
    tokens.iter().zip(kinds).enumerate().filter_map(token).collect()
}

/// The end-of-turn id that the file states, and the special tokens known to end a turn.
fn end_of_turn(meta: &Metadata, tokens: &[String], kinds: &[Kind]) -> Result<Vec<u32>> {
    let mut ids: Vec<u32> = meta.id("tokenizer.ggml.eot_token_id")?.into_iter().collect();
    for (id, (text, kind)) in tokens.iter().zip(kinds).enumerate() {
        if *kind == Kind::Control && END_OF_TURN.contains(&text.as_str()) {
            ids.push(id as u32);
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The post-processor that puts BOS before and EOS after a text, each where given.
pub(super) fn bos_eos_template(
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
) -> Result<TemplateProcessing> {
    let name = |token: &Option<(String, u32)>| token.iter().map(|t| t.0.clone()).collect();
    let single: Vec<String> = [name(&bos), vec!["$A".to_string()], name(&eos)].concat();
    let mut tokens: Vec<(String, u32)> = bos.into_iter().chain(eos).collect();
    tokens.dedup();
    TemplateProcessing::builder()
        .try_single(single)
        .map_err(|error| broken("BOS and EOS tokens", error.into()))?
        .special_tokens(tokens)
        .build()
        .map_err(|error| broken("BOS and EOS tokens", error.into()))
}

/// Typed access to metadata values.
pub(super) struct Metadata<'a>(pub &'a HashMap<String, Value>);

impl<'a> Metadata<'a> {
    /// A string, if the key is there.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(key, "a string")),
        }
    }

    /// A boolean, if the key is there.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(wrong_type(key, "true or false")),
        }
    }

    /// A token id, if the key is there.
    fn id(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let id = integer(value).and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| wrong_type(key, "a token id"))
    }

    /// The tokens in the order of their ids.
    pub fn tokens(&self) -> Result<Vec<&'a str>> {
        self.texts("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokens"))
    }

    /// The merges (`left right`), if the file has any.
    pub fn merges(&self) -> Result<Option<Vec<&'a str>>> {
        self.texts("tokenizer.ggml.merges")
    }

    /// The score of each of `count` tokens, if the file has any.
    pub fn scores(&self, count: usize) -> Result<Option<Vec<f32>>> {
        let key = "tokenizer.ggml.scores";
        let score = |value: &Value| match value {
            Value::F32(score) => Ok(*score),
            Value::F64(score) => Ok(*score as f32),
            _ => Err(wrong_type(key, "a list of numbers")),
        };
        let Some(values) = self.list(key)? else { return Ok(None) };
        same_length(key, values.len(), count)?;
        values.iter().map(score).collect::<Result<_>>().map(Some)
    }

    /// The kind of each of `count` tokens; all normal if the file does not say.
    pub fn kinds(&self, count: usize) -> Result<Vec<Kind>> {
        let key = "tokenizer.ggml.token_type";
        let Some(values) = self.list(key)? else { return Ok(vec![Kind::Normal; count]) };
        same_length(key, values.len(), count)?;
        let kind = |value: &Value| match integer(value) {
            Some(0 | 1) => Ok(Kind::Normal),
            Some(2) => Ok(Kind::Unknown),
            Some(3) => Ok(Kind::Control),
            Some(4) => Ok(Kind::UserDefined),
            Some(5) => Ok(Kind::Unused),
            Some(6) => Ok(Kind::Byte),
            _ => Err(wrong_type(key, "a list of token types from 0 to 6")),
        };
        values.iter().map(kind).collect()
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let text = |value: &'a Value| match value {
            Value::String(text) => Ok(text.as_str()),
            _ => Err(wrong_type(key, "a list of strings")),
        };
        let Some(values) = self.list(key)? else { return Ok(None) };
        values.iter().map(text).collect::<Result<_>>().map(Some)
    }

    fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(_) => Err(wrong_type(key, "a list")),
        }
    }
}

/// The value of any of the integer types.
fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::U8(v) => Some((*v).into()),
        Value::I8(v) => Some((*v).into()),
        Value::U16(v) => Some((*v).into()),
        Value::I16(v) => Some((*v).into()),
        Value::U32(v) => Some((*v).into()),
        Value::I32(v) => Some((*v).into()),
        Value::U64(v) => i64::try_from(*v).ok(),
        Value::I64(v) => Some(*v),
        _ => None,
    }
}

/// The vocabulary as a map, or which token is there twice.
pub(super) fn vocabulary(tokens: &[String]) -> Result<tokenizers::models::bpe::Vocab> {
    let mut vocab = tokenizers::models::bpe::Vocab::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = vocab.insert(token.clone(), id as u32) {
            return Err(Error::failure(format!(
                "the GGUF file's tokenizer has the token '{token}' twice, as id {first} and {id}"
            )));
        }
    }
    Ok(vocab)
}

pub(super) fn missing(what: &str) -> Error {
    Error::failure(format!(
        "the GGUF file has no tokenizer.ggml.{what}; it was written without a tokenizer: take one \
         that has it, or use the model's Hugging Face folder"
    ))
}

fn wrong_type(key: &str, wanted: &str) -> Error {
    Error::failure(format!("the GGUF file's {key} is not {wanted}; the file is damaged"))
}

fn same_length(key: &str, found: usize, wanted: usize) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::failure(format!(
        "the GGUF file's {key} has {found} entries for {wanted} tokens; the file is damaged"
    )))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Metadata with these tokens, their kinds, and further keys.
    pub fn metadata(tokens: &[(&str, i32)], more: Vec<(&str, Value)>) -> HashMap<String, Value> {
        let texts = tokens.iter().map(|(text, _)| Value::String(text.to_string())).collect();
        let kinds = tokens.iter().map(|(_, kind)| Value::I32(*kind)).collect();
        let mut all: HashMap<String, Value> = HashMap::new();
        all.insert("tokenizer.ggml.tokens".into(), Value::Array(texts));
        all.insert("tokenizer.ggml.token_type".into(), Value::Array(kinds));
        for (key, value) in more {
            all.insert(format!("tokenizer.ggml.{key}"), value);
        }
        all
    }

    pub fn text(text: &str) -> Value {
        Value::String(text.into())
    }

    /// Byte-level tokens without merges, ids 0 to 255, and `<|im_end|>`, `<think>`, `[PAD]`.
    pub fn byte_level_metadata(pre: &str) -> HashMap<String, Value> {
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let texts: Vec<String> = alphabet.iter().map(char::to_string).collect();
        let mut tokens: Vec<(&str, i32)> = texts.iter().map(|text| (text.as_str(), 1)).collect();
        tokens.extend([("<|im_end|>", 3), ("<think>", 4), ("[PAD]", 5)]);
        let more = vec![
            ("model", text("gpt2")),
            ("pre", text(pre)),
            ("merges", Value::Array(vec![])),
            ("bos_token_id", Value::U32(256)),
            ("eos_token_id", Value::U32(256)),
        ];
        metadata(&tokens, more)
    }

    pub fn byte_level() -> Tokenizer {
        Tokenizer::from_gguf(&byte_level_metadata("smollm")).unwrap()
    }

    fn error_of(metadata: &HashMap<String, Value>) -> String {
        Tokenizer::from_gguf(metadata).err().expect("it must be refused").to_string()
    }

    #[test]
    fn control_and_user_defined_tokens_are_found_in_the_text() {
        let tokenizer = byte_level();
        assert_eq!(tokenizer.encode("<think><|im_end|>", false).unwrap(), [257, 256]);
        assert_eq!(tokenizer.decode(&[257, 256], true).unwrap(), "<think>");
        assert_eq!(tokenizer.encode("[PAD]", false).unwrap().len(), 5);
    }

    #[test]
    fn bos_and_eos_are_added_as_the_flags_say() {
        let mut metadata = byte_level_metadata("smollm");
        let ids = |metadata: &HashMap<String, Value>, special| {
            Tokenizer::from_gguf(metadata).unwrap().encode("<think>", special).unwrap()
        };
        assert_eq!(ids(&metadata, true), [257]);
        metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(true));
        assert_eq!(ids(&metadata, true), [256, 257]);
        assert_eq!(ids(&metadata, false), [257]);
        metadata.insert("tokenizer.ggml.add_eos_token".into(), Value::Bool(true));
        assert_eq!(ids(&metadata, true), [256, 257, 256]);
        let llama3 = byte_level_metadata("llama-bpe");
        assert_eq!(ids(&llama3, true), [256, 257], "llama 3 begins with BOS unless told otherwise");
    }

    #[test]
    fn damaged_metadata_is_refused_with_the_key() {
        let whole = byte_level_metadata("smollm");
        assert!(error_of(&HashMap::new()).contains("no tokenizer.ggml.model"));
        let mut damaged = whole.clone();
        damaged.insert("tokenizer.ggml.model".into(), text("bert"));
        assert!(error_of(&damaged).contains("of kind 'bert'"));
        let mut damaged = whole.clone();
        damaged.insert("tokenizer.ggml.tokens".into(), Value::Bool(true));
        assert!(error_of(&damaged).contains("tokenizer.ggml.tokens is not a list"));
        let mut damaged = whole.clone();
        damaged.insert("tokenizer.ggml.token_type".into(), Value::Array(vec![Value::I32(1)]));
        assert!(error_of(&damaged).contains("has 1 entries for 259 tokens"));
        let mut damaged = whole.clone();
        damaged.insert("tokenizer.ggml.eos_token_id".into(), Value::U32(999));
        assert!(error_of(&damaged).contains("eos_token has id 999"));
        let mut damaged = whole.clone();
        damaged.insert("tokenizer.ggml.merges".into(), Value::Array(vec![text("ab")]));
        assert!(error_of(&damaged).contains("merge 0 ('ab')"));
        let mut damaged = whole;
        damaged.remove("tokenizer.ggml.merges");
        assert!(error_of(&damaged).contains("no tokenizer.ggml.merges"));
    }

    #[test]
    fn a_token_listed_twice_is_refused() {
        let metadata = metadata(
            &[("a", 1), ("b", 1), ("a", 1)],
            vec![("model", text("gpt2")), ("merges", Value::Array(vec![]))],
        );
        assert!(error_of(&metadata).contains("'a' twice, as id 0 and 2"));
    }

    #[test]
    fn end_of_turn_ids_begin_with_eos() {
        let mut metadata = byte_level_metadata("smollm");
        metadata.insert("tokenizer.ggml.eos_token_id".into(), Value::U32(257));
        metadata.insert("tokenizer.ggml.eot_token_id".into(), Value::U32(3));
        let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
        assert_eq!(tokenizer.end_of_turn_ids(), [257, 3, 256]);
    }

    #[test]
    fn ids_beyond_the_model_are_refused() {
        let mut tokenizer = byte_level();
        let error = tokenizer.check_vocab(100).unwrap_err().to_string();
        assert!(error.contains("only 100 entries"), "{error}");
        assert!(tokenizer.check_vocab(256).is_err(), "EOS is 256");
        assert!(tokenizer.check_vocab(259).is_ok());
    }
}
