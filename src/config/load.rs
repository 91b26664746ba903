//! Loading a configuration: defaults, then the TOML file, then the flags; the later wins.

use std::path::Path;

use clap::{Arg, Command};
use toml::de::DeTable;

use super::RunConfig;
use super::command::{Kind, command, to_table, words};
use super::foreign;
use super::help::help;
use super::repeated::join_repeated;
use super::suggest::{did_you_mean, nearest};
use crate::{Error, Result};

/// What the command line asks for.
#[derive(Debug)]
pub enum Request<C> {
    /// Run with this configuration, which has been validated.
    Run(C),
    /// Print this text and stop (`--help`, `--version`).
    Print(String),
}

/// The program's arguments after its name; one that is not UTF-8 is an error.
pub fn arguments() -> Result<Vec<String>> {
    let text = |arg: std::ffi::OsString| {
        arg.into_string().map_err(|arg| {
            Error::usage(format!("the argument {} is not UTF-8 text", arg.to_string_lossy()))
        })
    };
    std::env::args_os().skip(1).map(text).collect()
}

/// Reads `[FILE.toml] [--key value]...`, the arguments after the program's name. A flag may be
/// spelled with `-` for `_`, take its value after `=`, and leave out `true`; the last of several
/// wins, but for lists, whose values are put together. Errors name the key, the file and its line, and suggest known keys.
pub fn load<C: RunConfig>(args: impl IntoIterator<Item = String>) -> Result<Request<C>> {
    let command = command::<C>();
    let mut file = None;
    let mut flags = Vec::new();
    let args: Vec<String> = args.into_iter().collect();
    let mut args = join_repeated(&command, &args).into_iter().peekable();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-h" | "--help" => return Ok(Request::Print(help::<C>()?)),
            "-V" | "--version" => {
                let version = concat!("steersman ", env!("CARGO_PKG_VERSION"), "\n");
                return Ok(Request::Print(version.to_string()));
            }
            text if text.starts_with("--") => flags.push(read_flag(&command, text, &mut args)?),
            text if text.starts_with('-') => {
                return Err(Error::usage(format!("unknown flag {text}; flags are --key value")));
            }
            _ if file.is_none() => file = Some(arg),
            text => {
                return Err(Error::usage(format!(
                    "unexpected argument {text}; give one TOML file, and flags as --key value"
                )));
            }
        }
    }
    let mut config = match file {
        Some(path) => read_toml(Path::new(&path))?,
        None => C::default(),
    };
    for (key, value) in &flags {
        apply_flag(&command, &mut config, key, value)?;
    }
    config.validate()?;
    Ok(Request::Run(config))
}

/// One flag, with its value from after `=` or from the next argument.
fn read_flag(
    command: &Command,
    text: &str,
    rest: &mut std::iter::Peekable<impl Iterator<Item = String>>,
) -> Result<(String, String)> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_string())),
        None => (text, None),
    };
    let key = name.trim_start_matches("--").replace('-', "_");
    let arg = find(command, &key).ok_or_else(|| Error::usage(unknown(command, &key, "--")))?;
    if let Some(value) = value {
        return Ok((key, value));
    }
    if Kind::of(arg) == Kind::Boolean {
        let value = rest.next_if(|next| boolean(next).is_some());
        return Ok((key, value.unwrap_or_else(|| "true".to_string())));
    }
    let optional = arg.get_num_args().is_some_and(|values| values.min_values() == 0);
    let is_value = |next: &String| !(next.starts_with("--") || optional && next.ends_with(".toml"));
    match rest.next_if(is_value) {
        Some(value) => Ok((key, value)),
        None if optional => Ok((key, "true".to_string())),
        None => Err(Error::usage(format!("{name} needs a value"))),
    }
}

/// `true` and `false` in the spellings of TOML and Python.
fn boolean(text: &str) -> Option<&'static str> {
    match text {
        "true" | "True" => Some("true"),
        "false" | "False" => Some("false"),
        _ => None,
    }
}

fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_id() == key)
}

/// What to say of a key that is none: what to use instead if it is one of TRL's, else the nearest
/// known key. `dashes` is how keys are written here, `--` or nothing.
fn unknown(command: &Command, key: &str, dashes: &str) -> String {
    let keys = command.get_arguments().map(|arg| arg.get_id().as_str());
    match (foreign::answer(key), nearest(key, keys)) {
        (Some(answer), _) => format!("{dashes}{key} has no meaning here: {answer}"),
        (None, Some(near)) => {
            format!("unknown key {dashes}{key}; did you mean {dashes}{near}? (--help lists all)")
        }
        (None, None) => format!("unknown key {dashes}{key} (--help lists all)"),
    }
}

fn apply_flag<C: RunConfig>(
    command: &Command,
    config: &mut C,
    key: &str,
    value: &str,
) -> Result<()> {
    let value = match find(command, key).map(Kind::of) {
        Some(Kind::Boolean) => boolean(value).unwrap_or(value),
        _ => value,
    };
    let wrong = |error: clap::Error| {
        let own = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        Error::usage(format!("--{key} {}", complaint(command, key, &format!("\"{value}\""), &own)))
    };
    let flag = format!("--{key}={value}");
    let mut matches =
        command.clone().no_binary_name(true).try_get_matches_from([flag]).map_err(wrong)?;
    config.update_from_arg_matches_mut(&mut matches).map_err(wrong)
}

/// `expects a number, not "x"`, or the value's own complaint where its kind has more to say.
fn complaint(command: &Command, key: &str, found: &str, own: &str) -> String {
    let Some(arg) = find(command, key) else { return own.to_string() };
    let kind = Kind::of(arg);
    let words = words(arg);
    let near = match kind {
        Kind::Choice => did_you_mean(found.trim_matches('"'), words.iter().map(String::as_str)),
        _ => String::new(),
    };
    match kind.expected(arg) {
        Some(expected) => format!("expects {expected}, not {found}{near}"),
        None if own.contains(", not ") => own.to_string(),
        None => format!("{own}, not {found}"),
    }
}

/// Reads a configuration file over the defaults, without validating the whole. Errors name the
/// file, the line and the key.
pub fn read_toml<C: RunConfig>(path: &Path) -> Result<C> {
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::usage(format!(
            "{}: no such configuration file; give a TOML file, and flags as --key value",
            path.display()
        )),
        std::io::ErrorKind::IsADirectory => Error::usage(format!(
            "{}: a folder is no configuration file; give a TOML file, and flags as --key value",
            path.display()
        )),
        std::io::ErrorKind::InvalidData => {
            Error::usage(format!("{}: not a TOML file: it is not UTF-8 text", path.display()))
        }
        _ => Error::io(path)(error),
    })?;
    parse_toml(&text, &path.display().to_string())
}

/// Parses a configuration file's text; `name` is how errors call the file.
fn parse_toml<C: RunConfig>(text: &str, name: &str) -> Result<C> {
    let command = command::<C>();
    let at = |offset: usize| format!("{name}:{}", line(text, offset));
    let malformed = |error: toml::de::Error| {
        let offset = error.span().map(|span| span.start).unwrap_or(0);
        let message = error.message().replace('\n', ", ");
        Error::usage(format!("{}: not valid TOML: {message}", at(offset)))
    };
    let spans = DeTable::parse(text).map_err(malformed)?;
    let values: toml::Table = toml::from_str(text).map_err(malformed)?;
    let mut table = to_table(&C::default())?;
    let mut keys: Vec<_> = spans.get_ref().keys().collect();
    keys.sort_by_key(|key| key.span().start);
    for key in keys {
        let place = at(key.span().start);
        let key: &str = key.get_ref();
        let Some(value) = values.get(key) else { continue };
        check_key::<C>(&command, key, value).map_err(|m| Error::usage(format!("{place}: {m}")))?;
        table.insert(key.to_string(), value.clone());
    }
    table.try_into().map_err(|error| Error::usage(format!("{name}: {}", error.message())))
}

/// Checks that a key is known and that its value is of the right type, by reading it alone.
fn check_key<C: RunConfig>(
    command: &Command,
    key: &str,
    value: &toml::Value,
) -> std::result::Result<(), String> {
    if find(command, key).is_none() {
        return Err(match value.is_table() {
            true => format!("unknown key {key}; keys are flat, so write them without [{key}]"),
            false => unknown(command, key, ""),
        });
    }
    let alone = toml::Table::from_iter([(key.to_string(), value.clone())]);
    match alone.try_into::<C>() {
        Ok(_) => Ok(()),
        Err(error) => {
            let own = complaint(command, key, &value.to_string(), error.message().trim());
            Err(format!("{key} {own}"))
        }
    }
}

/// The line, from 1, that a byte offset lies in.
fn line(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;
    use proptest::prelude::*;

    fn run(args: &[&str]) -> Result<SftConfig> {
        match load::<SftConfig>(args.iter().map(ToString::to_string))? {
            Request::Run(config) => Ok(config),
            Request::Print(text) => panic!("printed {text}"),
        }
    }

    fn flags(flags: &str) -> Result<SftConfig> {
        let mut args = vec!["--dataset_name=listops"];
        args.extend(flags.split(' ').filter(|arg| !arg.is_empty()));
        run(&args)
    }

    fn file(text: &str) -> Result<SftConfig> {
        parse_toml(text, "recipe.toml")
    }

    fn error(result: Result<SftConfig>) -> String {
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        let text = "dataset_name = \"gsm8k\"\nseed = 7\nlearning_rate = 1\n\
                    columns = {prompt = \"question\"}\nsteering_layers = [0, 1]\npacking = true\n";
        std::fs::write(&path, text).unwrap();
        let config = run(&[path.to_str().unwrap(), "--seed", "8", "--steering-rank=4"]).unwrap();
        assert_eq!((config.train.seed, config.adapter.steering_rank), (8, 4));
        assert_eq!(config.optim.learning_rate, Some(1.0));
        assert_eq!(config.data.columns.0["prompt"], "question");
        assert_eq!(config.adapter.steering_layers.to_string(), "0-1");
        assert!(config.sequence.packing);
        assert_eq!(config.train.logging_steps, TrainArgs::default().logging_steps);
    }

    #[test]
    fn flags_take_every_usual_spelling() {
        let config =
            flags("--max-steps -1 --packing --completion_only_loss False --seed=1 --seed 2");
        let config = config.unwrap();
        assert_eq!((config.train.max_steps, config.train.seed), (-1, 2));
        assert!(config.sequence.packing && !config.sequence.completion_only_loss);
        let config = flags("--dry_run --resume_from_checkpoint latest --adapter joint").unwrap();
        assert!(config.train.dry_run);
        assert_eq!(config.train.resume_from_checkpoint, Resume::Latest);
        assert_eq!(config.adapter.adapter, Adapter::Joint);
        for (text, file) in [
            ("", None),
            ("--profile", Some("profile.json")),
            ("--profile --packing", Some("profile.json")),
            ("--profile a/b.json", Some("a/b.json")),
            ("--profile=true --profile false", None),
        ] {
            assert_eq!(flags(text).unwrap().profile(), file.map(Path::new), "{text}");
        }
        let config =
            flags("--columns prompt=question,completion=answer --lora_target_modules o_proj");
        assert_eq!(config.unwrap().data.columns.0["completion"], "answer");
    }

    #[test]
    fn errors_of_flags_name_the_flag_and_what_it_takes() {
        for (text, sentence) in [
            ("--lerning_rate 1", "unknown key --lerning_rate; did you mean --learning_rate?"),
            ("--seed", "--seed needs a value"),
            ("--seed --packing", "--seed needs a value"),
            ("--seed x", "--seed expects a whole number, 0 or more, not \"x\""),
            ("--seed -1", "--seed expects a whole number, 0 or more, not \"-1\""),
            ("--packing=maybe", "--packing expects true or false, not \"maybe\""),
            (
                "--adapter stering",
                "--adapter expects one of steering, lora, joint, not \"stering\"; did you mean \
                 steering?",
            ),
            (
                "--steering_layers x",
                "--steering_layers expects all, or layers such as 0-3,7, not \"x\"",
            ),
            (
                "--use_vllm true",
                "--use_vllm has no meaning here: generation and kernels are built in",
            ),
            ("-s 1", "unknown flag -s; flags are --key value"),
            ("a.toml b.toml", "unexpected argument b.toml; give one TOML file"),
        ] {
            let message = error(flags(text));
            assert!(message.starts_with(sentence), "{text}: {message}");
        }
    }

    #[test]
    fn errors_of_files_name_the_line() {
        for (text, sentence) in [
            ("seed = 1\nlerning_rate = 1", "recipe.toml:2: unknown key lerning_rate; did you mean"),
            (
                "\n\nseed = \"x\"",
                "recipe.toml:3: seed expects a whole number, 0 or more, not \"x\"",
            ),
            ("max_length = \"64\"", "recipe.toml:1: max_length expects a whole number"),
            ("packing = 1", "recipe.toml:1: packing expects true or false, not 1"),
            ("adapter = \"loreft\"", "recipe.toml:1: adapter expects one of steering, lora, joint"),
            (
                "report_to = \"wandb\"",
                "recipe.toml:1: report_to expects one of none, not \"wandb\"",
            ),
            (
                "lora_target_modules = [\"x\"]",
                "recipe.toml:1: lora_target_modules expects all-linear",
            ),
            ("bf16 = true", "recipe.toml:1: bf16 has no meaning here: use dtype"),
            ("[optim]\nseed = 1", "recipe.toml:1: unknown key optim; keys are flat"),
            ("seed = 1\nseed = 2", "recipe.toml:2: not valid TOML: duplicate key"),
            ("seed = = 2", "recipe.toml:1: not valid TOML: "),
            ("columns = {prompt = 1}", "recipe.toml:1: columns "),
        ] {
            let message = error(file(text));
            assert!(message.starts_with(sentence), "{text}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
        assert!(error(run(&["missing.toml"])).contains("missing.toml: no such configuration file"));
    }

    #[test]
    fn contradictions_are_found_without_weights() {
        for (text, word) in [
            ("--max_steps 0", "max_steps"),
            ("--load_best_model_at_end", "eval_steps"),
            ("--early_stopping_patience 3", "eval_steps"),
            (
                "--early_stopping_patience 3 --eval_steps 5 --metric_for_best_model eval_accuracy",
                "steps",
            ),
            ("--packing --max_length 0", "max_length"),
            ("--assistant_only_loss --prompt_template x", "completion_only_loss"),
            ("--warmup_steps 1.5", "warmup_steps"),
            ("--learning_rate nan", "learning_rate"),
            ("--learning_rate 0", "learning_rate"),
            ("--lora_dropout 1", "lora_dropout"),
            ("--listops_min_args 5", "listops_max_args"),
            ("--seed 9223372036854775808", "seed"),
            ("--gradient_accumulation_steps 0", "gradient_accumulation_steps"),
        ] {
            let message = error(flags(text));
            assert!(message.contains(word), "{text}: {message}");
        }
        assert!(error(run(&[])).starts_with("dataset_name is not set"));
    }

    #[test]
    fn defaults_are_those_of_the_structs() {
        let config = flags("").unwrap();
        let mut expected = SftConfig::default();
        expected.data.dataset_name = Some("listops".to_string());
        assert_eq!(config, expected);
    }

    prop_compose! {
        fn any_config()(
            (seed, max_steps, warmup) in (0..=i64::MAX as u64, -1i64..9999, 0.0..1.0f64),
            (rate, decay) in (prop::option::of(1e-300..1e300f64), 0.0..1.0f64),
            (template, name) in (prop::option::of(".{0,40}"), ".{0,20}"),
            columns in prop::collection::btree_map(".{1,8}", ".{1,8}", 0..4),
            layers in prop::collection::btree_set(0..99usize, 1..9),
            (packing, greater) in (any::<bool>(), prop::option::of(any::<bool>())),
        ) -> SftConfig {
            let mut config = SftConfig::default();
            (config.train.seed, config.train.max_steps) = (seed, max_steps);
            (config.optim.warmup_steps, config.optim.weight_decay) = (warmup, decay);
            (config.optim.learning_rate, config.adapter.lora_learning_rate) = (rate, rate);
            (config.data.prompt_template, config.model.model_name_or_path) = (template, name);
            config.data.columns = Columns(columns);
            config.adapter.steering_layers = Layers::Some(layers);
            (config.sequence.packing, config.train.greater_is_better) = (packing, greater);
            config
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_resolved_file_loads_back_to_the_same(config in any_config()) {
            let text = to_toml(&config).unwrap();
            prop_assert_eq!(file(&text).unwrap(), config);
        }

        #[test]
        fn no_file_and_no_flag_panics(text in ".{0,60}", key in "[a-z_-]{0,9}", value in ".{0,9}") {
            let _ = file(&text).is_ok();
            let _ = file(&format!("{key} = {value}\nseed = {value}")).is_ok();
            let _ = run(&[&format!("--{key}"), &value, &format!("--seed={value}")]).is_ok();
        }
    }
}
