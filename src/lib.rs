//! Post-training of language models by steering them.

pub mod config;
pub mod error;
pub mod report;
pub mod train;

pub use error::{Error, Result};
