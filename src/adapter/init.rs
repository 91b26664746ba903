//! Initial values of adapter parameters, keyed by (seed, parameter name) and never by call order.

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use crate::Result;

/// U(-bound, bound) of `shape`, from a stream that belongs to (seed, key).
pub(super) fn uniform(
    seed: u64,
    key: &str,
    shape: (usize, usize),
    bound: f64,
    device: &Device,
) -> Result<Tensor> {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(key).finalize();
    let mut rng = ChaCha8Rng::from_seed(digest.into());
    let mut draw = || {
        let unit = (rng.next_u32() >> 8) as f64 / (1u32 << 24) as f64;
        ((2.0 * unit - 1.0) * bound) as f32
    };
    let values = (0..shape.0 * shape.1).map(|_| draw()).collect();
    Ok(Tensor::from_vec::<_, f32>(values, shape, device)?)
}

/// Zeros of `shape`.
pub(super) fn zeros(shape: impl Into<candle_core::Shape>, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, candle_core::DType::F32, device)?)
}
