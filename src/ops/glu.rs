//! Gated linear units: act(gate) * up.

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Engine, composed, host};
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::glu::{GluActivation, glu as forward, glu_backward};
use crate::kernels::slices::room;

/// y = act(gate) * up, all of shape [N, F]: SwiGLU or GeGLU by the activation.
pub fn glu(tape: &Tape, gate: &Value, up: &Value, act: GluActivation) -> Result<Value> {
    let _span = trace_span!("glu", bytes = 12 * gate.tensor().elem_count()).entered();
    if !tape.engine().fused() {
        return composed(tape, &[gate, up], |xs| twin(&xs[0], act)? * &xs[1]);
    }
    let y = gated(tape.engine(), gate.tensor(), up.tensor(), act)?;
    Ok(tape.push_cheap(y, &[gate, up], || {
        let (gate, up, engine) = (gate.keep(), up.keep(), tape.engine().clone());
        let again = {
            let (gate, up, engine) = (gate.clone(), up.clone(), engine.clone());
            move || gated(&engine, &gate.tensor()?, &up.tensor()?, act)
        };
        let pullback = move |dy: Tensor, sink: &mut Sink| {
            let (gate, up) = (gate.tensor()?, up.tensor()?);
            let _span = trace_span!("glu backward", bytes = 20 * gate.elem_count()).entered();
            let mut dgate = room(gate.elem_count());
            let mut dup = room(gate.elem_count());
            glu_backward(&host(&gate)?, &host(&up)?, &host(&dy)?, act, &mut dgate, &mut dup);
            sink.give(0, engine.tensor(dgate, gate.dims())?)?;
            sink.give(1, engine.tensor(dup, gate.dims())?)
        };
        (pullback, again)
    }))
}

fn gated(engine: &Engine, gate: &Tensor, up: &Tensor, act: GluActivation) -> Result<Tensor> {
    let mut y = room(gate.elem_count());
    forward(&host(gate)?, &host(up)?, act, &mut y);
    engine.tensor(y, gate.dims())
}

fn twin(gate: &Tensor, act: GluActivation) -> candle_core::Result<Tensor> {
    match act {
        GluActivation::Silu => gate.silu(),
        GluActivation::GeluTanh => gate.gelu(),
        GluActivation::Gelu => gate.gelu_erf(),
    }
}
