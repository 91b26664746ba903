//! Low-rank shifts of activations: the steering of a site.

use std::rc::Rc;

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Engine, composed, host};
use super::sums::Layout;
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::low_rank::{self, Activation, Gradients, InputGradient, Saved};
use crate::kernels::slices::{copied, room};

/// The form of a low-rank shift or update, alpha * phi(x Wdownᵀ) Wupᵀ.
#[derive(Clone, Copy, Debug)]
pub struct LowRank {
    /// Factor of the shift.
    pub alpha: f32,
    /// The function phi between the two products.
    pub activation: Activation,
}

/// x + alpha * phi(x Wdownᵀ) Wupᵀ for x [N, D], Wdown [R, D], Wup [D, R]: steers in one pass over x, and
/// the result is cheap to make again.
pub fn low_rank_shift(
    tape: &Tape,
    x: &Value,
    (down, up): (&Value, &Value),
    form: LowRank,
) -> Result<Value> {
    if !tape.engine().fused() {
        return composed_add(tape, x, x, (down, up), form);
    }
    let (m, d) = x.tensor().dims2()?;
    let r = up.tensor().dims2()?.1;
    let _span = trace_span!("low rank", flops = 4 * m * r * d, bytes = 12 * m * d).entered();
    let mut z = room(m * r);
    low_rank::down(&host(x.tensor())?, &host(down.tensor())?, d, r, &mut z);
    let z: Rc<[f32]> = z.into();
    let out = shifted(tape.engine(), x.tensor(), &z, up.tensor(), form)?;
    Ok(tape.push_cheap(out, &[x, down, up], || {
        let (kept, code, engine) = (x.keep(), z.clone(), tape.engine().clone());
        let (down, up) = (down.tensor().clone(), up.tensor().clone());
        let wup = up.clone();
        let pullback = move |dy: Tensor, sink: &mut Sink| {
            let _span = trace_span!("low rank backward", flops = 8 * m * r * d).entered();
            let x = kept.tensor()?;
            let mut dx = copied(&host(&dy)?);
            let saved = (&*host(&x)?, &*code, &down, &up, form);
            give_matrices(saved, &dy, InputGradient::Add(&mut dx), 1, sink)?;
            sink.give_own(0, dx, &(m, d).into())
        };
        let x = x.keep();
        (pullback, move || shifted(&engine, &x.tensor()?, &z, &wup, form))
    }))
}

/// y + alpha * phi(x Wdownᵀ) Wupᵀ for y [N, O], x [N, D], Wdown [R, D], Wup [O, R], in tensor operations.
pub(super) fn composed_add(
    tape: &Tape,
    y: &Value,
    x: &Value,
    (down, up): (&Value, &Value),
    form: LowRank,
) -> Result<Value> {
    let ((m, d), (o, r)) = (x.tensor().dims2()?, up.tensor().dims2()?);
    let _span = trace_span!("low rank", flops = 2 * m * r * (d + o)).entered();
    composed(tape, &[y, x, down, up], |xs| twin(xs, form))
}

/// Gives the gradients of Wdown and Wup, inputs `first` and `first + 1` of the operation, and writes
/// that of the adapter's input.
pub(super) fn give_matrices(
    (x, z, down, up, form): (&[f32], &[f32], &Tensor, &Tensor, LowRank),
    dy: &Tensor,
    dx: InputGradient,
    first: usize,
    sink: &mut Sink,
) -> Result<()> {
    let ((r, d), o) = (down.dims2()?, up.dims2()?.0);
    let (at, LowRank { alpha, activation }) = ([first, first + 1], form);
    let [mut dwdown, mut dwup] = sink.take_rows([(at[0], r * d), (at[1], o * r)]);
    {
        let (wdown, wup) = (host(down)?, host(up)?);
        let (wdown, wup) = (&*wdown, &*wup);
        let saved = Saved { x, z, wdown, wup, r, alpha, activation };
        let (dwdown, dwup) = (&mut dwdown, &mut dwup);
        low_rank::backward(&host(dy)?, saved, Gradients { dx, dwdown, dwup });
    }
    sink.give_rows([(at[0], dwdown, Layout::Matrix(r)), (at[1], dwup, Layout::Transposed(r))])
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
