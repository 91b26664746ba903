//! Causal attention over segments: packed sequences, shared prefixes and cached decoding at once.

use std::sync::Arc;

use candle_core::{D, Tensor};

use super::engine::{Engine, composed, host};
use super::kv_cache::{KvCache, SlotId};
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::attention::{
    AttentionShape, BackwardInput, Chain, Gradients, Segment, backward, chains, forward,
};

/// Attention of a packed batch: q [N, heads * head_dim], k and v [N, kv_heads * head_dim].
///
/// A query at position p sees the keys of its chain (ancestors, then its own segment) at positions
/// j <= p, in windowed layers only those with p - j < window.
pub fn attention(
    tape: &Tape,
    (q, k, v): (&Value, &Value, &Value),
    segments: &Arc<[Segment]>,
    shape: &AttentionShape,
) -> Result<Value> {
    if !tape.engine().fused() {
        return composed(tape, &[q, k, v], |xs| twin(&xs[0], &xs[1], &xs[2], segments, shape));
    }
    let tokens = q.tensor().dims2()?.0;
    let mut out = vec![0f32; q.tensor().elem_count()];
    let tracked = tape.is_recording() && [q, k, v].iter().any(|x| x.is_tracked());
    let mut lse = vec![0f32; if tracked { tokens * shape.heads } else { 0 }];
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
            let (q, k, v) = (q.tensor()?, k.tensor()?, v.tensor()?);
            let dout_shape = dout.dims().to_vec();
            let mut dq = vec![0f32; q.elem_count()];
            let mut dk = vec![0f32; k.elem_count()];
            let mut dv = vec![0f32; v.elem_count()];
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
    cache.append(engine, layer, segments, slots, (k, v))?;
    if !engine.fused() {
        let parts = segments.iter().zip(slots).map(|(segment, slot)| {
            let (keys, values) = cache.tensors(*slot, layer)?;
            let queries = q.narrow(0, segment.start, segment.len)?;
            Ok(attend(&queries, &keys, &values, segment.position0, shape)?)
        });
        return Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?);
    }
    let width = shape.kv_heads * shape.head_dim;
    let chain = |(segment, slot): (&Segment, &SlotId)| Chain {
        start: segment.start,
        len: segment.len,
        position0: segment.position0,
        spans: cache.spans(*slot, layer, width),
    };
    let chains: Vec<_> = segments.iter().zip(slots).map(chain).collect();
    let mut out = vec![0f32; q.elem_count()];
    forward(&host(q)?, &chains, shape, &mut out, None);
    engine.tensor(out, q.dims())
}

fn twin(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    shape: &AttentionShape,
) -> candle_core::Result<Tensor> {
    let mut parts = Vec::new();
    for (i, segment) in segments.iter().enumerate() {
        let mut chain = vec![i];
        while let Some(parent) = segments[chain[chain.len() - 1]].parent {
            chain.push(parent);
        }
        let gather = |x: &Tensor| {
            let rows =
                chain.iter().rev().map(|j| x.narrow(0, segments[*j].start, segments[*j].len));
            Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let queries = q.narrow(0, segment.start, segment.len)?;
        parts.push(attend(&queries, &gather(k)?, &gather(v)?, segment.position0, shape)?);
    }
    Tensor::cat(&parts, 0)
}

/// q [T, heads * head_dim] at positions `position0..` over keys at positions 0...
fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    position0: usize,
    shape: &AttentionShape,
) -> candle_core::Result<Tensor> {
    let (heads, head_dim) = (shape.heads, shape.head_dim);
    let ((t, _), (keys, _)) = (q.dims2()?, k.dims2()?);
    let spread = |x: &Tensor| {
        let x = x.reshape((keys, shape.kv_heads, 1, head_dim))?;
        let x = x.broadcast_as((keys, shape.kv_heads, heads / shape.kv_heads, head_dim))?;
        x.reshape((keys, heads, head_dim))?.transpose(0, 1)?.contiguous()
    };
    let q = q.reshape((t, heads, head_dim))?.transpose(0, 1)?.contiguous()?;
    let mut scores = (q.matmul(&spread(k)?.t()?)? * shape.scale as f64)?;
    if let Some(cap) = shape.softcap {
        scores = ((scores / cap as f64)?.tanh()? * cap as f64)?;
    }
    let visible = |p: usize, j: usize| j <= p && shape.window.is_none_or(|w| p - j < w);
    let mask: Vec<f32> = (position0..position0 + t)
        .flat_map(|p| (0..keys).map(move |j| if visible(p, j) { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (t, keys), q.device())?)?;
    let shifted = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&spread(v)?)?.transpose(0, 1)?.reshape((t, heads * head_dim))
}
