//! Low-rank shifts of activations: steering of a site, and the update that LoRA adds to a matrix.

use std::rc::Rc;

use candle_core::{CpuStorage, InplaceOp1, Tensor};
use tracing::trace_span;

use super::engine::{Engine, composed, host};
use super::sums::Layout;
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::low_rank::{self, Activation, Gradients, Saved};
use crate::kernels::slices::{copied, room};

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
/// With y = x, the same value, this steers the residual stream in one pass over it, and the result is
/// cheap to make again.
pub fn low_rank_add(
    tape: &Tape,
    y: &Value,
    x: &Value,
    matrices: (&Value, &Value),
    form: LowRank,
) -> Result<Value> {
    add(tape, (y, false), x, matrices, form)
}

/// [`low_rank_add`] to a y that nobody else holds or has kept, such as the result of
/// [`linear`](super::linear()): on the CPU it is overwritten. With y = x W0ᵀ this is LoRA, whose A is
/// Wdown and whose B is Wup.
pub fn low_rank_add_to(
    tape: &Tape,
    y: Value,
    x: &Value,
    matrices: (&Value, &Value),
    form: LowRank,
) -> Result<Value> {
    add(tape, (&y, true), x, matrices, form)
}

fn add(
    tape: &Tape,
    (y, overwrite): (&Value, bool),
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
    let mut z = room(m * r);
    low_rank::down(&host(x.tensor())?, &host(down.tensor())?, d, r, &mut z);
    let z: Rc<[f32]> = z.into();
    let out = match overwrite {
        false => shifted(tape.engine(), y.tensor(), &z, up.tensor(), form)?,
        true => {
            y.tensor().inplace_op1(&AddUp { z: z.clone(), up: up.tensor().clone(), form })?;
            y.tensor().clone()
        }
    };
    let same = std::ptr::eq(x, y);
    let pullback = || {
        let (x, z) = (x.keep(), z.clone());
        let (down, up) = (down.tensor().clone(), up.tensor().clone());
        move |dy: Tensor, sink: &mut Sink| {
            let _span = trace_span!("low rank backward", flops = 4 * m * r * (d + o)).entered();
            let mut dx = match same {
                true => copied(&host(&dy)?),
                false => sink.take_own(1).unwrap_or_else(|| vec![0.0; m * d]),
            };
            let [mut dwdown, mut dwup] = sink.take_rows([(2, r * d), (3, o * r)]);
            {
                let x = x.tensor()?;
                let (x, wdown, wup) = (host(&x)?, host(&down)?, host(&up)?);
                let LowRank { alpha, activation } = form;
                let (x, z, wdown, wup) = (&*x, &*z, &*wdown, &*wup);
                let saved = Saved { x, z, wdown, wup, r, alpha, activation };
                let (dx, dwdown, dwup) = (&mut dx[..], &mut dwdown, &mut dwup);
                low_rank::backward(&host(&dy)?, saved, Gradients { dx, dwdown, dwup });
            }
            let layouts = (Layout::Matrix(r), Layout::Transposed(r));
            sink.give_rows([(2, dwdown, layouts.0), (3, dwup, layouts.1)])?;
            if !same {
                sink.give(0, dy)?;
            }
            sink.give_own(1, dx, &(m, d).into())
        }
    };
    let inputs = [y, x, down, up];
    if !same {
        return Ok(tape.push(out, &inputs, pullback));
    }
    Ok(tape.push_cheap(out, &inputs, || {
        let (y, z, up, engine) = (y.keep(), z.clone(), up.tensor().clone(), tape.engine().clone());
        (pullback(), move || shifted(&engine, &y.tensor()?, &z, &up, form))
    }))
}

/// y += alpha * phi(z) Wupᵀ, in y's own memory.
struct AddUp {
    z: Rc<[f32]>,
    up: Tensor,
    form: LowRank,
}

impl InplaceOp1 for AddUp {
    fn name(&self) -> &'static str {
        "low rank"
    }

    fn cpu_fwd(
        &self,
        storage: &mut CpuStorage,
        layout: &candle_core::Layout,
    ) -> candle_core::Result<()> {
        let (CpuStorage::F32(y), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("a kernel wants contiguous f32 values");
        };
        let (r, phi) = (self.up.dims2()?.1, (self.form.alpha, self.form.activation));
        let up = host(&self.up).map_err(candle_core::Error::wrap)?;
        low_rank::up_add_to((&self.z, r), &up, phi, &mut y[start..end]);
        Ok(())
    }
}

/// y + alpha * phi(z) Wupᵀ.
fn shifted(engine: &Engine, y: &Tensor, z: &[f32], up: &Tensor, form: LowRank) -> Result<Tensor> {
    let mut out = room(y.elem_count());
    let (r, phi) = (up.dims2()?.1, (form.alpha, form.activation));
    low_rank::up_add((z, r), &host(up)?, phi, &host(y)?, &mut out);
    engine.tensor(out, y.dims())
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
