//! `steer`: everything that is not training.

mod eval;
mod forward;
mod forward_input;
mod generate;
mod inspect;
mod reward;

use steersman::config::{self, Request, RunConfig, did_you_mean};
use steersman::model::fetch;
use steersman::{Error, Result, cli, profile};

const HELP: &str = "\
Post-training of language models by steering them: everything but training.

usage: steer COMMAND [FILE.toml] [--key value]...

  steer generate        answer one prompt, or chat
  steer eval            accuracy on a task's held-out problems, with its interval
  steer forward         logits, log-probs, loss and gradients of given token ids, as a file
  steer reward test     what rewards say of a file of completions
  steer model inspect   family, sizes, sites, trainable parameters per adapter, memory estimate
  steer model fetch     download smollm2-135m-instruct into the user's cache

steer COMMAND --help lists the keys of a command. Training: the programs sft, grpo and quickstart.
";

const FETCH_HELP: &str = "\
usage: steer model fetch NAME

Downloads a model into the user's cache, unless it is there, and prints its path. The only NAME is
smollm2-135m-instruct.
";

#[global_allocator]
static HEAP: steersman::heap::Heap = steersman::heap::Heap;

fn main() -> std::process::ExitCode {
    cli::main(|args| {
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        match words.as_slice() {
            [] | ["--help" | "-h" | "help", ..] => cli::print(HELP),
            ["model" | "reward", "--help" | "-h" | "help", ..] => cli::print(HELP),
            ["--version" | "-V", ..] => {
                cli::print(concat!("steersman ", env!("CARGO_PKG_VERSION"), "\n"))
            }
            ["generate", ..] => with_config(&args[1..], generate::run),
            ["eval", ..] => with_config(&args[1..], eval::run),
            ["forward", ..] => with_config(&args[1..], forward::run),
            ["reward", "test", ..] => with_config(&args[2..], reward::run),
            ["reward", ..] => Err(unknown(&args[1..], "steer reward", &["test"])),
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
            _ => Err(unknown(&args, "steer", &["generate", "eval", "forward", "model", "reward"])),
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
    match config::load::<C>(args.to_vec())? {
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
