//! Tasks, loaders and generators: rows, prompts, targets and gold answers.

mod error;
pub mod gsm8k;
pub mod listops;
mod message;
mod task;

pub use error::{Error, Result};
pub use message::Message;
pub use task::{Grader, Problem};
