//! Post-training of language models by steering them.

pub mod error;
pub mod model;

pub use error::{Error, Result};
