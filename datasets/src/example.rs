//! A training example, recognised by its row's columns.

use serde_json::{Value, json};

use crate::rows::{columns, kind};
use crate::{Error, Result, Row};

/// What is trained on, before tokenisation. Messages stay JSON, so that tool calls and other fields
/// reach the chat template.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// Plain text.
    Text(String),
    /// A conversation.
    Messages(Vec<Value>),
    /// Plain text that goes on as plain text.
    PromptCompletion {
        /// What is given.
        prompt: String,
        /// What is to be said.
        completion: String,
    },
    /// A conversation and the assistant's answer.
    Chat {
        /// The messages up to the answer.
        prompt: Vec<Value>,
        /// The text of the answer.
        completion: String,
    },
}

const WANTED: &str = "wanted text, or messages, or prompt and completion \
                      (rename with columns, or make them with prompt_template)";

const TEXT_OR_MESSAGES: &str = "text or a list of messages";

impl Example {
    /// Recognises the columns `text` | `messages` | `prompt` + `completion`; others are ignored,
    /// and so is a column that is null.
    ///
    /// `prompt` and `completion` are text or messages. A completion of messages is one message of
    /// the assistant; it makes a conversation of a prompt that is text.
    ///
    /// # Errors
    /// If columns are missing or ambiguous (lists the row's columns) or of another type, a message
    /// has neither content nor tool calls, or the completion is empty.
    pub fn from_row(row: &Row) -> Result<Self> {
        let column = |name: &str| row.get(name).filter(|value| !value.is_null());
        let (text, messages) = (column("text"), column("messages"));
        match (text, messages, column("prompt"), column("completion")) {
            (Some(Value::String(text)), None, None, None) => Ok(Example::Text(text.clone())),
            (Some(other), None, None, None) => Err(wrong("text", "text", other)),
            (None, Some(list), None, None) => {
                Ok(Example::Messages(conversation("messages", list)?))
            }
            (None, None, Some(prompt), Some(completion)) => pair(prompt, completion),
            (None, None, Some(_), None) => Err(refused("prompt without completion", row)),
            (None, None, None, Some(_)) => Err(refused("completion without prompt", row)),
            (None, None, None, None) => Err(refused("nothing to train on", row)),
            _ => Err(refused("ambiguous columns", row)),
        }
    }
}

/// A message of a conversation as JSON.
pub(crate) fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// The text of a completion: text itself, or the content of one message of the assistant.
pub(crate) fn completion_text(value: &Value) -> Result<String> {
    let list = match value {
        Value::String(text) => return filled(text.clone()),
        Value::Array(_) => conversation("completion", value)?,
        other => return Err(wrong("completion", TEXT_OR_MESSAGES, other)),
    };
    match list.as_slice() {
        [only] if only["role"] == "assistant" => match &only["content"] {
            Value::String(content) => filled(content.clone()),
            other => Err(wrong("content of the completion", "text", other)),
        },
        _ => Err(Error::usage("a completion of messages is one message of the role assistant")),
    }
}

/// A completion that has something to learn from.
pub(crate) fn filled(completion: String) -> Result<String> {
    match completion.is_empty() {
        true => Err(Error::usage("the completion is empty; give it text or remove the row")),
        false => Ok(completion),
    }
}

fn pair(prompt: &Value, completion: &Value) -> Result<Example> {
    let answer = completion_text(completion)?;
    Ok(match prompt {
        Value::String(text) if completion.is_string() => {
            Example::PromptCompletion { prompt: text.clone(), completion: answer }
        }
        Value::String(text) => {
            Example::Chat { prompt: vec![message("user", text)], completion: answer }
        }
        Value::Array(_) => {
            Example::Chat { prompt: conversation("prompt", prompt)?, completion: answer }
        }
        other => return Err(wrong("prompt", TEXT_OR_MESSAGES, other)),
    })
}

/// A list of messages, each an object with a role and either content or tool calls.
pub(crate) fn conversation(name: &str, value: &Value) -> Result<Vec<Value>> {
    let Value::Array(list) = value else {
        return Err(wrong(name, "a list of messages", value));
    };
    if list.is_empty() {
        return Err(Error::usage(format!("column {name} is a list without messages")));
    }
    for (i, message) in list.iter().enumerate() {
        if let Some(lacking) = lacks(message) {
            let number = i + 1;
            return Err(Error::usage(format!(
                "message {number} of column {name} has {lacking}; a message is {{\"role\": \
                 \"user\", \"content\": \"...\"}}"
            )));
        }
    }
    Ok(list.clone())
}

/// What a message has not, if it is none.
fn lacks(message: &Value) -> Option<&'static str> {
    let calls = message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    match (message["role"].is_string(), message["content"].is_null() && !calls) {
        (false, _) => Some("no role"),
        (true, true) => Some("neither content nor tool_calls"),
        (true, false) => None,
    }
}

fn wrong(name: &str, wanted: &str, value: &Value) -> Error {
    Error::usage(format!("column {name} is {}, wanted {wanted}", kind(value)))
}

fn refused(what: &str, row: &Row) -> Error {
    Error::usage(format!("{what}; the row has {}; {WANTED}", columns(row)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::row;

    fn user(content: &str) -> Value {
        message("user", content)
    }

    #[test]
    fn each_form_is_recognised_by_its_columns() {
        let calls = json!({"role": "assistant", "tool_calls": [{"name": "f"}]});
        let answer = json!([{"role": "assistant", "content": "b"}]);
        let chat = |prompt: Value| Example::Chat { prompt: vec![prompt], completion: "b".into() };
        for (columns, wanted) in [
            (json!({"text": "a", "other": 1}), Example::Text("a".into())),
            (
                json!({"messages": [user("a"), calls], "prompt": null}),
                Example::Messages(vec![user("a"), calls.clone()]),
            ),
            (
                json!({"prompt": "a", "completion": "b"}),
                Example::PromptCompletion { prompt: "a".into(), completion: "b".into() },
            ),
            (json!({"prompt": [user("a")], "completion": "b"}), chat(user("a"))),
            (json!({"prompt": [user("a")], "completion": answer}), chat(user("a"))),
            (json!({"prompt": "a", "completion": answer}), chat(user("a"))),
        ] {
            assert_eq!(Example::from_row(&row(columns)).unwrap(), wanted);
        }
    }

    #[test]
    fn empty_completions_and_messages_without_content_are_refused() {
        let silent = json!([user("a"), {"role": "assistant", "content": null, "tool_calls": []}]);
        let empty = json!([message("assistant", "")]);
        for (columns, wanted) in [
            (json!({"prompt": "a", "completion": ""}), "the completion is empty; give it text"),
            (json!({"prompt": [user("a")], "completion": empty}), "the completion is empty"),
            (
                json!({"messages": silent}),
                "message 2 of column messages has neither content nor tool_calls",
            ),
            (
                json!({"prompt": [{"role": "user"}], "completion": "a"}),
                "message 1 of column prompt has neither content nor tool_calls",
            ),
        ] {
            let error = Example::from_row(&row(columns)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(wanted), "{error}");
        }
        let silent_system = json!({"messages": [message("system", ""), user("a")]});
        assert!(Example::from_row(&row(silent_system)).is_ok());
    }

    #[test]
    fn other_columns_are_refused_with_what_is_there_and_what_is_wanted() {
        let two = json!([{"role": "assistant", "content": "a"}, user("b")]);
        for (columns, wanted) in [
            (json!({"question": "a", "answer": "b"}), "the row has question, answer; wanted text"),
            (json!({}), "the row has no columns"),
            (json!({"text": "a", "messages": [user("b")]}), "ambiguous columns"),
            (json!({"prompt": "a"}), "prompt without completion"),
            (json!({"completion": "a"}), "completion without prompt"),
            (json!({"text": 3}), "column text is a number, wanted text"),
            (json!({"messages": "a"}), "column messages is text, wanted a list of messages"),
            (json!({"prompt": 3, "completion": "a"}), "prompt is a number, wanted text or a list"),
            (json!({"prompt": "a", "completion": {}}), "is an object, wanted text or a list of"),
            (json!({"messages": []}), "list without messages"),
            (json!({"messages": [user("a"), "b"]}), "message 2 of column messages has no role"),
            (json!({"prompt": "a", "completion": two}), "one message of the role assistant"),
        ] {
            let error = Example::from_row(&row(columns)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }
}
