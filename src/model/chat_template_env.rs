//! The Jinja environment of chat templates: what `transformers` gives its templates, on minijinja.
//!
//! Beyond plain Jinja: `trim_blocks` and `lstrip_blocks`, loop controls, `raise_exception`,
//! `strftime_now`, a `tojson` without HTML escapes, Python's string and dict methods, and the
//! `{% generation %}` tag. Not served: the operator `%` on strings, and `groupby` by index.

use std::borrow::Cow;
use std::fmt::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::globals::{cycler, joiner};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::chat_template_json::to_json;

/// The filter that stands for the `{% generation %}` tag.
pub(super) const GENERATION: &str = "__generation";

/// An environment without templates.
pub(super) fn environment() -> crate::Result<Environment<'static>> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|error| crate::Error::failure(error.to_string()))?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(python_method);
    env.add_filter("tojson", to_json);
    env.add_filter("trim", |text: Cow<'_, str>, chars: Option<Cow<'_, str>>| {
        strip(&text, chars.as_deref(), true, true).to_string()
    });
    env.add_filter(GENERATION, |text: Value| text);
    env.add_test("sequence", |value: &Value| {
        let kinds = [ValueKind::Seq, ValueKind::Map, ValueKind::String, ValueKind::Undefined];
        kinds.contains(&value.kind())
    });
    env.add_function("cycler", |items: Rest<Value>| cycler(items.to_vec()));
    env.add_function("joiner", joiner);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    Ok(env)
}

/// A template's own refusal of a conversation.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Refusal(message)))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    match write!(text, "{}", chrono::Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now does not know the format '{format}'"),
        )),
    }
}

/// What went wrong, in one sentence: the template's own message, or the error with its line.
pub(super) fn message_of(error: &Error) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = source {
        if let Some(Refusal(message)) = current.downcast_ref() {
            return format!("it refused the conversation: {message}");
        }
        source = current.source();
    }
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// Methods of Python's strings that minijinja's own set lacks or does otherwise.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return unknown_method_callback(state, value, method, args);
    };
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(Value::from(strip(text, chars, method != "rstrip", method != "lstrip")))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "rsplit" => {
            let (separator, count): (&str, Rest<i64>) = from_args(args)?;
            Ok(rsplit(text, separator, count.first().copied().unwrap_or(-1)))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            Ok(partition(text, separator, method == "rpartition"))
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}

/// Python's `strip`: of the given characters, or of what Python counts as white space.
fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let drop = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c),
    };
    let text = if start { text.trim_start_matches(drop) } else { text };
    if end { text.trim_end_matches(drop) } else { text }
}

fn rsplit(text: &str, separator: &str, count: i64) -> Value {
    let mut parts: Vec<&str> = match usize::try_from(count) {
        Ok(count) => text.rsplitn(count + 1, separator).collect(),
        Err(_) => text.rsplit(separator).collect(),
    };
    parts.reverse();
    parts.into_iter().collect()
}

fn partition(text: &str, separator: &str, from_end: bool) -> Value {
    let cut = if from_end { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match cut {
        Some((before, after)) => [before, separator, after],
        None if from_end => ["", "", text],
        None => [text, "", ""],
    };
    parts.into_iter().collect()
}

/// Writes `{% generation %}…{% endgeneration %}` as blocks that minijinja knows, a filter around a
/// scope, and says whether there was one. White-space marks (`{%-`) stay where they were.
pub(super) fn generation_tags_as_filters(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some((before, tag, after)) = next_tag(rest) {
        out.push_str(before);
        let mark = |c: char| c == '-' || c == '+';
        let name = tag.trim_matches(|c: char| mark(c) || c.is_whitespace());
        let left = tag.chars().next().filter(|c| mark(*c)).map(String::from).unwrap_or_default();
        let right = tag.chars().last().filter(|c| mark(*c)).map(String::from).unwrap_or_default();
        match name {
            "generation" => {
                out += &format!("{{%{left} filter {GENERATION} %}}{{% with {right}%}}");
                found = true;
            }
            "endgeneration" => out += &format!("{{%{left} endwith %}}{{% endfilter {right}%}}"),
            _ => out += &format!("{{%{tag}%}}"),
        }
        rest = after;
    }
    out.push_str(rest);
    (out, found)
}

/// The text before the next `{% tag %}`, the inside of the tag, and what follows.
fn next_tag(source: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = source.split_once("{%")?;
    let (tag, after) = rest.split_once("%}")?;
    Some((before, tag, after))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_generation_tags_are_rewritten() {
        let plain = "{% if x %}{{ y }}{# {% z %} #}{%- endif -%} {% raw";
        assert_eq!(generation_tags_as_filters(plain), (plain.to_string(), false));
        let (text, found) = generation_tags_as_filters("a{%- generation %}b{%endgeneration-%}c");
        assert!(found);
        assert_eq!(text, "a{%- filter __generation %}{% with %}b{% endwith %}{% endfilter -%}c");
    }

    proptest! {
        #[test]
        fn text_without_the_tags_stays_as_it_is(text in "[{}%# \\-+a\"\n]{0,40}") {
            prop_assert_eq!(generation_tags_as_filters(&text), (text.clone(), false));
        }
    }

    #[test]
    fn a_bad_date_format_is_an_error_and_no_panic() {
        assert!(strftime_now("%Y-%m-%d").is_ok());
        assert!(strftime_now("%!").is_err());
    }
}
