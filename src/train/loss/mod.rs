//! Objectives of policy-gradient training as pure functions: from log-probs, advantages and masks to the
//! loss with its named parts and its derivative in every log-prob.
//!
//! Nothing here knows of the model. A trainer asks for the derivatives, hands them to the fused
//! log-prob head as weights, and so gets the gradient of the adapters.

pub mod advantage;
pub mod kl;
pub mod policy;
