//! Training: optimizer, schedule, files of a run, checkpoints.

pub mod checkpoint;
pub mod claim;
pub mod files;
pub mod optimizer;
pub mod schedule;
