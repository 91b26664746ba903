//! Frozen matrices, each stored once, and their products.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::bf16;
use tracing::trace_span;

use super::engine::{Engine, host};
use super::tape::Sink;
use crate::kernels::low_rank_term::LowRankTerm;
use crate::kernels::matmul::{Terms, matmul, matmul_input_grad_add};
use crate::kernels::matmul_rounded::{self, Rounded};
use crate::kernels::pack::PackedMatrix;
use crate::kernels::slices::room;
use crate::{Error, Result};

/// How the entries of a frozen matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16; other values are rounded to it.
    Bf16,
}

enum Storage {
    /// One packed copy in host memory, in the layout that the kernels want.
    Packed(PackedMatrix),
    /// [out, in] on the engine's device.
    Dense(Tensor),
}

/// A frozen weight matrix [out, in], stored once.
#[derive(Clone)]
pub struct Weight(Arc<Storage>);

/// A matrix that is read row by row from wherever it lies.
pub trait MatrixRows: Sync {
    /// Number of rows and of columns.
    fn dims(&self) -> (usize, usize);

    /// Writes row `i`.
    fn read_f32(&self, i: usize, into: &mut [f32]);

    /// Writes row `i`, rounded to the nearest bf16 (ties to even).
    fn read_bf16(&self, i: usize, into: &mut [bf16]);
}

impl Weight {
    /// Reads the matrix `rows` [out, in] and stores it as `dtype`. On the CPU nothing else of its
    /// size is allocated.
    ///
    /// # Errors
    /// If the device has no room for it.
    pub fn new(engine: &Engine, rows: &impl MatrixRows, dtype: WeightDtype) -> Result<Self> {
        let (out, in_) = rows.dims();
        let storage = match (engine.fused(), dtype) {
            (true, WeightDtype::F32) => {
                Storage::Packed(PackedMatrix::f32_rows(out, in_, |i, row| rows.read_f32(i, row)))
            }
            (true, WeightDtype::Bf16) => {
                Storage::Packed(PackedMatrix::bf16_rows(out, in_, |i, row| rows.read_bf16(i, row)))
            }
            (false, WeightDtype::F32) => {
                let values = row_major(rows, |i, row| rows.read_f32(i, row));
                Storage::Dense(Tensor::from_vec(values, (out, in_), engine.device())?)
            }
            (false, WeightDtype::Bf16) => {
                let values = row_major(rows, |i, row| rows.read_bf16(i, row));
                Storage::Dense(Tensor::from_vec(values, (out, in_), engine.device())?)
            }
        };
        Ok(Weight(Arc::new(storage)))
    }

    /// Number of outputs, the rows of W.
    pub fn out_features(&self) -> usize {
        match &*self.0 {
            Storage::Packed(packed) => packed.out_features(),
            Storage::Dense(dense) => dense.dims()[0],
        }
    }

    /// Number of inputs, the columns of W.
    pub fn in_features(&self) -> usize {
        match &*self.0 {
            Storage::Packed(packed) => packed.in_features(),
            Storage::Dense(dense) => dense.dims()[1],
        }
    }

    /// Bytes that the stored matrix takes.
    pub fn bytes(&self) -> usize {
        match &*self.0 {
            Storage::Packed(packed) => packed.bytes(),
            Storage::Dense(dense) => dense.elem_count() * dense.dtype().size_in_bytes(),
        }
    }

    /// The rows of W named by `ids`, as f32 [ids, in]: the embedding of tokens.
    ///
    /// # Errors
    /// If an id is not below [`Weight::out_features`].
    pub fn rows(&self, engine: &Engine, ids: &[u32]) -> Result<Tensor> {
        let (rows, width) = (self.out_features(), self.in_features());
        let _span = trace_span!("embed", rows = ids.len(), bytes = 4 * ids.len() * width).entered();
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            return Err(Error::failure(format!(
                "token id {id} is outside the vocabulary of {rows}"
            )));
        }
        match &*self.0 {
            Storage::Packed(packed) => {
                let mut values = room(ids.len() * width);
                for (id, row) in ids.iter().zip(values.chunks_exact_mut(width)) {
                    packed.row(*id as usize, row);
                }
                engine.tensor(values, &[ids.len(), width])
            }
            Storage::Dense(dense) => {
                let ids = Tensor::new(ids, engine.device())?;
                Ok(dense.index_select(&ids, 0)?.to_dtype(DType::F32)?)
            }
        }
    }

    /// Bytes that [`Weight::keep_rounded`] takes.
    pub fn rounded_bytes(&self, engine: &Engine) -> usize {
        let packed = self.packed().filter(|_| engine.fused());
        packed.map_or(0, |packed| matmul_rounded::rounded_bytes(packed, engine.precision()))
    }

    /// Rounds the matrix for as long as the result lives, instead of with every product, where products of
    /// the engine's precision multiply integers.
    pub fn keep_rounded(&self, engine: &Engine) -> Option<Rounded> {
        let packed = self.packed().filter(|_| engine.fused())?;
        matmul_rounded::keep_rounded(packed, engine.precision())
    }

    /// The whole matrix as f32 [out, in] on the engine's device.
    pub fn dense(&self, engine: &Engine) -> Result<Tensor> {
        match &*self.0 {
            Storage::Packed(packed) => {
                engine.tensor(packed.unpack(), &[self.out_features(), self.in_features()])
            }
            Storage::Dense(dense) => Ok(dense.to_dtype(DType::F32)?),
        }
    }

    pub(super) fn packed(&self) -> Option<&PackedMatrix> {
        match &*self.0 {
            Storage::Packed(packed) => Some(packed),
            Storage::Dense(_) => None,
        }
    }

    /// [`Weight::packed`] for an operation that has no other way.
    pub(super) fn packed_here(&self) -> Result<&PackedMatrix> {
        self.packed().ok_or_else(|| Error::failure("a matrix was stored for another engine"))
    }

    /// FLOPs of a product with `rows` rows.
    pub(super) fn flops(&self, rows: usize) -> usize {
        2 * rows * self.in_features() * self.out_features()
    }

    /// x Wᵀ + b for x [N, in], not recorded.
    pub(super) fn apply(
        &self,
        engine: &Engine,
        x: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, width) = (x.dims2()?.0, self.out_features());
        let _span = trace_span!(
            "linear",
            rows,
            width,
            flops = self.flops(rows),
            bytes = self.bytes() + 4 * rows * (self.in_features() + width),
        )
        .entered();
        match self.packed().filter(|_| engine.fused()) {
            Some(packed) => {
                let mut y = room(rows * width);
                let bias = bias.map(host).transpose()?;
                matmul(&host(x)?, packed, bias.as_deref(), engine.precision(), &mut y);
                engine.tensor(y, &[rows, width])
            }
            None => {
                let y = x.matmul(&self.dense(engine)?.t()?)?;
                Ok(bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?)
            }
        }
    }

    /// Gives the gradient of x, input 0 of the operation: dy W for dy [N, out]; on the CPU with the
    /// terms of low-rank updates.
    pub(super) fn give_input_gradient(
        &self,
        engine: &Engine,
        dy: &Tensor,
        low_rank: &[LowRankTerm],
        sink: &mut Sink,
    ) -> Result<()> {
        if !sink.wants(0) {
            return Ok(());
        }
        let (rows, width) = (dy.dims2()?.0, self.in_features());
        let _span = trace_span!(
            "linear backward",
            rows,
            width,
            flops = self.flops(rows) + low_rank.iter().map(LowRankTerm::flops).sum::<usize>(),
            bytes = self.bytes() + 4 * rows * (self.out_features() + width),
        )
        .entered();
        match self.packed().filter(|_| engine.fused()) {
            Some(packed) => {
                let mut dx = room(rows * width);
                let terms = Terms { low_rank, ..Terms::default() };
                matmul_input_grad_add(&host(dy)?, packed, terms, engine.precision(), &mut dx);
                sink.give_own(0, dx, &(rows, width).into())
            }
            None if low_rank.is_empty() => sink.give(0, dy.matmul(&self.dense(engine)?)?),
            None => self.packed_here().map(|_| ()),
        }
    }
}

/// All elements in the order of the rows, of which `read` writes one.
fn row_major<E: Copy + Default>(
    rows: &impl MatrixRows,
    mut read: impl FnMut(usize, &mut [E]),
) -> Vec<E> {
    let (out, in_) = rows.dims();
    let mut values = vec![E::default(); out * in_];
    values.chunks_mut(in_).enumerate().for_each(|(i, row)| read(i, row));
    values
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weight [{}, {}]", self.out_features(), self.in_features())
    }
}
