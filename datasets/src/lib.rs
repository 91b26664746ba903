//! Tasks, loaders and generators: rows, prompts, targets and gold answers.
//!
//! Rows come from files ([`read_rows`], [`read_split`]) or from a [`Task`]. A row of a user's own
//! file becomes an [`Example`] by its columns or through a [`Template`]; a task also has
//! [`Problem`]s, whose gold answers let a program grade what a model says.

pub mod aqua;
pub mod arithmetic;
mod error;
mod example;
pub mod gsm8k;
pub mod instruct;
pub mod listops;
mod listops_expression;
pub mod locate;
mod message;
mod parquet_rows;
mod prompt;
mod rows;
mod splits;
mod task;
mod template;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
pub use example::Example;
pub use message::Message;
pub use prompt::{Prompt, PromptRow};
pub use rows::{Row, map_rows, read_rows};
pub use splits::{has_split, read_split, split_off};
pub use task::{Grader, Problem, Task, TaskData, TaskOptions};
pub use template::Template;
