//! CPU kernels on plain slices, with run-time dispatch over the machine's vector extensions.

pub mod dispatch;
pub mod logp;
mod logp_row;
pub mod low_rank;
mod low_rank_activation;
pub mod matmul;
mod matmul_fill;
mod matmul_tile;
pub mod pack;
pub mod parallel;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_x86;
pub mod vexp;

#[cfg(test)]
mod logp_tests;
#[cfg(test)]
mod low_rank_tests;
#[cfg(test)]
mod matmul_tests;
#[cfg(test)]
mod testing;
