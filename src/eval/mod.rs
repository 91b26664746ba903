//! Evaluation.

mod interval;

pub use interval::Proportion;
