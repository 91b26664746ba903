//! From text and messages to token ids with a loss mask.
//!
//! A completion always ends with an end-of-sequence token, and that token is a target: a model that
//! never sees its end never learns to stop.

use serde_json::{Map, Value, json};

use super::example::TokenExample;
use crate::model::{GenerationConfig, ModelSource, TextModel, Tokenizer};
use crate::{Error, Result};

/// Turns rows into tokens for one model.
pub struct Encoder<'a> {
    text: &'a TextModel,
    eos: Vec<u32>,
}

impl<'a> Encoder<'a> {
    /// An encoder whose completions end with one of `eos`.
    ///
    /// # Errors
    /// If `eos` is empty.
    pub fn new(text: &'a TextModel, eos: &[u32]) -> Result<Self> {
        if eos.is_empty() {
            let what = "the model names no end-of-sequence token; add eos_token_id to its";
            return Err(Error::usage(format!("{what} generation_config.json")));
        }
        Ok(Encoder { text, eos: eos.to_vec() })
    }

    /// An encoder for the model that `text` was loaded from, whose completions end as its
    /// generation ends.
    ///
    /// # Errors
    /// If the model names no end-of-sequence token.
    pub fn for_model(text: &'a TextModel, source: &ModelSource) -> Result<Self> {
        Self::new(text, &GenerationConfig::load(source)?.eos_token_ids)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.text.tokenizer
    }

    /// A chat prompt and its answer; only the answer counts unless `whole`.
    ///
    /// The answer's tokens are those that the template writes for it, its end-of-turn token last.
    ///
    /// # Errors
    /// If the model has no chat template or the template refuses the messages.
    pub fn chat(&self, messages: &[Value], answer: &str, whole: bool) -> Result<TokenExample> {
        let template = self.text.template()?;
        let before = template.render(messages, true, &Map::new())?;
        let mut conversation = messages.to_vec();
        conversation.push(json!({"role": "assistant", "content": answer}));
        let after = template.render(&conversation, false, &Map::new())?;
        let written = after.strip_prefix(&before).map(str::trim_end).unwrap_or(answer);
        let prompt = self.tokenizer().encode(&before, false)?;
        let completion = self.ended(self.tokenizer().encode(written, false)?);
        Ok(TokenExample::completion(&prompt, &completion, whole))
    }

    /// A conversation; all of it counts, or with `assistant_only` what the assistant says.
    ///
    /// # Errors
    /// As [`Encoder::chat`]; with `assistant_only` also if the template neither marks the
    /// assistant's text nor renders prefixes of a conversation as prefixes.
    pub fn messages(&self, messages: &[Value], assistant_only: bool) -> Result<TokenExample> {
        let template = self.text.template()?;
        let (text, spans) = match (assistant_only, template.has_generation_tags()) {
            (false, _) => (template.render(messages, false, &Map::new())?, Vec::new()),
            (true, true) => template.render_with_spans(messages, false, &Map::new())?,
            (true, false) => template.assistant_spans_by_prefix(messages, &Map::new())?,
        };
        let (input_ids, inside) = self.tokenizer().encode_with_spans(&text, false, &spans)?;
        let loss_mask = if assistant_only { inside } else { vec![true; input_ids.len()] };
        let prompt_length = loss_mask.iter().position(|counts| *counts).unwrap_or(0);
        Ok(TokenExample { input_ids, loss_mask, prompt_length, row: 0 })
    }

    /// A prompt and a completion as plain text; only the completion counts unless `whole`.
    ///
    /// # Errors
    /// If the text cannot be tokenised.
    pub fn plain(&self, prompt: &str, completion: &str, whole: bool) -> Result<TokenExample> {
        let prompt = self.tokenizer().encode(prompt, true)?;
        let completion = self.ended(self.tokenizer().encode(completion, false)?);
        Ok(TokenExample::completion(&prompt, &completion, whole))
    }

    /// Plain text, all of which counts.
    ///
    /// # Errors
    /// If the text cannot be tokenised.
    pub fn text(&self, text: &str) -> Result<TokenExample> {
        let ids = self.ended(self.tokenizer().encode(text, true)?);
        Ok(TokenExample::completion(&[], &ids, true))
    }

    /// `ids` with an end-of-sequence token behind them, if they do not end with one.
    fn ended(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if !ids.last().is_some_and(|last| self.eos.contains(last)) {
            ids.push(self.eos[0]);
        }
        ids
    }
}

/// Refuses an example that the run cannot hold: longer than `max_length` tokens (0 = the model's
/// context), or without a target.
///
/// # Errors
/// Says what is wrong with it, after its name `what`.
pub fn check_length(
    example: &TokenExample,
    max_length: usize,
    context: usize,
    what: &str,
) -> Result<()> {
    let limit = if max_length == 0 { context } else { max_length.min(context) };
    let len = example.input_ids.len();
    if len > limit {
        let by = if limit == context { "the model's context" } else { "max_length" };
        return Err(Error::failure(format!("{what} has {len} tokens, more than {by} of {limit}")));
    }
    match example.targets() {
        0 => Err(Error::failure(format!("{what} has no token that counts in the loss"))),
        _ => Ok(()),
    }
}
