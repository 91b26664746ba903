//! From text and messages to token ids with a loss mask.
//!
//! A completion ends with an end-of-sequence token unless it is cut, and that token is a target: a model that
//! never sees its end never learns to stop.

use serde_json::{Map, Value, json};

use super::example::TokenExample;
use crate::config::TruncationMode;
use crate::model::{ChatTemplate, TextModel, Tokenizer};
use crate::{Error, Result};

/// Turns rows into tokens for one model.
pub struct Encoder<'a> {
    text: &'a TextModel,
    end: u32,
}

impl<'a> Encoder<'a> {
    /// An encoder for the model that `text` was loaded from.
    ///
    /// # Errors
    /// If the model names no end-of-sequence token.
    pub fn new(text: &'a TextModel) -> Result<Self> {
        let missing = "the model names no end-of-sequence token; add eos_token to its \
                       tokenizer_config.json";
        let end = text.end_token_id().ok_or_else(|| Error::usage(missing))?;
        Ok(Encoder { text, end })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.text.tokenizer
    }

    fn template(&self) -> Result<&ChatTemplate> {
        let otherwise = "or use data in prompt and completion columns";
        self.text.template().map_err(|error| Error::usage(format!("{error}, {otherwise}")))
    }

    /// A chat prompt and its answer; only the answer counts unless `whole`.
    ///
    /// The answer's tokens are those that the template writes for it, its end-of-turn token last.
    ///
    /// # Errors
    /// If the model has no chat template, or the template refuses the messages or writes the prompt
    /// otherwise than at the beginning of the whole conversation.
    pub fn chat(&self, messages: &[Value], answer: &str, whole: bool) -> Result<TokenExample> {
        let template = self.template()?;
        let before = template.render(messages, true, &Map::new())?;
        let mut conversation = messages.to_vec();
        conversation.push(json!({"role": "assistant", "content": answer}));
        let after = template.render(&conversation, false, &Map::new())?;
        let written = after.strip_prefix(&before).ok_or_else(|| {
            Error::usage(
                "the chat template does not begin a conversation with the prompt that it gives for \
                 an answer (it may open a <think> there), so the answer cannot be told from the \
                 prompt; give a template without that as chat_template_path",
            )
        })?;
        self.joined(&before, written.trim_end(), false, whole)
    }

    /// A conversation; all of it counts, or with `assistant_only` what the assistant says.
    ///
    /// # Errors
    /// As [`Encoder::chat`]; with `assistant_only` also if the template neither marks the
    /// assistant's text nor renders prefixes of a conversation as prefixes.
    pub fn messages(&self, messages: &[Value], assistant_only: bool) -> Result<TokenExample> {
        let template = self.template()?;
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
        self.joined(prompt, completion, true, whole)
    }

    /// Plain text, all of which counts.
    ///
    /// # Errors
    /// If the text cannot be tokenised.
    pub fn text(&self, text: &str) -> Result<TokenExample> {
        let ids = self.ended(self.tokenizer().encode(text, true)?);
        Ok(TokenExample::completion(&[], &ids, true))
    }

    /// Prompt and completion, tokenised as one text.
    ///
    /// The prompt's tokens are those that it has alone where the whole begins with them, as it does
    /// when an answer is generated. Else a token that reaches over the boundary belongs to the
    /// completion; TRL warns of such rows, and trains on the tokens of the whole too.
    fn joined(
        &self,
        prompt: &str,
        completion: &str,
        add_special_tokens: bool,
        whole: bool,
    ) -> Result<TokenExample> {
        let text = format!("{prompt}{completion}");
        let tokenizer = self.tokenizer();
        let ids = tokenizer.encode(&text, add_special_tokens)?;
        let alone = tokenizer.encode(prompt, add_special_tokens)?;
        let boundary = if ids.starts_with(&alone) {
            alone.len()
        } else {
            let span = prompt.len()..text.len();
            let spans = std::slice::from_ref(&span);
            let (_, inside) = tokenizer.encode_with_spans(&text, add_special_tokens, spans)?;
            inside.iter().position(|inside| *inside).unwrap_or(ids.len())
        };
        let (prompt, completion) = ids.split_at(boundary);
        Ok(TokenExample::completion(prompt, &self.ended(completion.to_vec()), whole))
    }

    /// `ids` with an end-of-sequence token behind them, if they do not end with one.
    fn ended(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if !ids.last().is_some_and(|last| self.text.stop_token_ids.contains(last)) {
            ids.push(self.end);
        }
        ids
    }
}

/// How many tokens a run holds of a row.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// `max_length`; 0 = the model's context.
    pub max_length: usize,
    /// The model's context.
    pub context: usize,
    /// What becomes of a longer row.
    pub mode: TruncationMode,
}

impl Limit {
    /// The most tokens.
    pub fn tokens(&self) -> usize {
        if self.max_length == 0 { self.context } else { self.max_length.min(self.context) }
    }

    /// The example as the run holds it; `None` if it was cut and no token is left that counts.
    ///
    /// # Errors
    /// If it is too long and is not to be cut, or has no target: after its name `what`.
    pub fn fit(&self, example: TokenExample, what: &str) -> Result<Option<TokenExample>> {
        let (limit, len) = (self.tokens(), example.input_ids.len());
        if example.targets() == 0 {
            return Err(Error::failure(format!("{what} has no token that counts in the loss")));
        }
        if len <= limit {
            return Ok(Some(example));
        }
        if self.mode == TruncationMode::KeepStart {
            return Ok(Some(example.cut(limit)).filter(|example| example.targets() > 0));
        }
        let (by, remedy) = match limit == self.context {
            true => ("the model's context", "shorten or remove it"),
            false => ("max_length", "raise max_length, or set it to 0 for the model's context"),
        };
        Err(Error::failure(format!(
            "{what} has {len} tokens, more than {by} of {limit}: {remedy}, or cut such rows with \
             truncation_mode = \"keep_start\""
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_rows_are_refused_or_lose_their_end_and_those_without_a_target_are_left_out() {
        let example = || TokenExample::completion(&[1, 2, 3], &[4, 5, 6], false);
        let fit = |max_length: usize, mode: TruncationMode| {
            Limit { max_length, context: 6, mode }.fit(example(), "row 7")
        };
        for mode in [TruncationMode::Refuse, TruncationMode::KeepStart] {
            assert_eq!(fit(0, mode).unwrap(), Some(example()));
            assert_eq!(fit(6, mode).unwrap(), Some(example()));
        }
        let cut = fit(4, TruncationMode::KeepStart).unwrap().unwrap();
        assert_eq!(
            (&cut.input_ids[..], cut.targets(), cut.prompt_length),
            (&[1, 2, 3, 4][..], 1, 3)
        );
        assert_eq!(fit(3, TruncationMode::KeepStart).unwrap(), None);
        assert_eq!(fit(2, TruncationMode::KeepStart).unwrap(), None);
        let limit = Limit { max_length: 2, context: 6, mode: TruncationMode::KeepStart };
        let none = TokenExample::completion(&[1, 2, 3], &[], false);
        let error = limit.fit(none, "row 8").unwrap_err().to_string();
        assert_eq!(error, "row 8 has no token that counts in the loss");
        let error = fit(4, TruncationMode::Refuse).unwrap_err().to_string();
        assert!(error.starts_with("row 7 has 6 tokens, more than max_length of 4: "), "{error}");
        assert!(error.ends_with("truncation_mode = \"keep_start\""), "{error}");
    }
}
