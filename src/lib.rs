//! Post-training of language models by steering them.

pub mod adapter;
pub mod cli;
pub mod config;
pub mod error;
pub mod eval;
pub mod kernels;
pub mod model;
pub mod ops;
pub mod report;
pub mod rollout;
pub mod train;

pub use error::{Error, Result};
