//! CPU kernels on plain slices: no tensors, no devices, the same bits on every machine.

pub mod attention;
pub mod glu;
pub mod norm;
pub mod rope;
