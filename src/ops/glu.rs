//! Gated linear units: act(gate) * up.

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{composed, host};
use super::tape::{Tape, Value};
use crate::Result;
use crate::kernels::glu::{GluActivation, glu as forward, glu_backward};

/// y = act(gate) * up, all of shape [N, F]: SwiGLU or GeGLU by the activation.
pub fn glu(tape: &Tape, gate: &Value, up: &Value, act: GluActivation) -> Result<Value> {
    let _span = trace_span!("glu", bytes = 12 * gate.tensor().elem_count()).entered();
    if !tape.engine().fused() {
        return composed(tape, &[gate, up], |xs| twin(&xs[0], act)? * &xs[1]);
    }
    let mut y = vec![0f32; gate.tensor().elem_count()];
    forward(&host(gate.tensor())?, &host(up.tensor())?, act, &mut y);
    let y = tape.engine().tensor(y, gate.tensor().dims())?;
    Ok(tape.push(y, &[gate, up], || {
        let (gate, up) = (gate.tensor().clone(), up.tensor().clone());
        let engine = tape.engine().clone();
        move |dy, sink| {
            let _span = trace_span!("glu backward", bytes = 20 * gate.elem_count()).entered();
            let mut dgate = vec![0f32; gate.elem_count()];
            let mut dup = vec![0f32; gate.elem_count()];
            let (gate_values, up_values) = (host(&gate)?, host(&up)?);
            glu_backward(&gate_values, &up_values, &host(&dy)?, act, &mut dgate, &mut dup);
            sink.give(0, engine.tensor(dgate, gate.dims())?)?;
            sink.give(1, engine.tensor(dup, gate.dims())?)
        }
    }))
}

fn twin(gate: &Tensor, act: GluActivation) -> candle_core::Result<Tensor> {
    match act {
        GluActivation::Silu => gate.silu(),
        GluActivation::GeluTanh => gate.gelu(),
        GluActivation::Gelu => gate.gelu_erf(),
    }
}
