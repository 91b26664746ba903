//! CPU kernels on plain slices, with run-time dispatch over the machine's vector extensions: no
//! tensors, no devices, no dependence on the batch.

#[cfg(test)]
mod amx_emulated;
#[cfg(any(target_arch = "x86_64", test))]
mod amx_tiles;
pub mod attention;
mod attention_backward;
pub mod attention_cached;
mod attention_forward;
#[cfg(test)]
mod attention_tests;
mod attention_tile;
mod attention_visits;
pub mod dispatch;
mod dots;
pub mod glu;
mod lanes;
mod lanes_math;
#[cfg(target_arch = "x86_64")]
mod lanes_x86;
pub mod logp;
pub mod logp_known;
mod logp_row;
mod logp_rule;
pub mod low_rank;
mod low_rank_activation;
pub mod low_rank_term;
pub mod matmul;
#[cfg(any(target_arch = "x86_64", test))]
mod matmul_amx;
#[cfg(any(target_arch = "x86_64", test))]
mod matmul_amx_fill;
#[cfg(target_arch = "x86_64")]
mod matmul_block_float;
mod matmul_cut;
#[cfg(target_arch = "x86_64")]
mod matmul_dot;
mod matmul_fetch;
mod matmul_fill;
mod matmul_form;
mod matmul_input;
mod matmul_product;
pub mod matmul_rounded;
#[cfg(target_arch = "x86_64")]
mod matmul_tall;
mod matmul_tile;
#[cfg(target_arch = "x86_64")]
mod matmul_vnni;
pub mod norm;
pub mod pack;
pub mod pages;
pub(crate) mod parallel;
mod prefetch;
mod product;
pub mod rope;
pub mod row_sum;
pub mod slices;
mod team;

#[cfg(test)]
mod logp_tests;
#[cfg(test)]
mod low_rank_tests;
#[cfg(test)]
mod matmul_amx_tests;
#[cfg(all(test, target_arch = "x86_64"))]
mod matmul_block_float_tests;
#[cfg(test)]
mod matmul_tests;
#[cfg(test)]
mod shape_tests;
#[cfg(test)]
pub(crate) mod testing;
