//! Tasks, loaders and generators: rows, prompts, targets and gold answers.

mod error;

pub use error::{Error, Result};
