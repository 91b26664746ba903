//! Where operations run: the device, the path, the precision.

use candle_core::{CpuStorage, Device, Storage, StorageRef, Tensor, Var};
use tracing::trace_span;

use super::tape::Tape;
use super::value::Value;
use crate::kernels::attention::AttentionShape;
use crate::kernels::matmul::MatmulPrecision;
use crate::kernels::pages::PageDtype;
use crate::kernels::slices::sum;
use crate::{Error, Result};

/// The device that operations run on, and how.
///
/// On the CPU each operation has a fused kernel; elsewhere, and in tests, its composed twin made of
/// plain tensor operations runs instead.
#[derive(Clone, Debug)]
pub struct Engine {
    device: Device,
    fused: bool,
    precision: MatmulPrecision,
}

impl Engine {
    /// The engine of a device with the given precision of matrix products.
    pub fn new(device: Device, precision: MatmulPrecision) -> Self {
        let fused = device.is_cpu();
        Engine { device, fused, precision }
    }

    /// The CPU with f32 products.
    pub fn cpu() -> Self {
        Self::new(Device::Cpu, MatmulPrecision::Highest)
    }

    /// The same device on the composed path: the oracle of the fused one.
    pub fn composed(&self) -> Self {
        Engine { fused: false, ..self.clone() }
    }

    /// The same device with products of another precision.
    pub fn with_precision(&self, precision: MatmulPrecision) -> Self {
        Engine { precision, ..self.clone() }
    }

    /// The device of activations and parameters.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The precision of products with frozen matrices.
    pub fn precision(&self) -> MatmulPrecision {
        self.precision
    }

    /// How keys and values are stored; in f32 on the composed path, as all else there.
    pub(super) fn kv_dtype(&self) -> PageDtype {
        match self.precision {
            MatmulPrecision::Medium if self.fused => PageDtype::Bf16,
            _ => PageDtype::F32,
        }
    }

    /// Whether keys, values and results of attention are bf16 numbers.
    pub fn keeps_bf16(&self) -> bool {
        self.kv_dtype() == PageDtype::Bf16
    }

    /// Bytes of a number in the cache of keys and values: 2 at `medium` on the CPU, else 4.
    pub fn kv_bytes(&self) -> usize {
        self.kv_dtype().bytes()
    }

    /// The shape of attention whose results are as exact as keys and values are stored.
    pub(super) fn rounding(&self, shape: &AttentionShape) -> AttentionShape {
        AttentionShape { rounded: self.keeps_bf16(), ..*shape }
    }

    pub(super) fn fused(&self) -> bool {
        self.fused
    }

    /// `a + b` of equal shapes.
    pub(super) fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let _span = trace_span!("add", bytes = 12 * a.elem_count()).entered();
        if !self.fused || a.dims() != b.dims() {
            return Ok((a + b)?);
        }
        self.tensor(sum(&host(a)?, &host(b)?), a.dims())
    }

    /// A tensor of `shape` that takes over `values`.
    pub(super) fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }
}

/// Read access to the values of a contiguous f32 tensor in host memory.
pub(super) struct Host<'a> {
    guard: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl std::ops::Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.guard {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.start + self.len],
            _ => &[],
        }
    }
}

/// The values of `tensor`, which must be f32, contiguous and in host memory.
pub(super) fn host(tensor: &Tensor) -> Result<Host<'_>> {
    let (guard, layout) = tensor.storage_and_layout();
    let is_f32 = matches!(&*guard, Storage::Cpu(CpuStorage::F32(_)));
    let (start, len) = (layout.start_offset(), layout.shape().elem_count());
    if !is_f32 || !layout.is_contiguous() {
        let found = format!("{:?} on {:?}", tensor.dtype(), tensor.device().location());
        return Err(Error::failure(format!("a kernel wants contiguous f32 values, not {found}")));
    }
    Ok(Host { guard, start, len })
}

/// Runs `f`, made of plain differentiable tensor operations, as one operation of the tape.
///
/// This is the road for anything without a kernel: the composed twins, and steering that is small
/// enough to be written in tensor operations.
pub fn composed<F>(tape: &Tape, inputs: &[&Value], f: F) -> Result<Value>
where
    F: FnOnce(&[Tensor]) -> candle_core::Result<Tensor>,
{
    let tracked = tape.is_recording() && inputs.iter().any(|input| input.is_tracked());
    if !tracked {
        let tensors: Vec<_> = inputs.iter().map(|input| input.tensor().clone()).collect();
        return Ok(Value::constant(f(&tensors)?));
    }
    let vars: Vec<_> = inputs
        .iter()
        .map(|input| match input.is_tracked() {
            true => Ok((input.tensor().clone(), Some(Var::from_tensor(input.tensor())?))),
            false => Ok((input.tensor().clone(), None)),
        })
        .collect::<Result<_>>()?;
    let tensors: Vec<_> = vars
        .iter()
        .map(|(plain, var)| var.as_ref().map_or(plain.clone(), |var| var.as_tensor().clone()))
        .collect();
    let result = f(&tensors)?;
    let detached = result.detach();
    Ok(tape.push(detached, inputs, || {
        move |gradient, sink| {
            let _span = trace_span!("composed backward").entered();
            let mut store = (&result * gradient)?.sum_all()?.backward()?;
            for (i, (_, var)) in vars.iter().enumerate() {
                let gradient = var.as_ref().and_then(|var| store.remove(var));
                if let Some(gradient) = gradient {
                    sink.give(i, gradient.detach().contiguous()?)?;
                }
            }
            Ok(())
        }
    }))
}
