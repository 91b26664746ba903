//! The two checks that `validate` functions are made of.

use crate::{Error, Result};

/// A usage error with this sentence unless the condition holds.
pub fn require(holds: bool, sentence: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::usage(sentence)) }
}

/// A usage error unless the value of `key` is finite and above 0.
pub fn require_positive(key: &str, value: f64) -> Result<()> {
    let positive = value.is_finite() && value > 0.0;
    require(positive, &format!("{key} must be above 0, not {value}"))
}
