//! Flags that may be given several times, or with several values behind them.

use std::any::TypeId;

use clap::Command;

use super::values::Repeated;

/// The flags of a command that may be repeated.
fn repeated(command: &Command) -> Vec<String> {
    let of_list = |arg: &&clap::Arg| arg.get_value_parser().type_id() == TypeId::of::<Repeated>();
    command.get_arguments().filter(of_list).map(|arg| format!("--{}", arg.get_id())).collect()
}

/// Gathers the values of a flag that is given several times, or with several values, into one. What
/// ends in `.toml` is no value but the configuration file.
pub(super) fn join_repeated(command: &Command, args: &[String]) -> Vec<String> {
    let flags = repeated(command);
    let mut joined: Vec<String> = Vec::new();
    let mut values: Vec<(&str, Vec<String>)> = Vec::new();
    let mut open = None;
    for arg in args {
        let (name, value) = arg.split_once('=').unwrap_or((arg, ""));
        let key = name.replace('-', "_");
        let flag =
            flags.iter().find(|flag| name.starts_with("--") && key == flag.replace('-', "_"));
        let repeated = flag.map(String::as_str);
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

    fn command() -> Command {
        let list =
            |name: &'static str| clap::Arg::new(name).value_parser(clap::value_parser!(Repeated));
        Command::new("x")
            .arg(list("adapter"))
            .arg(list("reward_funcs"))
            .arg(clap::Arg::new("input"))
    }

    #[test]
    fn a_flag_given_several_times_or_with_several_values_becomes_one() {
        let args = ["--adapter", "a", "b", "--input", "x", "--adapter=c", "--gradients"];
        let joined = join_repeated(&command(), &args.map(String::from));
        assert_eq!(joined, ["--input", "x", "--gradients", "--adapter=a\u{1f}b\u{1f}c"]);
    }

    #[test]
    fn a_configuration_file_behind_a_repeated_flag_is_no_value_of_it() {
        let joined =
            join_repeated(&command(), &["--adapter", "a", "recipe.toml", "b"].map(String::from));
        assert_eq!(joined, ["recipe.toml", "b", "--adapter=a"]);
    }

    #[test]
    fn dashes_stand_for_underscores() {
        let args = ["--reward-funcs", "a", "--reward_funcs", "b"];
        let joined = join_repeated(&command(), &args.map(String::from));
        assert_eq!(joined, ["--reward_funcs=a\u{1f}b"]);
    }
}
