//! Differentiable operations over the kernels: the only place that knows of CPU features, devices
//! and automatic differentiation.
//!
//! Each operation is one function with two paths behind it: a fused kernel with a hand-written
//! backward pass (CPU), and its composed twin made of plain tensor operations, which is the oracle in
//! tests and the road on devices without a kernel.
//!
//! Shapes: N packed tokens, D hidden size, F feed-forward size, V vocabulary, R rank.

mod attention;
mod attention_composed;
mod engine;
mod glu;
mod head;
mod head_composed;
mod kv_cache;
mod linear;
mod low_rank;
mod low_rank_update;
mod norm;
mod page_pool;
mod rotary;
mod rounding;
mod rows;
mod sums;
mod tape;
mod value;
mod weight;

pub use crate::kernels::attention::{AttentionShape, Segment};
pub use crate::kernels::glu::GluActivation;
pub use crate::kernels::logp::{LogpOptions, RowRule, RowStats, Target, penalise};
pub use crate::kernels::low_rank::Activation;
pub use crate::kernels::matmul::MatmulPrecision;
pub use crate::kernels::matmul_rounded::Rounded;
pub(crate) use crate::kernels::parallel::map as parallel_map;
pub use attention::{Attended, attend, attention, attention_cached, attention_known};
pub use engine::{Engine, composed};
pub use glu::glu;
pub use head::{Distribution, Head, Logps, Pull, Taken, TransposedHead, head_scratch};
pub use kv_cache::{KvCache, SlotId, cached_keys};
pub use linear::{Linear, linear, linears, linears_known};
pub use low_rank::{LowRank, low_rank_shift};
pub use low_rank_update::LowRankUpdate;
pub use norm::rms_norm;
pub use rotary::{Rotary, rotate, rotate_known};
pub use rounding::as_cached;
pub use rows::{
    add, add_known, add_vector, dropout, equal_bits, gather_rows, pick_rows, pick_rows_bf16,
    replace_rows,
};
pub use sums::{GradientSums, Gradients};
pub use tape::{Sink, Tape};
pub use value::{Kept, Place, Value};
pub use weight::{MatrixRows, Weight, WeightDtype};
