//! Evaluation of a policy on tasks, with intervals.

mod accuracy;
mod interval;
mod tally;

pub use accuracy::{Accuracy, Answer, accuracy};
pub use interval::Proportion;
pub use tally::Tally;
