//! The text of `--help`, from the fields' doc comments and the struct's defaults.

use clap::Arg;

use super::RunConfig;
use super::command::{Kind, command, to_table, words};
use crate::Result;

/// Column at which a key's meaning starts.
const INDENT: usize = 34;
/// A space at which no line is broken.
const UNBROKEN: char = '\u{a0}';
/// Longest line.
const WIDTH: usize = 100;

/// Every key with its meaning, words and default, grouped, in the order of the fields.
pub fn help<C: RunConfig>() -> Result<String> {
    let defaults = to_table(&C::default())?;
    let mut text = format!("{}\n\nUsage: {} [FILE.toml] [--key value]...\n", C::ABOUT, C::COMMAND);
    let mut group = String::new();
    for arg in command::<C>().get_arguments() {
        let heading = arg.get_help_heading().unwrap_or_default();
        if heading != group {
            text += &format!("\n{heading}:\n");
            group = heading.to_string();
        }
        text += &entry(arg, defaults.get(arg.get_id().as_str()));
    }
    Ok(text)
}

/// A key's lines: `  --key <kind>   meaning [words] [default]`.
fn entry(arg: &Arg, default: Option<&toml::Value>) -> String {
    let kind = Kind::of(arg);
    let mut meaning = arg.get_help().map(|help| help.to_string()).unwrap_or_default();
    if kind == Kind::Choice {
        meaning += &format!(" [{}]", words(arg).join(", "));
    }
    if let Some(default) = default.map(spell).filter(|default| !default.is_empty()) {
        meaning += &format!(" [default:{UNBROKEN}{default}]");
    }
    let mut left = format!("  --{} <{}>", arg.get_id(), kind.value_name());
    let mut text = String::new();
    if left.len() + 2 > INDENT {
        text = left + "\n";
        left = String::new();
    }
    for line in wrap(&meaning, WIDTH - INDENT) {
        text += &format!("{left:INDENT$}{}\n", line.replace(UNBROKEN, " "));
        left.clear();
    }
    text
}

/// A default as one would type it in a flag; nothing for an empty one.
fn spell(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Float(number) if *number != 0.0 && number.abs() < 1e-3 => {
            format!("{number:e}")
        }
        toml::Value::Table(table) if table.is_empty() => String::new(),
        toml::Value::Array(list) if list.is_empty() => String::new(),
        value => value.to_string(),
    }
}

/// Breaks a text between words into lines of at most `width` characters, longer words aside.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![String::new()];
    for word in text.split([' ', '\n']).filter(|word| !word.is_empty()) {
        let Some(line) = lines.last_mut() else { continue };
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_string());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::{GrpoConfig, SftConfig};
    use super::*;
    use std::path::Path;

    #[test]
    fn help_names_every_key_with_its_default() {
        let help = help::<SftConfig>().unwrap();
        for key in to_table(&SftConfig::default()).unwrap().keys() {
            assert!(help.contains(&format!("--{key} <")), "{key}");
        }
        assert!(help.contains("[default: smollm2-135m-instruct]"), "{help}");
        assert!(help.lines().all(|line| line.len() <= WIDTH), "{help}");
    }

    #[test]
    fn the_keys_of_policy_gradient_runs_are_named_too() {
        let help = help::<GrpoConfig>().unwrap();
        for key in to_table(&GrpoConfig::default()).unwrap().keys() {
            assert!(help.contains(&format!("--{key} <")), "{key}");
        }
    }

    #[test]
    fn the_documented_keys_are_those_of_the_help() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = text.split_once("```text\n").unwrap();
        let (_, rest) = rest.split_once("```\n").unwrap();
        let (between, rest) = rest.split_once("```text\n").unwrap();
        let (_, after) = rest.split_once("```\n").unwrap();
        let [sft, grpo] = [help::<SftConfig>().unwrap(), help::<GrpoConfig>().unwrap()];
        let fresh = format!("{before}```text\n{sft}```\n{between}```text\n{grpo}```\n{after}");
        if std::env::var_os("STEERSMAN_UPDATE_DOCS").is_some() {
            std::fs::write(&path, &fresh).unwrap();
        } else {
            assert_eq!(text, fresh, "run the tests once with STEERSMAN_UPDATE_DOCS=1");
        }
    }
}
