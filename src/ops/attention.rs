//! Causal attention over segments: packed sequences, shared prefixes and cached decoding at once.

use std::sync::Arc;

use candle_core::Tensor;
use tracing::trace_span;

use super::attention_composed::{attend_cached, attend_packed};
use super::engine::{Engine, composed, host};
use super::kv_cache::{KvCache, SlotId};
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::attention::{
    AttentionShape, BackwardInput, Gradients, Segment, backward, chains, forward,
};
use crate::kernels::attention_cached::forward_cached;
use crate::kernels::slices::room;

/// Attention of a packed batch: q [N, heads * head_dim], k and v [N, kv_heads * head_dim].
///
/// A query at position p sees the keys of its chain (ancestors, then its own segment) at positions
/// j <= p, in windowed layers only those with p - j < window. At `medium` on the CPU results are rounded to
/// bf16.
pub fn attention(
    tape: &Tape,
    (q, k, v): (&Value, &Value, &Value),
    segments: &Arc<[Segment]>,
    shape: &AttentionShape,
) -> Result<Value> {
    let _span = trace_span!("attention", flops = shape.flops(segments)).entered();
    let shape = &tape.engine().rounding(shape);
    if !tape.engine().fused() {
        return composed(tape, &[q, k, v], |xs| {
            attend_packed(&xs[0], &xs[1], &xs[2], segments, shape)
        });
    }
    let tokens = q.tensor().dims2()?.0;
    let mut out = room(q.tensor().elem_count());
    let tracked = tape.is_recording() && [q, k, v].iter().any(|x| x.is_tracked());
    let mut lse = room(if tracked { tokens * shape.heads } else { 0 });
    {
        let (keys, values) = (host(k.tensor())?, host(v.tensor())?);
        let chains = chains(segments, &keys, &values, shape.kv_heads * shape.head_dim);
        let lse = tracked.then_some(lse.as_mut_slice());
        forward(&host(q.tensor())?, &chains, shape, &mut out, lse);
    }
    let out = tape.engine().tensor(out, q.tensor().dims())?;
    Ok(tape.push(out.clone(), &[q, k, v], || {
        let (q, k, v) = (q.keep(), k.keep(), v.keep());
        let (segments, shape, engine) = (segments.clone(), *shape, tape.engine().clone());
        move |dout: Tensor, sink: &mut Sink| {
            let _span =
                trace_span!("attention backward", flops = 5 * shape.flops(&segments) / 2).entered();
            let (q, k, v) = (q.tensor()?, k.tensor()?, v.tensor()?);
            let dout_shape = dout.dims().to_vec();
            let mut dq = room(q.elem_count());
            let mut dk = room(k.elem_count());
            let mut dv = room(v.elem_count());
            let (qs, ks, vs) = (host(&q)?, host(&k)?, host(&v)?);
            let (outs, douts) = (host(&out)?, host(&dout)?);
            let (q, k, v, out, dout) = (&*qs, &*ks, &*vs, &*outs, &*douts);
            let input = BackwardInput { q, k, v, out, lse: &lse, dout };
            let grads = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
            backward(&input, &segments, &shape, grads);
            let width = shape.kv_heads * shape.head_dim;
            sink.give(0, engine.tensor(dq, dout_shape.as_slice())?)?;
            sink.give(1, engine.tensor(dk, &[tokens, width])?)?;
            sink.give(2, engine.tensor(dv, &[tokens, width])?)
        }
    }))
}

/// Attention of new tokens over a cache, which takes up their keys and values first.
///
/// Segment i continues slot `slots[i]`; nothing is recorded.
pub fn attention_cached(
    engine: &Engine,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &[Segment],
    (cache, slots, layer): (&mut KvCache, &[SlotId], usize),
    shape: &AttentionShape,
) -> Result<Tensor> {
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
        return Ok(Tensor::cat(&attended.collect::<candle_core::Result<Vec<_>>>()?, 0)?);
    }
    let segments: Vec<_> = continued.map(|(segment, slot)| cache.segment(segment, *slot)).collect();
    let shape = &engine.rounding(shape);
    let mut out = room(q.elem_count());
    forward_cached(&host(q)?, &segments, cache.layer(layer, shape), shape, &mut out, None);
    engine.tensor(out, q.dims())
}
