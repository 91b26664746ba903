//! Training: what a step learns from, the update, and everything that lets a run go on as if unbroken.
pub mod batching;
pub mod checkpoint;
pub mod claim;
pub mod data;
pub mod example;
mod free_memory;
pub mod held_out;
pub mod learner;
pub mod loss;
pub mod memory;
pub mod objective;
pub mod optimizer;
pub mod plan;
pub mod run;
pub mod schedule;
pub mod sft;
pub mod tokenize;
pub mod update;
