//! Post-training of language models by steering them: supervised tuning and policy-gradient training in
//! which the only trainable parameters are small shifts of each block's output (arXiv:2603.00425), LoRA,
//! or both.
//!
//! `README.md` says how to use the programs, `ARCHITECTURE.md` how the library is built. The shortest
//! whole program over the library is `recipes/quickstart.rs`.
//!
//! Letters for shapes: N packed tokens, B sequences, T tokens, D hidden size, F feed-forward size, V
//! vocabulary, R rank, L layers.

pub mod adapter;
pub mod cli;
pub mod config;
pub mod error;
pub mod eval;
pub mod files;
pub(crate) mod free_memory;
pub mod heap;
pub mod kernels;
pub mod model;
pub mod notice;
pub mod ops;
pub mod profile;
pub mod random;
pub mod report;
pub mod rollout;
pub mod train;

pub use error::{Error, Result};
