//! Post-training of language models by steering them.

pub mod config;
pub mod error;

pub use error::{Error, Result};
