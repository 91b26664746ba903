//! Where the assistant speaks in a rendered conversation: byte ranges of its text.
//!
//! Two ways: the template marks the places by `{% generation %}`, or they are found by rendering
//! prefixes of the conversation.

use std::ops::Range;

use minijinja::Value as Jinja;
use serde::Serialize;
use serde_json::{Map, Value};

use super::chat_template::{ChatTemplate, message_list};
use super::chat_template_env::GENERATION;
use crate::{Error, Result};

impl ChatTemplate {
    /// The text of a conversation and the byte ranges inside its `{% generation %}` tags.
    ///
    /// # Errors
    /// When the template has no such tags, changes their text afterwards, or as
    /// [`ChatTemplate::render`].
    pub fn render_with_spans<M: Serialize + ?Sized>(
        &self,
        messages: &M,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        if !self.has_generation_tags() {
            return Err(Error::usage(
                "the chat template has no {% generation %} tags; add them around the assistant's \
                 text in a copy of it and set chat_template_path",
            ));
        }
        let messages = message_list(messages)?;
        let text = self.render_list(&messages, add_generation_prompt, extra)?;
        let [open, close] = unused_marks(&text);
        let mut env = self.env.clone();
        env.add_filter(GENERATION, move |text: Jinja| format!("{open}{text}{close}"));
        let marked = self.render_in(&env, &messages, add_generation_prompt, extra)?;
        let (plain, spans) = take_marks(&marked, open, close)?;
        if plain != text {
            return Err(Error::failure(
                "the chat template changes the text of its {% generation %} tags after they end, \
                 so the assistant's text cannot be located; let the tags write directly",
            ));
        }
        Ok((text, spans))
    }

    /// The text of a conversation and the byte range of each assistant message, found by rendering
    /// up to the message (with the generation prompt) and up to its end.
    ///
    /// A range begins after the generation prompt and holds everything the template writes for the
    /// message: its text, the end-of-turn token, and what follows before the next message.
    ///
    /// # Errors
    /// When the template renders a prefix of the conversation otherwise than within the whole.
    pub fn assistant_spans_by_prefix<M: Serialize + ?Sized>(
        &self,
        messages: &M,
        extra: &Map<String, Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let messages = message_list(messages)?;
        let whole = self.render_list(&messages, false, extra)?;
        let mut spans = Vec::new();
        for (at, message) in messages.iter().enumerate() {
            let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
            if role != "assistant" {
                continue;
            }
            let before = self.render_list(&messages[..at], true, extra)?;
            let through = self.render_list(&messages[..=at], false, extra)?;
            if !through.starts_with(&before) || !whole.starts_with(&through) {
                return Err(no_prefix(at, "depends on the messages that follow"));
            }
            let plain = self.render_list(&messages[..at], false, extra)?;
            if plain == before && common_ending(&before, &through).contains(role) {
                return Err(no_prefix(at, "ends with an opened turn of the assistant"));
            }
            spans.push(before.len()..through.len());
        }
        Ok((whole, spans))
    }
}

/// Two characters of the private use area that the text does not hold.
fn unused_marks(text: &str) -> [char; 2] {
    let mut free = ('\u{e000}'..='\u{f8ff}').filter(|c| !text.contains(*c));
    [free.next().unwrap_or('\u{f0000}'), free.next().unwrap_or('\u{f0001}')]
}

/// The text without the marks, and the byte ranges that they enclosed.
fn take_marks(marked: &str, open: char, close: char) -> Result<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let mut start = None;
    for c in marked.chars() {
        match start {
            None if c == open => start = Some(text.len()),
            Some(at) if c == close => {
                spans.push(at..text.len());
                start = None;
            }
            _ if c == open || c == close => {
                return Err(Error::failure(
                    "the chat template has {% generation %} tags within each other; \
                     keep the outer ones only",
                ));
            }
            _ => text.push(c),
        }
    }
    Ok((text, spans))
}

/// The longest text that both end with.
fn common_ending<'a>(a: &str, b: &'a str) -> &'a str {
    let same = a.chars().rev().zip(b.chars().rev()).take_while(|(x, y)| x == y);
    let length: usize = same.map(|(c, _)| c.len_utf8()).sum();
    &b[b.len() - length..]
}

fn no_prefix(at: usize, what: &str) -> Error {
    Error::usage(format!(
        "the chat template does not render prefixes of a conversation: its text up to message \
         {at} {what}, so the assistant's text cannot be located; use a template with \
         {{% generation %}} tags (chat_template_path), or prompt and completion columns"
    ))
}
