//! Initial values of adapter parameters, keyed by (seed, parameter name) and never by call order.

use candle_core::{Device, Tensor};

use crate::Result;
use crate::random::Stream;

/// U(-bound, bound) of `shape`, from a stream that belongs to (seed, key).
pub(super) fn uniform(
    seed: u64,
    key: &str,
    shape: (usize, usize),
    bound: f64,
    device: &Device,
) -> Result<Tensor> {
    let mut stream = Stream::named(seed, key);
    let mut draw = || ((2.0 * f64::from(stream.unit()) - 1.0) * bound) as f32;
    let values = (0..shape.0 * shape.1).map(|_| draw()).collect();
    Ok(Tensor::from_vec::<_, f32>(values, shape, device)?)
}

/// Zeros of `shape`.
pub(super) fn zeros(shape: impl Into<candle_core::Shape>, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, candle_core::DType::F32, device)?)
}
