//! Rotary position embedding in the half-split form of Hugging Face's models.

use std::sync::{Arc, OnceLock};

use candle_core::{D, Device, Tensor};
use tracing::trace_span;

use super::engine::{Engine, composed, host};
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::rope::{RopeTable, rope, rope_backward};
use crate::kernels::slices::room;

/// The rotation of each packed token: cosines and sines, [N, head_dim / 2].
#[derive(Clone, Debug)]
pub struct Rotary {
    table: Arc<RopeTable>,
    rows: Arc<[u32]>,
    /// The table as tensors [N, 1, head_dim / 2], once the composed path has asked for them: copied
    /// to the device once for all layers.
    tensors: Arc<OnceLock<(Tensor, Tensor)>>,
}

impl Rotary {
    /// The rotation of tokens at `positions` by `position * inv_freq`, cosine and sine scaled by
    /// `attention_factor`; the angle is the f32 product of two f32 numbers, as in transformers.
    pub fn new(positions: &[u32], inv_freq: &[f32], attention_factor: f32) -> Self {
        let table = Arc::new(RopeTable::at(inv_freq, positions, attention_factor));
        Rotary { table, rows: (0..positions.len() as u32).collect(), tensors: Arc::default() }
    }

    fn tensors(&self, device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
        if let Some(tensors) = self.tensors.get() {
            return Ok(tensors.clone());
        }
        let shape = (self.rows.len(), 1, self.table.head_dim() / 2);
        let tensor = |values: &[f32]| Tensor::from_slice(values, shape, device);
        let tensors = (tensor(self.table.cos())?, tensor(self.table.sin())?);
        Ok(self.tensors.get_or_init(|| tensors).clone())
    }
}

/// Rotates each head of x [N, heads * head_dim] by its token's angles.
pub fn rotate(tape: &Tape, x: &Value, rotary: &Rotary) -> Result<Value> {
    let _span = trace_span!("rotary", bytes = 8 * x.tensor().elem_count()).entered();
    if !tape.engine().fused() {
        return composed(tape, &[x], |xs| twin(&xs[0], rotary));
    }
    let y = rotated(tape.engine(), x.tensor(), rotary)?;
    if !x.is_cheap() {
        return Ok(rotate_known(tape, x, rotary, y));
    }
    Ok(tape.push_cheap(y, &[x], || {
        let (x, again, engine) = (x.keep(), rotary.clone(), tape.engine().clone());
        (back(tape, rotary), move || rotated(&engine, &x.tensor()?, &again))
    }))
}

/// [`rotate`] on the CPU whose result y is known, so that x is not read: only the gradient's way through it is
/// wanted.
pub fn rotate_known(tape: &Tape, x: &Value, rotary: &Rotary, y: Tensor) -> Value {
    tape.push(y, &[x], || back(tape, rotary))
}

/// The way back of [`rotate`]: turns gradients back.
fn back(tape: &Tape, rotary: &Rotary) -> impl FnOnce(Tensor, &mut Sink) -> Result<()> + use<> {
    let (rotary, engine) = (rotary.clone(), tape.engine().clone());
    move |dy: Tensor, sink: &mut Sink| {
        let _span = trace_span!("rotary backward", bytes = 8 * dy.elem_count()).entered();
        let mut dx = room(dy.elem_count());
        rope_backward(&host(&dy)?, &rotary.rows, &rotary.table, &mut dx);
        sink.give(0, engine.tensor(dx, dy.dims())?)
    }
}

fn rotated(engine: &Engine, x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    let mut y = room(x.elem_count());
    rope(&host(x)?, &rotary.rows, &rotary.table, &mut y);
    engine.tensor(y, x.dims())
}

fn twin(x: &Tensor, rotary: &Rotary) -> candle_core::Result<Tensor> {
    let ((tokens, width), half) = (x.dims2()?, rotary.table.head_dim() / 2);
    let heads = x.reshape((tokens, width / (2 * half), 2 * half))?;
    let first = heads.narrow(D::Minus1, 0, half)?;
    let second = heads.narrow(D::Minus1, half, half)?;
    let (cos, sin) = rotary.tensors(x.device())?;
    let low = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let high = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[low, high], D::Minus1)?.reshape((tokens, width))
}
