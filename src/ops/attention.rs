//! Causal attention over segments: packed sequences, shared prefixes and cached decoding at once.

use std::sync::Arc;

use candle_core::Tensor;
use half::bf16;
use tracing::trace_span;

use super::attention_composed::{attend_cached, attend_packed};
use super::engine::{Engine, composed, host};
use super::kv_cache::{KvCache, SlotId};
use super::rows::{equal_bits, same_bits};
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::attention::{
    AttentionShape, BackwardInput, Gradients, Segment, backward, chains, forward,
};
use crate::kernels::attention_cached::forward_cached;
use crate::kernels::slices::{narrow_bf16, room};

/// What attention made of some queries, on the CPU.
#[derive(Clone, Debug)]
pub struct Attended {
    /// The mixed values, [N, heads * head_dim].
    pub out: Tensor,
    /// The logarithm of each softmax's denominator, [N, heads].
    pub lse: Arc<[f32]>,
}

impl Attended {
    /// Whether all numbers of both are the same to the bit.
    pub fn equals(&self, other: &Attended) -> Result<bool> {
        Ok(same_bits(&self.lse, &other.lse) && equal_bits(&self.out, &other.out)?)
    }

    /// Some rows of both, the results in half the memory: they must be bf16 numbers, as they are at `medium`.
    pub fn narrowed(&self, rows: &[u32]) -> Result<(Vec<bf16>, Vec<f32>)> {
        let (out, (n, width)) = (host(&self.out)?, self.out.dims2()?);
        let heads = self.lse.len() / n.max(1);
        let (mut narrowed, mut lse) =
            (Vec::with_capacity(rows.len() * width), Vec::with_capacity(rows.len() * heads));
        for row in rows.iter().map(|row| *row as usize) {
            narrow_bf16(&out[row * width..(row + 1) * width], &mut narrowed);
            lse.extend_from_slice(&self.lse[row * heads..(row + 1) * heads]);
        }
        Ok((narrowed, lse))
    }
}

/// Attention of a packed batch: q [N, heads * head_dim], k and v [N, kv_heads * head_dim].
///
/// A query at position p sees the keys of its chain (ancestors, then its own segment) at positions
/// j <= p, in windowed layers only those with p - j < window. The engine says whether results are rounded to
/// bf16: they are at `medium` on the CPU.
pub fn attention(
    tape: &Tape,
    (q, k, v): (&Value, &Value, &Value),
    segments: &Arc<[Segment]>,
    shape: &AttentionShape,
) -> Result<Value> {
    if !tape.engine().fused() {
        let _span = trace_span!("attention", flops = shape.flops(segments)).entered();
        return composed(tape, &[q, k, v], |xs| {
            attend_packed(&xs[0], &xs[1], &xs[2], segments, shape)
        });
    }
    let tracked = tape.is_recording() && [q, k, v].iter().any(|x| x.is_tracked());
    let qkv = (q.tensor(), k.tensor(), v.tensor());
    let attended = attend(tape.engine(), qkv, segments, shape, tracked)?;
    attention_known(tape, (q, k, v), segments, shape, attended)
}

/// What [`attention`] makes of the queries, on the CPU; `lse` is empty unless asked for.
pub fn attend(
    engine: &Engine,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &[Segment],
    shape: &AttentionShape,
    lse: bool,
) -> Result<Attended> {
    let _span = trace_span!("attention", flops = shape.flops(segments)).entered();
    let shape = &engine.rounding(shape);
    let mut out = room(q.elem_count());
    let mut denominators = room(if lse { q.dims2()?.0 * shape.heads } else { 0 });
    let (keys, values) = (host(k)?, host(v)?);
    let chains = chains(segments, &keys, &values, shape.kv_heads * shape.head_dim);
    let lse = lse.then_some(denominators.as_mut_slice());
    forward(&host(q)?, &chains, shape, &mut out, lse);
    Ok(Attended { out: engine.tensor(out, q.dims())?, lse: denominators.into() })
}

/// [`attention`] whose result is known, its denominators too: only the gradient's way through it is wanted.
pub fn attention_known(
    tape: &Tape,
    (q, k, v): (&Value, &Value, &Value),
    segments: &Arc<[Segment]>,
    shape: &AttentionShape,
    Attended { out, lse }: Attended,
) -> Result<Value> {
    Ok(tape.push(out.clone(), &[q, k, v], || {
        let (q, k, v) = (q.keep(), k.keep(), v.keep());
        let (segments, shape, engine) = (segments.clone(), *shape, tape.engine().clone());
        move |dout: Tensor, sink: &mut Sink| {
            let _span =
                trace_span!("attention backward", flops = 5 * shape.flops(&segments) / 2).entered();
            let (q, k, v) = (q.tensor()?, k.tensor()?, v.tensor()?);
            let (dout_shape, kv_shape) = (dout.dims().to_vec(), k.dims().to_vec());
            let mut dq = room(q.elem_count());
            let mut dk = room(k.elem_count());
            let mut dv = room(v.elem_count());
            let (qs, ks, vs) = (host(&q)?, host(&k)?, host(&v)?);
            let (outs, douts) = (host(&out)?, host(&dout)?);
            let (q, k, v, out, dout) = (&*qs, &*ks, &*vs, &*outs, &*douts);
            let input = BackwardInput { q, k, v, out, lse: &lse, dout };
            let grads = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
            backward(&input, &segments, &shape, grads);
            sink.give(0, engine.tensor(dq, &dout_shape)?)?;
            sink.give(1, engine.tensor(dk, &kv_shape)?)?;
            sink.give(2, engine.tensor(dv, &kv_shape)?)
        }
    }))
}

/// Attention of new tokens over a cache, which takes up their keys and values first.
///
/// Segment i continues slot `slots[i]`; nothing is recorded. The denominators are empty unless asked for with
/// `lse`, on the CPU.
pub fn attention_cached(
    engine: &Engine,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &[Segment],
    (cache, slots, layer): (&mut KvCache, &[SlotId], usize),
    (shape, lse): (&AttentionShape, bool),
) -> Result<Attended> {
    let bytes = || {
        let keys: usize = segments.iter().map(|s| s.position0 + s.len).sum();
        2 * engine.kv_bytes() * keys * shape.kv_heads * shape.head_dim
    };
    let _span =
        trace_span!("attention cached", flops = shape.flops(segments), bytes = bytes()).entered();
    cache.append(engine, layer, (segments, slots), (k, v), shape)?;
    let continued = segments.iter().zip(slots);
    if !engine.fused() {
        let attended = continued.filter_map(|(segment, slot)| {
            let keys_and_values = cache.tensors(*slot, layer)?;
            Some(attend_cached(q, keys_and_values, segment, shape))
        });
        let out = Tensor::cat(&attended.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        return Ok(Attended { out, lse: Arc::default() });
    }
    let segments: Vec<_> = continued.map(|(segment, slot)| cache.segment(segment, *slot)).collect();
    let shape = &engine.rounding(shape);
    let mut out = room(q.elem_count());
    let mut denominators = room(if lse { q.dims2()?.0 * shape.heads } else { 0 });
    let lse = lse.then_some(denominators.as_mut_slice());
    forward_cached(&host(q)?, &segments, cache.layer(layer, shape), shape, &mut out, lse);
    Ok(Attended { out: engine.tensor(out, q.dims())?, lse: denominators.into() })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::kernels::slices::rounded_to_bf16;
    use crate::kernels::testing::noise;

    #[test]
    fn attended_rows_are_picked_and_any_other_bit_makes_them_differ() {
        let (n, heads, width) = (5, 2, 6);
        let out = rounded_to_bf16(&noise(1, n * width));
        let of = |out: Vec<f32>, lse: Vec<f32>| Attended {
            out: Tensor::from_vec(out, (n, width), &Device::Cpu).unwrap(),
            lse: lse.into(),
        };
        let lse = noise(2, n * heads);
        let attended = of(out.clone(), lse.clone());
        let (narrowed, denominators) = attended.narrowed(&[3, 1]).unwrap();
        let widened: Vec<f32> = narrowed.iter().map(|x| x.to_f32()).collect();
        assert_eq!(widened, [&out[3 * width..4 * width], &out[width..2 * width]].concat());
        assert_eq!(denominators, [lse[6], lse[7], lse[2], lse[3]]);
        let changed = |mut x: Vec<f32>| {
            x[3] = -x[3];
            x
        };
        assert!(attended.equals(&of(out.clone(), lse.clone())).unwrap());
        assert!(!attended.equals(&of(changed(out.clone()), lse.clone())).unwrap());
        assert!(!attended.equals(&of(out.clone(), changed(lse.clone()))).unwrap());
        assert!(!attended.equals(&of(out, Vec::new())).unwrap());
    }
}
