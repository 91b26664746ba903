//! Random numbers with an address: a stream is a function of the numbers that name it, never of how
//! many were drawn before, so that neither batch order nor resuming changes one.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// A stream of random numbers: ChaCha8 seeded by the SHA-256 of its address.
pub struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of an address such as (seed, step, prompt, sample, position).
    pub fn new(address: &[u64]) -> Self {
        let mut hash = Sha256::new();
        address.iter().for_each(|part| hash.update(part.to_le_bytes()));
        Stream(ChaCha8Rng::from_seed(hash.finalize().into()))
    }

    /// The stream of a named thing, such as a parameter.
    pub fn named(seed: u64, name: &str) -> Self {
        let hash = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize();
        Stream(ChaCha8Rng::from_seed(hash.into()))
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// Uniform in [0, 1), with 24 random bits.
    pub fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1), with 53 random bits.
    pub fn unit_f64(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_belongs_to_its_address_alone() {
        let first = |address: &[u64]| Stream::new(address).bits();
        assert_eq!(first(&[1, 2]), first(&[1, 2]));
        assert_ne!(first(&[1, 2]), first(&[2, 1]));
        assert_ne!(Stream::named(1, "a").bits(), Stream::named(1, "b").bits());
    }

    #[test]
    fn units_are_uniform() {
        let mut stream = Stream::new(&[7]);
        let mean = (0..10_000).map(|_| stream.unit()).sum::<f32>() / 1e4;
        let mean_f64 = (0..10_000).map(|_| stream.unit_f64()).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.02 && (mean_f64 - 0.5).abs() < 0.02, "{mean} {mean_f64}");
    }
}
