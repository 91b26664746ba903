//! CPU kernels on plain slices: no tensors, no devices, no dependence on the batch.

pub mod attention;
mod attention_backward;
mod attention_forward;
#[cfg(test)]
mod attention_tests;
mod attention_tile;
pub mod glu;
pub mod norm;
pub mod rope;
pub mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_avx2;
pub mod simd_math;
mod simd_tasks;
