//! Chat templates: a conversation as the text its model was trained on.
//!
//! Jinja templates as Hugging Face models carry them, rendered by minijinja in an environment that
//! does what `transformers`' `apply_chat_template` does (see `chat_template_env`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::quantized::gguf_file;
use minijinja::Environment;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::chat_template_env::{environment, generation_tags_as_filters, message_of};
use super::tokenizer::Tokenizer;
use super::tokenizer_folder::read_object;
use crate::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A compiled chat template with its model's special tokens.
pub struct ChatTemplate {
    pub(super) env: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    has_generation_tags: bool,
}

impl ChatTemplate {
    /// Compiles a template; `special_tokens` (`bos_token` → `<s>`) are visible to it.
    ///
    /// # Errors
    /// When the template has a syntax error.
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        let (source, has_generation_tags) = generation_tags_as_filters(source);
        let mut env = environment()?;
        env.add_template_owned("chat", source).map_err(|error| {
            Error::failure(format!("the chat template does not compile: {}", message_of(&error)))
        })?;
        Ok(Self { env, special_tokens: special_tokens.clone(), has_generation_tags })
    }

    /// The template of a Hugging Face folder: `chat_template.jinja`, `chat_template.json` or
    /// `chat_template` in `tokenizer_config.json` (a text, or a list with one named `default`).
    ///
    /// # Errors
    /// When there is none, or it does not compile.
    pub fn from_folder(folder: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let file = folder.join("chat_template.jinja");
        if file.exists() {
            return Self::from_file(&file, tokenizer);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let config = read_object(&folder.join(name))?;
            if let Some(value) = config.get("chat_template").filter(|value| !value.is_null()) {
                return Self::new(default_template(value)?, tokenizer.special_tokens());
            }
        }
        Err(no_template(&folder.display().to_string()))
    }

    /// The template in a GGUF file's metadata (`tokenizer.chat_template`).
    ///
    /// # Errors
    /// When there is none, or it does not compile.
    pub fn from_gguf(
        metadata: &HashMap<String, gguf_file::Value>,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        match metadata.get("tokenizer.chat_template") {
            Some(gguf_file::Value::String(source)) => Self::new(source, tokenizer.special_tokens()),
            _ => Err(no_template("the GGUF file")),
        }
    }

    /// A user's own template (`chat_template_path`).
    ///
    /// # Errors
    /// When the file cannot be read, or the template does not compile.
    pub fn from_file(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let source = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::new(&source, tokenizer.special_tokens())
            .map_err(|error| Error::failure(format!("{}: {error}", path.display())))
    }

    /// Whether the template marks assistant text by `{% generation %}`.
    pub fn has_generation_tags(&self) -> bool {
        self.has_generation_tags
    }

    /// The text of a conversation.
    ///
    /// `messages` is a list of [`Message`]s or anything that serializes to a list of objects (a
    /// `serde_json::Value` with `tool_calls`, `reasoning_content`, content parts). `extra` holds
    /// further variables for the template (`tools`, `enable_thinking`); it wins over special
    /// tokens. `tools` and `documents` are none unless given, as in `transformers`.
    ///
    /// # Errors
    /// When the template refuses the conversation (`raise_exception`) or fails.
    pub fn render<M: Serialize + ?Sized>(
        &self,
        messages: &M,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        self.render_list(&message_list(messages)?, add_generation_prompt, extra)
    }

    /// [`ChatTemplate::render`] of messages that are already JSON objects.
    pub(super) fn render_list(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        self.render_in(&self.env, messages, add_generation_prompt, extra)
    }

    /// [`ChatTemplate::render_list`] in a changed copy of this template's environment.
    pub(super) fn render_in(
        &self,
        env: &Environment,
        messages: &[Value],
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let mut context = Map::new();
        for (name, text) in &self.special_tokens {
            context.insert(name.clone(), json!(text));
        }
        context.insert("tools".into(), Value::Null);
        context.insert("documents".into(), Value::Null);
        context.extend(extra.clone());
        context.insert("messages".into(), json!(messages));
        context.insert("add_generation_prompt".into(), json!(add_generation_prompt));
        let context = minijinja::Value::from(minijinja::value::Serde(context));
        let template = env.get_template("chat");
        template.and_then(|template| template.render(context)).map_err(|error| {
            Error::failure(format!("the chat template failed: {}", message_of(&error)))
        })
    }
}

/// The messages as JSON objects, without fields that are null. Reasoning text is visible as
/// `reasoning_content` and `thinking` whatever it is called. Both as in `transformers`.
pub(super) fn message_list<M: Serialize + ?Sized>(messages: &M) -> Result<Vec<Value>> {
    let list = match serde_json::to_value(messages) {
        Ok(Value::Array(list)) => list,
        _ => return Err(Error::failure("the messages of a conversation are not a list")),
    };
    if list.is_empty() {
        return Err(Error::failure("a conversation has no messages; it needs at least one"));
    }
    list.into_iter().enumerate().map(|(at, message)| with_reasoning(at, message)).collect()
}

fn with_reasoning(at: usize, message: Value) -> Result<Value> {
    let Value::Object(mut message) = message else {
        return Err(Error::failure(format!(
            "message {at} of the conversation is not an object with role and content"
        )));
    };
    message.retain(|_, value| !value.is_null());
    const NAMES: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let reasoning = NAMES.iter().find_map(|name| message.get(*name));
    if let Some(reasoning) = reasoning.cloned() {
        message.entry("thinking").or_insert(reasoning.clone());
        message.insert("reasoning_content".into(), reasoning);
    }
    Ok(Value::Object(message))
}

/// The template of a configuration value: the text itself, or the one named `default`.
fn default_template(value: &Value) -> Result<&str> {
    let named = |entry: &Value| entry.get("name").and_then(Value::as_str) == Some("default");
    let found = match value {
        Value::Array(list) => list.iter().find(|entry| named(entry)).map(|e| &e["template"]),
        other => Some(other),
    };
    found.and_then(Value::as_str).ok_or_else(|| {
        Error::failure(
            "tokenizer_config.json has chat templates but none is named 'default'; write the one \
             to use into a file and set chat_template_path",
        )
    })
}

fn no_template(place: &str) -> Error {
    Error::usage(format!(
        "{place} has no chat template; set chat_template_path to a Jinja file with one"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, &BTreeMap::from([("bos_token".into(), "<s>".into())])).unwrap()
    }

    fn hi() -> Vec<Message> {
        vec![Message { role: "user".into(), content: "hi".into() }]
    }

    #[test]
    fn messages_special_tokens_and_extra_variables_reach_the_template() {
        let template = template("{{ bos_token }}{{ messages[0].content }}{{ mood }}{{ tools }}");
        let extra = Map::from_iter([("mood".to_string(), json!("!"))]);
        assert_eq!(template.render(&hi(), false, &extra).unwrap(), "<s>hi!None");
        let extra = Map::from_iter([("bos_token".to_string(), json!("<b>"))]);
        assert_eq!(template.render(&hi(), false, &extra).unwrap(), "<b>hiNone");
    }

    #[test]
    fn null_fields_are_left_out_and_reasoning_has_its_standard_name() {
        let source = "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }};{% endfor %}";
        let messages =
            json!([{"role": "user", "content": null}, {"content": "a", "thinking": "t"}]);
        assert_eq!(template(source).render(&messages, false, &Map::new()).unwrap(), ";at;");
    }

    #[test]
    fn refusals_and_errors_are_one_sentence() {
        let render = |source: &str| {
            template(source).render(&hi(), false, &Map::new()).unwrap_err().to_string()
        };
        let refusal = render("{{ raise_exception('roles must alternate') }}");
        assert!(refusal.ends_with("it refused the conversation: roles must alternate"));
        assert!(render("a\n{{ messages[3].role }}").ends_with("(line 2)"));
        let error = ChatTemplate::new("{% if %}", &BTreeMap::new()).err().unwrap().to_string();
        assert!(error.starts_with("the chat template does not compile: "), "{error}");
    }

    #[test]
    fn what_is_no_conversation_is_refused() {
        let template = template("x");
        for messages in [json!({"role": "user"}), json!([]), json!(["hi"])] {
            assert!(template.render(&messages, false, &Map::new()).is_err(), "{messages}");
        }
    }

    #[test]
    fn the_template_named_default_is_taken() {
        let list = json!([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]);
        assert_eq!(default_template(&list).unwrap(), "d");
        assert_eq!(default_template(&json!("t")).unwrap(), "t");
        assert!(default_template(&json!([{"name": "rag", "template": "r"}])).is_err());
    }

    #[test]
    fn a_model_without_template_says_what_to_do() {
        let tokenizer = super::super::tokenizer_gguf::tests::byte_level();
        let error = ChatTemplate::from_gguf(&HashMap::new(), &tokenizer).err().unwrap();
        assert!(error.to_string().contains("set chat_template_path"), "{error}");
    }

    #[test]
    fn the_jinja_file_of_a_folder_wins_over_its_configuration() {
        let tokenizer = super::super::tokenizer_gguf::tests::byte_level();
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
        write("tokenizer_config.json", r#"{"chat_template": "config"}"#).unwrap();
        let render = || {
            let template = ChatTemplate::from_folder(folder.path(), &tokenizer).unwrap();
            template.render(&hi(), false, &Map::new()).unwrap()
        };
        assert_eq!(render(), "config");
        write("chat_template.jinja", "file").unwrap();
        assert_eq!(render(), "file");
    }
}
