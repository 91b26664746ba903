//! Post-training of language models by steering them.

pub mod error;

pub use error::{Error, Result};
