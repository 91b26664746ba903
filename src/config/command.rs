//! What clap and serde know of a configuration struct, joined: its flags and TOML form.

use std::any::TypeId;
use std::fmt::Write;

use clap::builder::ArgAction;
use clap::{Arg, Command};

use super::RunConfig;
use crate::{Error, Result};

/// The flags of a configuration: one `--key value` for every field, named exactly as the field.
/// None has a default of its own: an absent flag must change nothing.
pub(super) fn command<C: RunConfig>() -> Command {
    C::augment_args_for_update(Command::new(C::COMMAND)).disable_help_flag(true).mut_args(|arg| {
        let key = arg.get_id().clone();
        arg.long(key).action(ArgAction::Set)
    })
}

/// What a key takes, as far as its help and its error messages care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `true` or `false`.
    Boolean,
    /// A count, 0 or more.
    Count,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// A path.
    Path,
    /// Free text.
    Text,
    /// One of a list of words.
    Choice,
    /// Something that explains itself in its own error.
    Other,
}

impl Kind {
    /// The kind of a flag's value, by the Rust type of its field.
    pub(super) fn of(arg: &Arg) -> Kind {
        let is = |id: TypeId| arg.get_value_parser().type_id() == id;
        if is(TypeId::of::<bool>()) {
            Kind::Boolean
        } else if is(TypeId::of::<usize>()) || is(TypeId::of::<u64>()) {
            Kind::Count
        } else if is(TypeId::of::<i64>()) {
            Kind::Integer
        } else if is(TypeId::of::<f64>()) {
            Kind::Number
        } else if is(TypeId::of::<std::path::PathBuf>()) {
            Kind::Path
        } else if is(TypeId::of::<String>()) {
            Kind::Text
        } else if !arg.get_possible_values().is_empty() {
            Kind::Choice
        } else {
            Kind::Other
        }
    }

    /// What `--help` puts after the key.
    pub(super) fn value_name(self) -> &'static str {
        match self {
            Kind::Boolean => "true|false",
            Kind::Count | Kind::Integer => "integer",
            Kind::Number => "number",
            Kind::Path => "path",
            Kind::Text => "text",
            Kind::Choice => "word",
            Kind::Other => "value",
        }
    }

    /// `"a number"`, for "expects a number, not …"; `None` where the value's own error says it.
    pub(super) fn expected(self, arg: &Arg) -> Option<String> {
        Some(match self {
            Kind::Boolean => "true or false".to_string(),
            Kind::Count => "a whole number, 0 or more".to_string(),
            Kind::Integer => "a whole number".to_string(),
            Kind::Number => "a number".to_string(),
            Kind::Path => "a path".to_string(),
            Kind::Text => "text".to_string(),
            Kind::Choice => format!("one of {}", words(arg).join(", ")),
            Kind::Other => return None,
        })
    }
}

/// The words that a choice takes.
pub(super) fn words(arg: &Arg) -> Vec<String> {
    arg.get_possible_values().iter().map(|value| value.get_name().to_string()).collect()
}

/// A configuration as a flat TOML table; unset keys are absent.
pub(super) fn to_table<C: RunConfig>(config: &C) -> Result<toml::Table> {
    toml::Table::try_from(config)
        .map_err(|error| Error::usage(format!("the configuration has no TOML form: {error}")))
}

/// The resolved configuration as a TOML file, every set key written out, grouped as in the help;
/// loading it gives the same configuration. Fails for a number that TOML cannot hold.
pub fn to_toml<C: RunConfig>(config: &C) -> Result<String> {
    let table = to_table(config)?;
    let mut text = String::new();
    let mut group = String::new();
    for arg in command::<C>().get_arguments() {
        let Some(value) = table.get(arg.get_id().as_str()) else { continue };
        let heading = arg.get_help_heading().unwrap_or_default();
        if heading != group {
            let gap = if group.is_empty() { "" } else { "\n" };
            let _ = writeln!(text, "{gap}# {heading}");
            group = heading.to_string();
        }
        let _ = writeln!(text, "{} = {value}", arg.get_id());
    }
    Ok(text)
}
