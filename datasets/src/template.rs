//! Rows of any columns as examples, without a line of Rust.

use std::collections::BTreeMap;

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, escape_formatter};
use serde_json::Value;

use crate::example::{completion_text, conversation, filled, message};
use crate::rows::columns;
use crate::{Error, Example, Prompt, PromptRow, Result, Row};

/// How a row of a user's own data becomes an example.
///
/// Templates are Jinja over the row's columns as they are called after renaming; a column that the
/// row lacks is an error, and so is a null that would be written out; `{% if column %}` and
/// `{{ column or "" }}` pass over nulls.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Template {
    /// Makes the user's message; without it the row's own columns are taken.
    pub prompt_template: Option<String>,
    /// Makes the completion in place of the column `completion`.
    pub completion_template: Option<String>,
    /// The system message, unless the row's conversation has its own.
    pub system_prompt: Option<String>,
    /// Renamed columns: the name here and the name in the file.
    pub columns: BTreeMap<String, String>,
}

impl Template {
    /// The example of a row: columns are renamed, templates filled, and what results is recognised
    /// as [`Example::from_row`] does; with a `prompt_template` it is always an [`Example::Chat`].
    ///
    /// # Errors
    /// If a column is missing (the row's are listed), a template is not Jinja, or the completion is
    /// missing or empty.
    pub fn apply(&self, row: &Row) -> Result<Example> {
        let row = self.renamed(row)?;
        let system = self.system_prompt.as_deref();
        let system = system.map(|text| render("system_prompt", text, &row)).transpose()?;
        let example = match &self.prompt_template {
            Some(template) => {
                let prompt = vec![message("user", &render("prompt_template", template, &row)?)];
                Example::Chat { prompt, completion: self.completion(&row)? }
            }
            None => Example::from_row(&self.completed(row)?)?,
        };
        match system {
            Some(system) => with_system(example, &system),
            None => Ok(example),
        }
    }

    /// The row as something to sample completions for: a `prompt` of text or messages, `messages` that
    /// end with the user's (an answer of the assistant behind it becomes the column `completion`), or
    /// what the `prompt_template` makes, which is a conversation. Every further column is kept.
    ///
    /// # Errors
    /// If the row has no prompt (its columns are listed), or a template is not Jinja.
    pub fn prompt_row(&self, id: u64, row: &Row) -> Result<PromptRow> {
        let mut columns = self.renamed(row)?;
        let system = self.system_prompt.as_deref();
        let system = system.map(|text| render("system_prompt", text, &columns)).transpose()?;
        let prompt = match &self.prompt_template {
            Some(template) => {
                let text = render("prompt_template", template, &columns)?;
                Prompt::Messages(vec![message("user", &text)])
            }
            None => given_prompt(&mut columns)?,
        };
        let prompt = match (prompt, system) {
            (prompt, None) => prompt,
            (Prompt::Messages(messages), Some(system)) => {
                Prompt::Messages(with_system_message(messages, &system))
            }
            (Prompt::Text(_), Some(_)) => return Err(plain_text()),
        };
        Ok(PromptRow { id, prompt, columns })
    }

    /// The row with its new column names, those that did not change in their old order.
    fn renamed(&self, row: &Row) -> Result<Row> {
        let mut renamed = row.clone();
        renamed.retain(|name, _| !self.columns.values().any(|old| old == name));
        for (new, old) in &self.columns {
            let Some(value) = row.get(old) else {
                return Err(Error::usage(format!(
                    "columns: no column {old} to call {new}; the row has {}",
                    columns(row)
                )));
            };
            renamed.insert(new.clone(), value.clone());
        }
        Ok(renamed)
    }

    fn completion(&self, row: &Row) -> Result<String> {
        if let Some(template) = &self.completion_template {
            return filled(render("completion_template", template, row)?);
        }
        match row.get("completion").filter(|value| !value.is_null()) {
            Some(value) => completion_text(value),
            None => Err(Error::usage(format!(
                "prompt_template has no completion to go with it: set completion_template, or name \
                 the column with columns completion=...; the row has {}",
                columns(row)
            ))),
        }
    }

    /// The row with the completion that its template makes.
    fn completed(&self, mut row: Row) -> Result<Row> {
        if self.completion_template.is_some() {
            let completion = self.completion(&row)?;
            row.insert("completion".to_string(), Value::String(completion));
        }
        Ok(row)
    }
}

/// Takes the prompt out of a row's columns.
fn given_prompt(row: &mut Row) -> Result<Prompt> {
    let taken = |row: &mut Row, name: &str| {
        row.get(name)
            .is_some_and(|value| !value.is_null())
            .then(|| row.shift_remove(name))
            .flatten()
    };
    match (taken(row, "prompt"), taken(row, "messages")) {
        (Some(Value::String(text)), None) => Ok(Prompt::Text(text)),
        (Some(list), None) => Ok(Prompt::Messages(conversation("prompt", &list)?)),
        (None, Some(list)) => {
            let mut messages = conversation("messages", &list)?;
            if messages.len() > 1 && messages.last().is_some_and(|m| m["role"] == "assistant") {
                let answer = messages.pop().map(|mut message| message["content"].take());
                row.entry("completion").or_insert(answer.unwrap_or_default());
            }
            Ok(Prompt::Messages(messages))
        }
        (Some(_), Some(_)) => Err(Error::usage("the row has both prompt and messages; keep one")),
        (None, None) if row.contains_key("prompt") => {
            Err(Error::usage("prompt is null: write one or remove the row"))
        }
        (None, None) => Err(Error::usage(format!(
            "no prompt; the row has {}; wanted prompt or messages (rename with columns, or make it \
             with prompt_template)",
            columns(row)
        ))),
    }
}

/// Messages behind a system message, unless they begin with one.
fn with_system_message(mut messages: Vec<Value>, system: &str) -> Vec<Value> {
    if messages.first().is_none_or(|first| first["role"] != "system") {
        messages.insert(0, message("system", system));
    }
    messages
}

fn plain_text() -> Error {
    Error::usage(
        "system_prompt is for conversations, and the rows are plain text: set prompt_template \
         as well, for instance \"{{ prompt }}\"",
    )
}

fn with_system(example: Example, system: &str) -> Result<Example> {
    match example {
        Example::Messages(messages) => Ok(Example::Messages(with_system_message(messages, system))),
        Example::Chat { prompt, completion } => {
            Ok(Example::Chat { prompt: with_system_message(prompt, system), completion })
        }
        Example::Text(_) | Example::PromptCompletion { .. } => Err(plain_text()),
    }
}

/// Fills a template, called `name` in errors, with the columns of `row`.
fn render(name: &str, source: &str, row: &Row) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match value.is_none() {
        true => Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            "a null cannot be written out; for an optional column write {{ column or \"\" }}",
        )),
        false => escape_formatter(out, state, value),
    });
    let failed = |error: minijinja::Error| {
        let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
        let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
        Error::usage(format!("{name}{line}: {}{detail}", error.kind()))
    };
    let template = environment.template_from_str(source).map_err(failed)?;
    template.render(Serde(row)).map_err(|error| {
        if error.kind() != ErrorKind::UndefinedError {
            return failed(error);
        }
        let mut missing: Vec<_> = template.undeclared_variables(false).into_iter().collect();
        missing.retain(|variable| !row.contains_key(variable));
        missing.sort();
        match missing.is_empty() {
            true => failed(error),
            false => Error::usage(format!(
                "{name}: no column {}; the row has {}",
                missing.join(", "),
                columns(row)
            )),
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::row;

    fn template(prompt: &str, completion: &str) -> Template {
        let set = |text: &str| Some(text.to_string()).filter(|text| !text.is_empty());
        Template {
            prompt_template: set(prompt),
            completion_template: set(completion),
            ..Template::default()
        }
    }

    fn chat(prompt: Vec<Value>, completion: &str) -> Example {
        Example::Chat { prompt, completion: completion.into() }
    }

    #[test]
    fn templates_are_filled_from_renamed_columns() {
        let columns = [("q", "question"), ("completion", "answer")];
        let template = Template {
            system_prompt: Some("You know {{ topic }}.".into()),
            columns: columns.map(|(new, old)| (new.into(), old.into())).into(),
            ..template("{{ q.strip() }} ({{ n }}{% for t in tags %}, {{ t }}{% endfor %})", "")
        };
        let row = row(json!({
            "question": " Why? ", "answer": "So.", "n": 2, "tags": ["a", "b"], "topic": "all"
        }));
        let prompt = vec![message("system", "You know all."), message("user", "Why? (2, a, b)")];
        assert_eq!(template.apply(&row).unwrap(), chat(prompt, "So."));
    }

    #[test]
    fn without_a_prompt_template_the_columns_say_what_the_row_is() {
        let plain = row(json!({"prompt": "a", "answer": "b"}));
        let wanted = Example::PromptCompletion { prompt: "a".into(), completion: "b!".into() };
        assert_eq!(template("", "{{ answer }}!").apply(&plain).unwrap(), wanted);
        let text = row(json!({"text": "a"}));
        assert_eq!(Template::default().apply(&text).unwrap(), Example::Text("a".into()));
    }

    #[test]
    fn renaming_may_swap_columns() {
        let columns = [("prompt", "completion"), ("completion", "prompt")];
        let columns = columns.map(|(new, old)| (new.into(), old.into())).into();
        let template = Template { columns, ..Template::default() };
        let wanted = Example::PromptCompletion { prompt: "b".into(), completion: "a".into() };
        let row = row(json!({"prompt": "a", "completion": "b"}));
        assert_eq!(template.apply(&row).unwrap(), wanted);
    }

    #[test]
    fn a_system_prompt_goes_before_conversations_without_their_own() {
        let template = Template { system_prompt: Some("s".into()), ..Template::default() };
        let (user, system) = (message("user", "a"), message("system", "s"));
        let bare = row(json!({"messages": [user]}));
        let own = row(json!({"prompt": [message("system", "o"), user], "completion": "b"}));
        let wanted = Example::Messages(vec![system, user.clone()]);
        assert_eq!(template.apply(&bare).unwrap(), wanted);
        assert_eq!(template.apply(&own).unwrap(), chat(vec![message("system", "o"), user], "b"));
        let error = template.apply(&row(json!({"text": "a"}))).unwrap_err().to_string();
        assert!(error.contains("set prompt_template as well"), "{error}");
    }

    #[test]
    fn prompts_are_recognised_and_every_other_column_is_kept() {
        let prompt = |template: &Template, columns: Value| {
            let PromptRow { id, prompt, columns } = template.prompt_row(5, &row(columns)).unwrap();
            assert_eq!(id, 5);
            (prompt, Value::Object(columns))
        };
        let (user, said) = (message("user", "a"), message("assistant", "b"));
        let plain = Template::default();
        let given = prompt(&plain, json!({"level": 2, "prompt": "a", "completion": "b"}));
        assert_eq!(given, (Prompt::Text("a".into()), json!({"level": 2, "completion": "b"})));
        let chat = Prompt::Messages(vec![user.clone()]);
        assert_eq!(prompt(&plain, json!({"prompt": [user]})), (chat.clone(), json!({})));
        let given = prompt(&plain, json!({"messages": [user, said], "x": null}));
        assert_eq!(given, (chat.clone(), json!({"x": null, "completion": "b"})));
        let made = Template {
            prompt_template: Some("{{ q }}".into()),
            system_prompt: Some("s".into()),
            columns: [("q".to_string(), "question".to_string())].into(),
            ..Template::default()
        };
        let given = prompt(&made, json!({"question": "a", "answer": 3}));
        let chat = Prompt::Messages(vec![message("system", "s"), user.clone()]);
        assert_eq!(given, (chat, json!({"answer": 3, "q": "a"})));
    }

    #[test]
    fn rows_without_a_prompt_are_refused() {
        let system = Template { system_prompt: Some("s".into()), ..Template::default() };
        for (template, columns, wanted) in [
            (Template::default(), json!({"question": "a"}), "no prompt; the row has question"),
            (Template::default(), json!({"prompt": 3}), "column prompt is a number"),
            (Template::default(), json!({"prompt": null, "a": 1}), "prompt is null"),
            (
                Template::default(),
                json!({"prompt": "a", "messages": []}),
                "both prompt and messages",
            ),
            (system, json!({"prompt": "a"}), "the rows are plain text"),
        ] {
            let error = template.prompt_row(0, &row(columns)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }

    #[test]
    fn mistakes_name_the_template_and_the_column() {
        let row = row(json!({"question": "a", "answer": "b"}));
        let renamed = Template {
            columns: [("prompt".to_string(), "quest".to_string())].into(),
            ..Template::default()
        };
        for (template, wanted) in [
            (
                template("{{ query }}", "x"),
                "prompt_template: no column query; the row has question, answer",
            ),
            (template("{{ question }}", ""), "set completion_template"),
            (template("{{ question }}", "{% if 0 %}a{% endif %}"), "the completion is empty"),
            (template("{{ question }}", "{{ a b }}"), "completion_template, line 1: syntax error"),
            (template("{{ question.x }}", "x"), "prompt_template, line 1: undefined value"),
            (renamed, "columns: no column quest to call prompt; the row has question, answer"),
            (Template::default(), "nothing to train on; the row has question, answer"),
        ] {
            let error = template.apply(&row).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(wanted), "{error}");
        }
        let given = template("{{ hint | default('-') }}", "x").apply(&row).unwrap();
        assert_eq!(given, chat(vec![message("user", "-")], "x"));
    }

    #[test]
    fn a_null_is_never_written_into_a_text() {
        let row = row(json!({"question": "a", "hint": null}));
        let error = template("{{ question }}\n{{ hint }}", "x").apply(&row).unwrap_err();
        assert!(error.to_string().starts_with("prompt_template, line 2: "), "{error}");
        assert!(error.to_string().contains("a null cannot be written out"), "{error}");
        let optional = "{{ question }}{% if hint %} ({{ hint }}){% endif %}{{ hint or '' }}";
        let given = template(optional, "x").apply(&row).unwrap();
        assert_eq!(given, chat(vec![message("user", "a")], "x"));
    }
}
