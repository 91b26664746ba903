//! Frozen linear maps: y = x Wᵀ + b, with the gradient of x only.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::bf16;

use super::engine::{Engine, host};
use super::tape::Tape;
use super::value::Value;
use crate::kernels::matmul::{matmul, matmul_input_grad};
use crate::kernels::pack::PackedMatrix;
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

impl Weight {
    /// Takes over `weight` [out, in] (f32, bf16 or f16), stored as `dtype`.
    ///
    /// # Errors
    /// If `weight` is not a matrix or of another type.
    pub fn new(engine: &Engine, weight: &Tensor, dtype: WeightDtype) -> Result<Self> {
        let (out_features, in_features) = weight.dims2()?;
        if !engine.device().is_cpu() {
            let dtype = match dtype {
                WeightDtype::F32 => DType::F32,
                WeightDtype::Bf16 => DType::BF16,
            };
            let dense = weight.to_dtype(dtype)?.to_device(engine.device())?;
            return Ok(Weight(Arc::new(Storage::Dense(dense))));
        }
        let packed = match (weight.dtype(), dtype) {
            (DType::BF16, WeightDtype::Bf16) => {
                let values: Vec<bf16> = weight.flatten_all()?.to_vec1()?;
                PackedMatrix::from_bf16(&values, out_features, in_features)
            }
            (_, WeightDtype::Bf16) => {
                let weight = weight.to_dtype(DType::F32)?.contiguous()?;
                PackedMatrix::from_f32_as_bf16(&host(&weight)?, out_features, in_features)
            }
            (_, WeightDtype::F32) => {
                let weight = weight.to_dtype(DType::F32)?.contiguous()?;
                PackedMatrix::from_f32(&host(&weight)?, out_features, in_features)
            }
        };
        Ok(Weight(Arc::new(Storage::Packed(packed))))
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
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            return Err(Error::failure(format!(
                "token id {id} is outside the vocabulary of {rows}"
            )));
        }
        match &*self.0 {
            Storage::Packed(packed) => {
                let mut values = vec![0f32; ids.len() * width];
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

    /// x Wᵀ + b for x [N, in], not recorded.
    pub(super) fn apply(
        &self,
        engine: &Engine,
        x: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, width) = (x.dims2()?.0, self.out_features());
        match self.packed().filter(|_| engine.fused()) {
            Some(packed) => {
                let mut y = vec![0f32; rows * width];
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

    /// The gradient of x: dy W for dy [N, out].
    pub(super) fn input_gradient(&self, engine: &Engine, dy: &Tensor) -> Result<Tensor> {
        let (rows, width) = (dy.dims2()?.0, self.in_features());
        match self.packed().filter(|_| engine.fused()) {
            Some(packed) => {
                let mut dx = vec![0f32; rows * width];
                matmul_input_grad(&host(dy)?, packed, engine.precision(), &mut dx);
                engine.tensor(dx, &[rows, width])
            }
            None => Ok(dy.matmul(&self.dense(engine)?)?),
        }
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weight [{}, {}]", self.out_features(), self.in_features())
    }
}

/// y = x Wᵀ + b for x [N, in] and b `[out]`; W and b are frozen.
pub fn linear(tape: &Tape, x: &Value, w: &Weight, bias: Option<&Tensor>) -> Result<Value> {
    let y = w.apply(tape.engine(), x.tensor(), bias)?;
    Ok(tape.push(y, &[x], || {
        let (w, engine) = (w.clone(), tape.engine().clone());
        move |dy, sink| sink.give(0, w.input_gradient(&engine, &dy)?)
    }))
}
