//! Root-mean-square normalisation with a frozen weight.

use candle_core::{D, Tensor};
use tracing::trace_span;

use super::engine::{Engine, composed, host};
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::norm::{rms_norm as forward, rms_norm_backward};
use crate::kernels::slices::room;

/// y = x / sqrt(mean(x²) + eps) * w over the last axis, or * (1 + w) with `plus_one` (Gemma).
///
/// x is [N, D] or [N, heads * D] and w [D]: with several heads each is normalised by itself. Mean and
/// product are taken in f32.
pub fn rms_norm(tape: &Tape, x: &Value, w: &Tensor, eps: f64, plus_one: bool) -> Result<Value> {
    let _span = trace_span!("norm", bytes = 8 * x.tensor().elem_count()).entered();
    if !tape.engine().fused() {
        return composed(tape, &[x], |xs| twin(&xs[0], w, eps, plus_one));
    }
    let eps = eps as f32;
    let y = normed(tape.engine(), x.tensor(), w, eps, plus_one)?;
    Ok(tape.push_cheap(y, &[x], || {
        let (x, w, engine) = (x.keep(), w.clone(), tape.engine().clone());
        let again = {
            let (x, w, engine) = (x.clone(), w.clone(), engine.clone());
            move || normed(&engine, &x.tensor()?, &w, eps, plus_one)
        };
        let pullback = move |dy: Tensor, sink: &mut Sink| {
            let x = x.tensor()?;
            let _span = trace_span!("norm backward", bytes = 12 * x.elem_count()).entered();
            let mut dx = room(x.elem_count());
            rms_norm_backward(&host(&x)?, &host(&w)?, eps, plus_one, &host(&dy)?, &mut dx);
            sink.give_own(0, dx, x.shape())
        };
        (pullback, again)
    }))
}

fn normed(engine: &Engine, x: &Tensor, w: &Tensor, eps: f32, plus_one: bool) -> Result<Tensor> {
    let mut y = room(x.elem_count());
    forward(&host(x)?, &host(w)?, eps, plus_one, &mut y);
    engine.tensor(y, x.dims())
}

fn twin(x: &Tensor, w: &Tensor, eps: f64, plus_one: bool) -> candle_core::Result<Tensor> {
    let shape = x.shape();
    let x = x.reshape(((), w.elem_count()))?;
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let w = if plus_one { (w + 1.0)? } else { w.clone() };
    x.broadcast_mul(&scale)?.broadcast_mul(&w)?.reshape(shape)
}
