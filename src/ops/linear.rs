//! Frozen linear maps: y = x Wᵀ + b with the low-rank updates of W, and the gradients of x and of the
//! updates.

use std::rc::Rc;

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Engine, Host, host};
use super::low_rank::low_rank_add;
use super::low_rank_update::{KeptUpdate, LowRankUpdate, codes};
use super::tape::{Sink, Tape};
use super::value::Value;
use super::weight::Weight;
use crate::kernels::low_rank_shift::Shift;
use crate::kernels::matmul::{Side, Terms, matmul_all};
use crate::kernels::slices::room;
use crate::{Error, Result};

/// A frozen linear map and what adapters add to it.
#[derive(Clone, Debug)]
pub struct Linear<'a> {
    /// W [out, in].
    pub weight: &'a Weight,
    /// b `[out]`.
    pub bias: Option<&'a Tensor>,
    /// The low-rank updates of W.
    pub updates: Vec<LowRankUpdate>,
}

/// y = x Wᵀ + b for x [N, in].
pub fn linear(tape: &Tape, x: &Value, weight: &Weight) -> Result<Value> {
    let [y] = linears(tape, x, [Linear { weight, bias: None, updates: Vec::new() }])?;
    Ok(y)
}

/// Several linear maps of the same x [N, in].
///
/// On the CPU they are computed together, and the updates are added to each block of y, and to that
/// of the gradient of x, while it is in cache.
pub fn linears<const N: usize>(tape: &Tape, x: &Value, maps: [Linear; N]) -> Result<[Value; N]> {
    let results = match tape.engine().fused() {
        true => fused(tape, x, &maps)?,
        false => maps.iter().map(|map| composed(tape, x, map)).collect::<Result<_>>()?,
    };
    results.try_into().map_err(|_| Error::failure("a linear map has no result"))
}

fn composed(tape: &Tape, x: &Value, map: &Linear) -> Result<Value> {
    let y = map.weight.apply(tape.engine(), x.tensor(), map.bias)?;
    let y = tape.push(y, &[x], || {
        let (weight, engine) = (map.weight.clone(), tape.engine().clone());
        move |dy: Tensor, sink: &mut Sink| weight.give_input_gradient(&engine, &dy, &[], sink)
    });
    map.updates.iter().try_fold(y, |y, update| {
        low_rank_add(tape, &y, update.input(x), (&update.down, &update.up), update.form)
    })
}

fn fused(tape: &Tape, x: &Value, maps: &[Linear]) -> Result<Vec<Value>> {
    let updates: Vec<_> = maps.iter().map(|map| &map.updates[..]).collect();
    let codes = codes(x.tensor(), &updates)?;
    let ys = products(tape.engine(), x.tensor(), maps, &codes)?;
    let record = |((map, y), codes): ((&Linear, Tensor), Vec<Rc<[f32]>>)| {
        let of_updates = map.updates.iter().flat_map(|update| update.inputs(x));
        let inputs: Vec<&Value> = std::iter::once(x).chain(of_updates).collect();
        tape.push(y, &inputs, || {
            let kept = map.updates.iter().zip(codes).map(|(update, code)| update.keep(x, code));
            let (kept, weight) = (kept.collect::<Vec<_>>(), map.weight.clone());
            let engine = tape.engine().clone();
            move |dy: Tensor, sink: &mut Sink| backward(&engine, (&weight, &kept), &dy, sink)
        })
    };
    Ok(maps.iter().zip(ys).zip(codes).map(record).collect())
}

/// Gives the gradients of the updates and of x.
fn backward(
    engine: &Engine,
    (weight, updates): (&Weight, &[KeptUpdate]),
    dy: &Tensor,
    sink: &mut Sink,
) -> Result<()> {
    let of_update = |(i, update): (usize, &KeptUpdate)| update.backward(dy, 1 + 3 * i, sink);
    let codes = updates.iter().enumerate().map(of_update).collect::<Result<Vec<_>>>()?;
    let downs = updates.iter().map(KeptUpdate::down).collect::<Result<Vec<_>>>()?;
    let shifts = codes.into_iter().zip(&downs);
    let shifts: Vec<_> =
        shifts.filter_map(|(dz, (r, down))| Some(Shift::of_input((dz?, *r), down))).collect();
    weight.give_input_gradient(engine, dy, &shifts, sink)
}

/// The results of maps whose updates have these codes.
fn products(
    engine: &Engine,
    x: &Tensor,
    maps: &[Linear],
    codes: &[Vec<Rc<[f32]>>],
) -> Result<Vec<Tensor>> {
    let rows = x.dims2()?.0;
    let sum = |of: &dyn Fn(&Weight) -> usize| maps.iter().map(|map| of(map.weight)).sum::<usize>();
    let width = sum(&Weight::out_features);
    let (flops, bytes) = (sum(&|weight| weight.flops(rows)), sum(&|weight| weight.traffic(rows)));
    let ups = maps.iter().map(ups).collect::<Result<Vec<_>>>()?;
    let shifts = maps.iter().zip(&ups).zip(codes);
    let shifts = shifts.map(|((map, ups), codes)| shifts_of(map, ups, codes));
    let shifts = shifts.collect::<Result<Vec<_>>>()?;
    let _span = trace_span!("linear", rows, width, flops, bytes).entered();
    let biases =
        maps.iter().map(|map| map.bias.map(host).transpose()).collect::<Result<Vec<_>>>()?;
    let mut ys: Vec<Vec<f32>> =
        maps.iter().map(|map| room(rows * map.weight.out_features())).collect();
    let sides = maps.iter().zip(&mut ys).zip(biases.iter().zip(&shifts));
    let sides = sides.filter_map(|((map, y), (bias, shifts))| {
        let terms = Terms { bias: bias.as_deref(), shifts };
        Some(Side { w: map.weight.packed()?, terms, y })
    });
    matmul_all(&host(x)?, sides.collect(), engine.precision());
    let tensor = |(map, y): (&Linear, _)| engine.tensor(y, &[rows, map.weight.out_features()]);
    maps.iter().zip(ys).map(tensor).collect()
}

/// The numbers of each update's Wup.
fn ups<'a>(map: &'a Linear) -> Result<Vec<Host<'a>>> {
    map.updates.iter().map(|update| host(update.up.tensor())).collect()
}

/// What each update adds, given the numbers of its Wup and its code.
fn shifts_of<'a>(map: &Linear, ups: &'a [Host], codes: &[Rc<[f32]>]) -> Result<Vec<Shift<'a>>> {
    let shifts = map.updates.iter().zip(ups).zip(codes);
    shifts.map(|((update, up), code)| update.shift(code, up)).collect()
}
