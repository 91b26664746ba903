//! `steer`: everything that is not training.

mod eval;
mod forward;
mod forward_input;
mod generate;
mod inspect;

use steersman::config::{self, Repeated, Request, RunConfig, did_you_mean};
use steersman::model::fetch;
use steersman::{Error, Result, cli, profile};

const HELP: &str = "\
Post-training of language models by steering them: everything but training.

usage: steer COMMAND [FILE.toml] [--key value]...

  steer generate        answer one prompt, or chat
  steer eval            accuracy on a task's held-out problems, with its interval
  steer forward         logits, log-probs, loss and gradients of given token ids, as a file
  steer model inspect   family, sizes, sites, trainable parameters per adapter, memory estimate
  steer model fetch     download smollm2-135m-instruct into the user's cache

steer COMMAND --help lists the keys of a command. Training: the programs sft and quickstart.
";

const FETCH_HELP: &str = "\
usage: steer model fetch NAME

Downloads a model into the user's cache, unless it is there, and prints its path. The only NAME is
smollm2-135m-instruct.
";

/// Flags that may be repeated.
const REPEATED: [&str; 2] = ["--adapter", "--stop"];

fn main() -> std::process::ExitCode {
    cli::main(|args| {
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        match words.as_slice() {
            [] | ["--help" | "-h" | "help", ..] | ["model", "--help" | "-h" | "help", ..] => {
                cli::print(HELP)
            }
            ["--version" | "-V", ..] => {
                cli::print(concat!("steersman ", env!("CARGO_PKG_VERSION"), "\n"))
            }
            ["generate", ..] => with_config(&args[1..], generate::run),
            ["eval", ..] => with_config(&args[1..], eval::run),
            ["forward", ..] => with_config(&args[1..], forward::run),
            ["model", "inspect", path, ..]
                if !path.starts_with('-') && !path.ends_with(".toml") =>
            {
                Err(Error::usage(format!(
                    "steer model inspect does not take '{path}' without a flag; give the model as \
                     --model_name_or_path {path}"
                )))
            }
            ["model", "inspect", ..] => with_config(&args[2..], inspect::run),
            ["model", "fetch", rest @ ..] => fetch_model(rest),
            ["model", ..] => Err(unknown(&args[1..], "steer model", &["inspect", "fetch"])),
            _ => Err(unknown(&args, "steer", &["generate", "eval", "forward", "model"])),
        }
    })
}

fn unknown(args: &[String], program: &str, commands: &[&str]) -> Error {
    match args.first() {
        None => Error::usage(format!("{program} wants a command: {}", commands.join(", "))),
        Some(word) => {
            let near = did_you_mean(word, commands.iter().copied());
            Error::usage(format!(
                "{program} has no command '{word}'{near} (steer --help lists all)"
            ))
        }
    }
}

fn with_config<C: RunConfig>(args: &[String], run: impl FnOnce(&C) -> Result<()>) -> Result<()> {
    match config::load::<C>(join_repeated(args))? {
        Request::Run(config) => profile::during(config.profile(), || run(&config)),
        Request::Print(text) => cli::print(&text),
    }
}

fn fetch_model(names: &[&str]) -> Result<()> {
    match names {
        ["--help" | "-h", ..] => cli::print(FETCH_HELP),
        [] => Err(Error::usage(format!("steer model fetch wants a name: {}", fetch::SMOLLM2))),
        [name] if *name == fetch::SMOLLM2 => {
            cli::print(&format!("{}\n", fetch::fetch_smollm2()?.display()))
        }
        [name, ..] => {
            let near = did_you_mean(name, [fetch::SMOLLM2]);
            Err(Error::usage(format!("'{name}' is no model that steer can fetch{near}")))
        }
    }
}

/// Gathers the values of a flag that is given several times, or with several values, into one. What
/// ends in `.toml` is no value but the configuration file.
fn join_repeated(args: &[String]) -> Vec<String> {
    let mut joined: Vec<String> = Vec::new();
    let mut values: Vec<(&str, Vec<String>)> = Vec::new();
    let mut open = None;
    for arg in args {
        let (name, value) = arg.split_once('=').unwrap_or((arg, ""));
        let repeated = REPEATED.iter().find(|flag| **flag == name).copied();
        match (repeated, open) {
            (Some(flag), _) => {
                if !values.iter().any(|(known, _)| *known == flag) {
                    values.push((flag, Vec::new()));
                }
                open = Some(flag);
                if arg.contains('=') {
                    values.iter_mut().filter(|v| v.0 == flag).for_each(|v| v.1.push(value.into()));
                    open = None;
                }
            }
            (None, Some(flag)) if !arg.starts_with("--") && !arg.ends_with(".toml") => {
                values.iter_mut().filter(|v| v.0 == flag).for_each(|v| v.1.push(arg.clone()));
            }
            _ => {
                open = None;
                joined.push(arg.clone());
            }
        }
    }
    let separator = Repeated::SEPARATOR.to_string();
    for (flag, values) in values {
        joined.push(match values.is_empty() {
            true => flag.to_string(),
            false => format!("{flag}={}", values.join(&separator)),
        });
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_given_several_times_or_with_several_values_becomes_one() {
        let args = ["--adapter", "a", "b", "--input", "x", "--adapter=c", "--gradients"];
        let joined = join_repeated(&args.map(String::from));
        assert_eq!(joined, ["--input", "x", "--gradients", "--adapter=a\u{1f}b\u{1f}c"]);
    }

    #[test]
    fn a_configuration_file_behind_a_repeated_flag_is_no_value_of_it() {
        let joined = join_repeated(&["--adapter", "a", "recipe.toml", "b"].map(String::from));
        assert_eq!(joined, ["recipe.toml", "b", "--adapter=a"]);
    }
}
