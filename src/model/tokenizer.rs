//! Text to token ids and back, from a Hugging Face folder or from a GGUF file's metadata.
//!
//! The work is done by the `tokenizers` crate; this module builds its pipeline, names the special
//! tokens, and checks that tokenizer and model belong together. Truncation and padding settings of
//! a `tokenizer.json` are ignored: nothing here shortens or pads a text unasked.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;

pub use super::tokenizer_stream::DecodeStream;
use crate::{Error, Result};

/// A token with a role: its text and its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// The token as it is written in a text.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// A tokenizer with its special tokens.
///
/// Ids equal those of `transformers` for the same `tokenizer.json`. Texts of special tokens inside
/// the input (`<|im_end|>`) become those tokens, as in `transformers`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: BTreeMap<String, String>,
    end_of_turn: Vec<u32>,
    model_vocab_size: Option<usize>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and (if any) `special_tokens_map.json`.
    ///
    /// As in `transformers`, `add_bos_token` / `add_eos_token` of the configuration win over the
    /// post-processor of `tokenizer.json`.
    ///
    /// # Errors
    /// When a file is missing or damaged, or a special token is not in the vocabulary.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        super::tokenizer_folder::load(folder)
    }

    /// Builds the tokenizer that a GGUF file describes in its `tokenizer.ggml.*` metadata.
    ///
    /// Serves `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE with scores).
    ///
    /// # Errors
    /// When a key is missing or has the wrong type, or the tokenizer's kind is not known.
    pub fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Self> {
        super::tokenizer_gguf::load(metadata)
    }

    /// Joins a built pipeline with its named special tokens (`bos_token`, `eos_token`, ...).
    ///
    /// # Errors
    /// When BOS or EOS is not in the vocabulary.
    pub(super) fn new(
        mut inner: tokenizers::Tokenizer,
        special: BTreeMap<String, String>,
    ) -> Result<Self> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| broken("tokenizer", error))?;
        for name in ["bos_token", "eos_token"] {
            if let Some(text) = special.get(name)
                && inner.token_to_id(text).is_none()
            {
                return Err(Error::failure(format!(
                    "the tokenizer's {name} '{text}' is not in its vocabulary; \
                     correct tokenizer_config.json"
                )));
            }
        }
        Ok(Self { inner, special, end_of_turn: Vec::new(), model_vocab_size: None })
    }

    /// Remembers further ids that end a turn (see [`Tokenizer::end_of_turn_ids`]).
    pub(super) fn with_end_of_turn(mut self, ids: Vec<u32>) -> Self {
        self.end_of_turn = ids;
        self
    }

    /// Token ids of a text; `add_special_tokens` adds BOS / EOS where the tokenizer is set to.
    ///
    /// A text that a chat template rendered already holds its special tokens: pass `false`.
    ///
    /// # Errors
    /// When the text holds a token that the model does not have (see [`Tokenizer::check_vocab`]).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| broken("text", error))?;
        self.within_model(encoding.get_ids())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids, and for each whether it overlaps one of `spans` (byte ranges of `text`).
    ///
    /// Gives the loss mask of assistant messages. Tokens added by `add_special_tokens` are outside
    /// every span.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_spans(
        &self,
        text: &str,
        add_special_tokens: bool,
        spans: &[Range<usize>],
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let encoding =
            self.inner.encode(text, add_special_tokens).map_err(|error| broken("text", error))?;
        self.within_model(encoding.get_ids())?;
        let overlaps = |&(start, end): &(usize, usize)| {
            spans.iter().any(|span| start < span.end && span.start < end)
        };
        let mask = encoding.get_offsets().iter().map(overlaps).collect();
        Ok((encoding.get_ids().to_vec(), mask))
    }

    /// Text of token ids. Ids outside the vocabulary give no text, as in `transformers`; bytes
    /// that are not UTF-8 give U+FFFD.
    ///
    /// # Errors
    /// When the decoder of the pipeline fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| broken("token ids", error))
    }

    /// Decodes token by token, giving out whole characters only.
    pub fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special_tokens)
    }

    /// One more than the largest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        let vocab = self.inner.get_vocab(true);
        vocab.values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The id of a token, written as it is in the vocabulary (`Ġthe`, `▁the`, `<|im_end|>`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, written as it is in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that begins a text, if the tokenizer names one.
    pub fn bos_token(&self) -> Option<SpecialToken> {
        self.special_token("bos_token")
    }

    /// The token that ends a text or a turn, if the tokenizer names one.
    pub fn eos_token(&self) -> Option<SpecialToken> {
        self.special_token("eos_token")
    }

    /// The token for padding, if the tokenizer names one. Nothing here pads; other tools do.
    pub fn pad_token(&self) -> Option<SpecialToken> {
        self.special_token("pad_token")
    }

    /// Names and texts of the special tokens (`bos_token` → `<s>`), as chat templates see them.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// Ids after which generation stops: EOS and, from a GGUF file, its end-of-turn tokens.
    ///
    /// A Hugging Face folder states them in `generation_config.json` instead.
    pub fn end_of_turn_ids(&self) -> Vec<u32> {
        let eos = self.eos_token().map(|token| token.id);
        let others = self.end_of_turn.iter().copied().filter(|id| Some(*id) != eos);
        eos.into_iter().chain(others).collect()
    }

    /// Checks that every token has a row in a model with `model_vocab_size` rows.
    ///
    /// Added tokens beyond the model are tolerated, since real checkpoints have them (Gemma 3's
    /// `<image_soft_token>` in text-only models), but then [`Tokenizer::encode`] refuses a text
    /// that holds one.
    ///
    /// # Errors
    /// When a learnt token, BOS or EOS lies beyond the model: the two do not belong together.
    pub fn check_vocab(&mut self, model_vocab_size: usize) -> Result<()> {
        let learnt = self.inner.get_vocab(false);
        let added = self.inner.get_added_tokens_decoder();
        let largest = learnt.values().filter(|id| !added.contains_key(id)).max().copied();
        let named = [self.bos_token(), self.eos_token()].into_iter().flatten().map(|t| t.id);
        if let Some(id) = largest.into_iter().chain(named).max()
            && id as usize >= model_vocab_size
        {
            return Err(Error::usage(format!(
                "the tokenizer has token id {id} but the model's vocabulary has only \
                 {model_vocab_size} entries; use the tokenizer that belongs to this model"
            )));
        }
        self.model_vocab_size = Some(model_vocab_size);
        Ok(())
    }

    fn special_token(&self, name: &str) -> Option<SpecialToken> {
        let text = self.special.get(name)?;
        let id = self.inner.token_to_id(text)?;
        Some(SpecialToken { text: text.clone(), id })
    }

    fn within_model(&self, ids: &[u32]) -> Result<()> {
        let Some(size) = self.model_vocab_size else { return Ok(()) };
        match ids.iter().find(|id| **id as usize >= size) {
            None => Ok(()),
            Some(&id) => Err(Error::failure(format!(
                "the text holds the token '{}' (id {id}), which the model's vocabulary of {size} \
                 entries does not have; remove it from the text",
                self.id_to_token(id).unwrap_or_default()
            ))),
        }
    }
}

/// An error of the `tokenizers` crate about `what`, as one sentence.
pub(super) fn broken(what: &str, error: tokenizers::Error) -> Error {
    Error::failure(format!("the tokenizer failed on the {what}: {error}"))
}
