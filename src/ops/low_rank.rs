//! Low-rank shifts of activations: steering of a site, and the update that LoRA adds to a matrix.

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{composed, host};
use super::tape::{Tape, Value};
use crate::Result;
use crate::kernels::low_rank::{self, Activation, Gradients, Saved};

/// The form of a low-rank shift, alpha * phi(x Wdownᵀ) Wupᵀ.
#[derive(Clone, Copy, Debug)]
pub struct LowRank {
    /// Factor of the shift.
    pub alpha: f32,
    /// The function phi between the two products.
    pub activation: Activation,
}

/// y + alpha * phi(x Wdownᵀ) Wupᵀ for y [N, O], x [N, D], Wdown [R, D], Wup [O, R].
///
/// With y = x this steers the residual stream in one pass over it; with y = x W0ᵀ it is LoRA, whose
/// A is Wdown and whose B is Wup.
pub fn low_rank_add(
    tape: &Tape,
    y: &Value,
    x: &Value,
    (down, up): (&Value, &Value),
    form: LowRank,
) -> Result<Value> {
    let (m, d) = x.tensor().dims2()?;
    let (o, r) = up.tensor().dims2()?;
    let _span =
        trace_span!("low rank", flops = 2 * m * r * (d + o), bytes = 4 * m * (d + 2 * o)).entered();
    if !tape.engine().fused() {
        return composed(tape, &[y, x, down, up], |xs| twin(xs, form));
    }
    let mut z = vec![0f32; m * r];
    let mut out = host(y.tensor())?.to_vec();
    low_rank::down(&host(x.tensor())?, &host(down.tensor())?, d, r, &mut z);
    low_rank::up_add(&z, &host(up.tensor())?, r, form.alpha, form.activation, &mut out);
    let out = tape.engine().tensor(out, y.tensor().dims())?;
    Ok(tape.push(out, &[y, x, down, up], || {
        let (x, down, up) = (x.tensor().clone(), down.tensor().clone(), up.tensor().clone());
        let engine = tape.engine().clone();
        move |dy, sink| {
            let _span = trace_span!("low rank backward", flops = 4 * m * r * (d + o)).entered();
            let mut dx = vec![0f32; m * d];
            let mut ddown = vec![0f32; r * d];
            let mut dup = vec![0f32; o * r];
            {
                let (x, wdown, wup) = (host(&x)?, host(&down)?, host(&up)?);
                let LowRank { alpha, activation } = form;
                let (x, z, wdown, wup) = (&*x, &*z, &*wdown, &*wup);
                let saved = Saved { x, z, wdown, wup, r, alpha, activation };
                let (dx, dwdown, dwup) = (&mut dx[..], &mut ddown[..], &mut dup[..]);
                low_rank::backward(&host(&dy)?, saved, Gradients { dx, dwdown, dwup });
            }
            sink.give(0, dy)?;
            sink.give(1, engine.tensor(dx, &[m, d])?)?;
            sink.give(2, engine.tensor(ddown, &[r, d])?)?;
            sink.give(3, engine.tensor(dup, &[o, r])?)
        }
    }))
}

fn twin(xs: &[Tensor], form: LowRank) -> candle_core::Result<Tensor> {
    let z = xs[1].matmul(&xs[2].t()?)?;
    let phi = match form.activation {
        Activation::Linear => z,
        Activation::Silu => z.silu()?,
        Activation::Relu => z.relu()?,
        Activation::Gelu => z.gelu_erf()?,
        Activation::Tanh => z.tanh()?,
    };
    &xs[0] + (phi.matmul(&xs[3].t()?)? * form.alpha as f64)?
}
