//! Generation: prefill and decode over the segment structure, continuous batching, sampling.
//!
//! Token ids in, token ids and log-probs out; text is the caller's business.

mod generate;
mod group;
mod recorder;
mod sampling;
mod stop;

pub use generate::{Completion, GenerateOptions, Generator, Progress, Request, StopReason};
pub use group::{Group, sample_groups};
pub use recorder::Record;
pub use sampling::{RandomKey, Sampled, SamplingParams, sample};
pub use stop::StopStrings;
