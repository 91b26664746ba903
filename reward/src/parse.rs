//! From the text of `reward_funcs` to rewards.

use std::path::PathBuf;
use std::time::Duration;

use datasets::Grader;

use crate::builtin;
use crate::http::HttpReward;
use crate::process::ProcessReward;
use crate::python;
use crate::reward::Reward;

/// What rewards are built with besides their own text.
#[derive(Clone, Debug)]
pub struct ParseOptions {
    /// How the task's answers are graded, if it says so; else as numbers.
    pub default_grader: Option<Grader>,
    /// Longest completion in tokens, for rewards by length.
    pub max_completion_length: usize,
    /// How long a process or a server may take for one call.
    pub timeout: Duration,
    /// Processes of each such reward, or requests at once.
    pub num_workers: usize,
    /// Folder for what processes write to their standard error; without one it is shown.
    pub stderr_dir: Option<PathBuf>,
}

impl Default for ParseOptions {
    fn default() -> Self {
        ParseOptions {
            default_grader: None,
            max_completion_length: 512,
            timeout: Duration::from_secs(30),
            num_workers: 1,
            stderr_dir: None,
        }
    }
}

/// The reward that a text names: a built-in one with options in brackets, a Python file with a
/// function (`./my_reward.py`, `./my_reward.py:function`), a command (`process:./my_reward arg`), or the
/// address of a server (`http://localhost:8000/my_reward`).
///
/// # Errors
/// If there is none of that name, or an option is wrong: says what there is.
pub fn parse(text: &str, options: &ParseOptions) -> Result<Box<dyn Reward>, String> {
    if let Some(command) = text.strip_prefix("process:") {
        return Ok(Box::new(ProcessReward::of_command(command.trim(), options)?));
    }
    if text.starts_with("http://") || text.starts_with("https://") {
        return Ok(Box::new(HttpReward::new(text, options)?));
    }
    match python::split(text) {
        Some((file, function)) => Ok(Box::new(python::reward(&file, function, options)?)),
        None => builtin::build(text, options),
    }
}
