//! Rewards in Python: a file with a function of TRL's signature, run by a small shim.

use std::path::{Path, PathBuf};

use crate::parse::ParseOptions;
use crate::process::{ProcessReward, Program};

/// Imports the user's file and speaks the process protocol for its function.
const SHIM: &str = include_str!("shim.py");

/// Names the interpreter, `python3` if unset.
const INTERPRETER: &str = "STEERSMAN_PYTHON";

/// `file.py` or `file.py:function`, taken apart.
pub(crate) fn split(text: &str) -> Option<(PathBuf, Option<&str>)> {
    if text.ends_with(".py") {
        return Some((PathBuf::from(text), None));
    }
    let (file, function) = text.rsplit_once(':')?;
    file.ends_with(".py").then(|| (PathBuf::from(file), Some(function)))
}

/// The reward that a function of a Python file computes.
pub(crate) fn reward(
    file: &Path,
    function: Option<&str>,
    options: &ParseOptions,
) -> Result<ProcessReward, String> {
    if !file.is_file() {
        return Err(format!("{}: no such file; give the path of a Python file", file.display()));
    }
    let path = file.canonicalize().map_err(|error| format!("{}: {error}", file.display()))?;
    let path = path.to_string_lossy().into_owned();
    let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let interpreter = std::env::var(INTERPRETER).unwrap_or_else(|_| "python3".to_string());
    let arguments = ["-c", SHIM, &path, function.unwrap_or_default()];
    let program = Program {
        command: interpreter,
        arguments: arguments.into_iter().map(str::to_string).collect(),
        says_ready: true,
        first_word: None,
    };
    Ok(ProcessReward::new(function.unwrap_or(&stem), program, options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_files_are_told_from_other_names() {
        assert_eq!(split("./a.py"), Some((PathBuf::from("./a.py"), None)));
        assert_eq!(split("dir/a.py:f"), Some((PathBuf::from("dir/a.py"), Some("f"))));
        for other in ["accuracy_reward", "regex_reward(pattern=\"a:b\")", "a.pyc", "a:b"] {
            assert_eq!(split(other), None, "{other}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = reward(Path::new("no/such.py"), None, &ParseOptions::default()).err().unwrap();
        assert!(error.starts_with("no/such.py: no such file"), "{error}");
    }
}
