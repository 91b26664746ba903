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
            if at == 0 {
                return Err(no_prefix(at, "is empty before the assistant speaks"));
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    const CHATML: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, &BTreeMap::new()).unwrap()
    }

    fn talk() -> Value {
        json!([{"role": "user", "content": "ü"}, {"role": "assistant", "content": "\u{e000}a"},
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "<b>"}])
    }

    fn by_prefix(source: &str) -> Result<Vec<String>> {
        let (text, spans) = template(source).assistant_spans_by_prefix(&talk(), &Map::new())?;
        Ok(spans.into_iter().map(|span| text[span].to_string()).collect())
    }

    #[test]
    fn generation_tags_give_byte_ranges_and_leave_the_text_alone() {
        let source = "{% for m in messages %}{% if m.role == 'assistant' %}\
            {%- generation -%}  {{ m.content }}.{% endgeneration %}\n\
            {% else %}{{ m.content }}{% endif %}{% endfor %}";
        let template = template(source);
        let (text, spans) = template.render_with_spans(&talk(), false, &Map::new()).unwrap();
        assert_eq!(text, template.render(&talk(), false, &Map::new()).unwrap());
        assert_eq!(text, "ü\u{e000}a.q<b>.");
        assert_eq!(
            spans.iter().map(|s| &text[s.clone()]).collect::<Vec<_>>(),
            ["\u{e000}a.", "<b>."]
        );
    }

    #[test]
    fn tags_whose_text_is_changed_later_are_refused() {
        let source = "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}";
        let error = template(source).render_with_spans(&talk(), false, &Map::new()).unwrap_err();
        assert!(error.to_string().contains("changes the text"), "{error}");
        let error = template(CHATML).render_with_spans(&talk(), false, &Map::new()).unwrap_err();
        assert!(error.to_string().contains("no {% generation %} tags"), "{error}");
    }

    #[test]
    fn prefixes_give_each_assistant_message_with_its_end_of_turn() {
        assert_eq!(by_prefix(CHATML).unwrap(), ["\u{e000}a</>\n", "<b></>\n"]);
        let without_prompt = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]\
            {% else %}{{ m.content }}</s>{% endif %}{% endfor %}";
        assert_eq!(by_prefix(without_prompt).unwrap(), ["\u{e000}a</s>", "<b></s>"]);
    }

    #[test]
    fn templates_that_do_not_render_prefixes_are_refused() {
        let last_only = "{% for m in messages %}{{ m.role }}{% if loop.last %}!{% endif %}\
            {{ m.content }}{% endfor %}";
        assert!(by_prefix(last_only).unwrap_err().to_string().contains("up to message 1"));
        let first = json!([{"role": "assistant", "content": "a"}]);
        assert!(template(CHATML).assistant_spans_by_prefix(&first, &Map::new()).is_err());
    }

    #[test]
    fn a_template_that_always_opens_the_next_turn_is_refused() {
        let always =
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>";
        let talk = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        let error = template(always).assistant_spans_by_prefix(&talk, &Map::new()).unwrap_err();
        assert!(error.to_string().contains("message 1"), "{error}");
    }
}
