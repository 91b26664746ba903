//! The output head: logits where they are asked for, and log-probs that never materialise [N, V].

use candle_core::{D, DType, Tensor};
use tracing::trace_span;

use super::engine::{composed, host};
use super::linear::{Weight, linear};
use super::tape::{Tape, Value};
use crate::Result;
use crate::kernels::logp::{self, LogpForward, LogpOptions, Target};
use crate::kernels::matmul::matmul;

/// What the head says about a list of targets.
#[derive(Clone, Debug)]
pub struct Logps {
    /// log p(token | row) of each target.
    pub logps: Vec<f32>,
    /// Entropy of each row's distribution, in nats.
    pub entropy: Vec<f32>,
    /// The most likely token of each row.
    pub argmax: Vec<u32>,
}

impl Logps {
    fn new(forward: LogpForward) -> Self {
        let entropy = forward.entropy.unwrap_or_default();
        Logps { logps: forward.logp, entropy, argmax: forward.argmax }
    }
}

/// Logits [N, V] = softcap(h Wᵀ) for h [N, D]; not recorded.
pub fn logits(tape: &Tape, h: &Tensor, head: &Weight, softcap: Option<f64>) -> Result<Tensor> {
    let z = head.apply(tape.engine(), h, None)?;
    Ok(capped(z, softcap.map(|cap| cap as f32))?)
}

/// [`logits`] into a vector that keeps its memory from call to call.
pub fn logits_into(
    tape: &Tape,
    h: &Tensor,
    head: &Weight,
    softcap: Option<f64>,
    into: &mut Vec<f32>,
) -> Result<()> {
    let engine = tape.engine();
    let Some(packed) = head.packed().filter(|_| engine.fused()) else {
        *into = logits(tape, h, head, softcap)?.flatten_all()?.to_vec1()?;
        return Ok(());
    };
    into.resize(h.dims2()?.0 * head.out_features(), 0.0);
    matmul(&host(h)?, packed, None, engine.precision(), into);
    if let Some(cap) = softcap {
        logp::cap(into, head.out_features(), cap as f32);
    }
    Ok(())
}

/// sum over t of `weights[t]` * log p(targets`[t]`) as one number `[1]`, differentiable in h [N, D].
///
/// The weights are known before the pass, so that it computes the gradient of h on its way: two
/// products with the head instead of three. Returns the sum and what the head said.
pub fn weighted_logps(
    tape: &Tape,
    h: &Value,
    head: &Weight,
    (targets, weights): (&[Target], &[f32]),
    softcap: Option<f64>,
) -> Result<(Value, Logps)> {
    let Some(packed) = head.packed().filter(|_| tape.engine().fused()) else {
        let (logps, said) = token_logps(tape, h, head, targets, softcap)?;
        let weights = Tensor::new(weights, tape.engine().device())?;
        let sum = composed(tape, &[&logps], |xs| (&xs[0] * &weights)?.sum_all()?.reshape(1))?;
        return Ok((sum, said));
    };
    let options = options(tape, softcap);
    let rows = host(h.tensor())?;
    let tracked = tape.is_recording() && h.is_tracked();
    let flops = || (1 + usize::from(tracked)) * head.flops(rows.len() / head.in_features());
    let _span = trace_span!("weighted log-probs", flops = flops()).entered();
    let mut dh = vec![0f32; if tracked { rows.len() } else { 0 }];
    let forward = match tracked {
        true => logp::forward_backward(&rows, packed, targets, weights, options, &mut dh),
        false => logp::forward(&rows, packed, targets, options),
    };
    let sum: f64 = forward.logp.iter().zip(weights).map(|(l, w)| *l as f64 * *w as f64).sum();
    let sum = tape.engine().tensor(vec![sum as f32], &[1])?;
    let value = tape.push(sum, &[h], || {
        let (engine, shape) = (tape.engine().clone(), h.tensor().dims().to_vec());
        move |dy, sink| sink.give(0, engine.tensor(dh, &shape)?.broadcast_mul(&dy)?)
    });
    Ok((value, Logps::new(forward)))
}

/// log p(target) of each target as a differentiable value `[targets]`, for losses whose weights depend
/// on it; the backward pass recomputes the logits chunk by chunk.
pub fn token_logps(
    tape: &Tape,
    h: &Value,
    head: &Weight,
    targets: &[Target],
    softcap: Option<f64>,
) -> Result<(Value, Logps)> {
    let Some(packed) = head.packed().filter(|_| tape.engine().fused()) else {
        return composed_logps(tape, h, head, targets, softcap);
    };
    let options = options(tape, softcap);
    let rows = h.tensor().dims2()?.0;
    let _span = trace_span!("log-probs", rows, flops = head.flops(rows)).entered();
    let forward = logp::forward(&host(h.tensor())?, packed, targets, options);
    let logps = tape.engine().tensor(forward.logp.clone(), &[targets.len()])?;
    let lse = forward.lse.clone();
    let value = tape.push(logps, &[h], || {
        let (engine, h, head) = (tape.engine().clone(), h.tensor().clone(), head.clone());
        let targets = targets.to_vec();
        move |dy, sink| {
            let _span =
                trace_span!("log-probs backward", rows, flops = 2 * head.flops(rows)).entered();
            let mut dh = vec![0f32; h.elem_count()];
            if let Some(packed) = head.packed() {
                let (rows, dlogp) = (host(&h)?, host(&dy)?);
                logp::backward(&rows, packed, &targets, &lse, &dlogp, None, options, &mut dh);
            }
            sink.give(0, engine.tensor(dh, h.dims())?)
        }
    });
    Ok((value, Logps::new(forward)))
}

fn options(tape: &Tape, softcap: Option<f64>) -> LogpOptions {
    LogpOptions {
        inv_temperature: 1.0,
        softcap: softcap.map(|cap| cap as f32),
        entropy: true,
        precision: tape.engine().precision(),
    }
}

fn composed_logps(
    tape: &Tape,
    h: &Value,
    head: &Weight,
    targets: &[Target],
    softcap: Option<f64>,
) -> Result<(Value, Logps)> {
    let z = linear(tape, h, head, None)?;
    let device = tape.engine().device();
    let softcap = softcap.map(|cap| cap as f32);
    let rows = Tensor::new(targets.iter().map(|t| t.row).collect::<Vec<_>>(), device)?;
    let tokens = Tensor::new(targets.iter().map(|t| t.token).collect::<Vec<_>>(), device)?;
    let logps = composed(tape, &[&z], |xs| {
        let picked = log_softmax(&capped(xs[0].clone(), softcap)?)?.index_select(&rows, 0)?;
        picked.gather(&tokens.unsqueeze(1)?, 1)?.squeeze(1)
    })?;
    let all = log_softmax(&capped(z.tensor().clone(), softcap)?)?;
    let said = Logps {
        logps: logps.tensor().to_vec1()?,
        entropy: (all.exp()? * &all)?.sum(D::Minus1)?.neg()?.to_vec1()?,
        argmax: all.argmax(D::Minus1)?.to_dtype(DType::U32)?.to_vec1()?,
    };
    Ok((logps, said))
}

fn log_softmax(z: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = z.broadcast_sub(&z.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

fn capped(z: Tensor, softcap: Option<f32>) -> candle_core::Result<Tensor> {
    match softcap {
        None => Ok(z),
        Some(cap) => (z / cap as f64)?.tanh()? * cap as f64,
    }
}
