//! Post-training of language models by steering them.

pub mod error;
pub mod kernels;

pub use error::{Error, Result};
