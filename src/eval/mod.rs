//! Evaluation of a policy on tasks, with intervals.

mod accuracy;
mod interval;

pub use accuracy::{Accuracy, Answer, accuracy};
pub use interval::Proportion;
