//! Operations on whole rows: sums, scaling, selection.

use candle_core::{DType, Tensor};
use tracing::trace_span;

use super::tape::{Sink, Tape, Value};
use crate::Result;
use crate::random::Stream;

/// a + b of equal shapes.
pub fn add(tape: &Tape, a: &Value, b: &Value) -> Result<Value> {
    let sum = tape.engine().add(a.tensor(), b.tensor())?;
    Ok(tape.push(sum, &[a, b], || {
        |dy, sink| {
            sink.give(0, dy.clone())?;
            sink.give(1, dy)
        }
    }))
}

/// x [N, D] + v `[D]` on every row.
pub fn add_vector(tape: &Tape, x: &Value, v: &Value) -> Result<Value> {
    let _span = trace_span!("add vector", bytes = 8 * x.tensor().elem_count()).entered();
    let y = x.tensor().broadcast_add(v.tensor())?;
    Ok(tape.push(y, &[x, v], || {
        |dy: Tensor, sink: &mut Sink| {
            let _span = trace_span!("add vector backward", bytes = 4 * dy.elem_count()).entered();
            if sink.wants(1) {
                sink.give(1, sum_rows(&dy)?)?;
            }
            sink.give(0, dy)
        }
    }))
}

/// The sum of the rows of x [N, D], as [D].
fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let (n, _) = x.dims2()?;
    let ones = Tensor::ones((1, n), DType::F32, x.device())?;
    Ok(ones.matmul(x)?.squeeze(0)?)
}

/// x [N, D] with `new` [rows, D] in the place of the rows named by `rows`.
pub fn replace_rows(tape: &Tape, x: &Value, new: &Value, rows: &[u32]) -> Result<Value> {
    let _span = trace_span!("replace rows", bytes = 8 * x.tensor().elem_count()).entered();
    let index = Tensor::new(rows, x.tensor().device())?;
    let wide = index.unsqueeze(1)?.broadcast_as(new.tensor().shape())?.contiguous()?;
    let y = x.tensor().scatter(&wide, new.tensor(), 0)?;
    Ok(tape.push(y, &[x, new], || {
        move |dy: Tensor, sink: &mut Sink| {
            let _span = trace_span!("replace rows backward", bytes = 8 * dy.elem_count()).entered();
            let picked = dy.index_select(&index, 0)?;
            sink.give(0, dy.scatter(&wide, &picked.zeros_like()?, 0)?)?;
            sink.give(1, picked)
        }
    }))
}

/// Inverted dropout: entries of x [N, D] are zeroed with probability `p`, the others divided by
/// 1 - p. The mask belongs to (key, the row's own key, column), whatever else is in the batch.
pub fn dropout(tape: &Tape, x: &Value, p: f64, key: &[u64], row_keys: &[u64]) -> Result<Value> {
    let _span = trace_span!("dropout", bytes = 8 * x.tensor().elem_count()).entered();
    let width = x.tensor().dims2()?.1;
    let kept = (1.0 / (1.0 - p)) as f32;
    let limit = (p * 4294967296.0) as u64;
    let mask: Vec<f32> = row_keys
        .iter()
        .flat_map(|row| {
            let address: Vec<u64> = key.iter().chain([row]).copied().collect();
            let mut stream = Stream::new(&address);
            (0..width).map(move |_| if (stream.bits() as u64) < limit { 0.0 } else { kept })
        })
        .collect();
    let mask = tape.engine().tensor(mask, x.tensor().dims())?;
    let y = (x.tensor() * &mask)?;
    Ok(tape.push(y, &[x], || move |dy: Tensor, sink: &mut Sink| sink.give(0, (dy * &mask)?)))
}

/// The rows of x [N, D] named by `rows`; the gradient of the other rows is zero.
pub fn gather_rows(tape: &Tape, x: &Value, rows: &[u32]) -> Result<Value> {
    let (tokens, _) = x.tensor().dims2()?;
    let whole = rows.len() == tokens && rows.iter().enumerate().all(|(i, row)| i == *row as usize);
    if whole {
        return Ok(x.clone());
    }
    let _span = trace_span!("gather rows", rows = rows.len()).entered();
    let index = Tensor::new(rows, x.tensor().device())?;
    let picked = x.tensor().index_select(&index, 0)?;
    Ok(tape.push(picked, &[x], || {
        let shape = x.tensor().shape().clone();
        move |dy, sink| {
            let _span = trace_span!("gather rows backward", bytes = 8 * dy.elem_count()).entered();
            let zeros = Tensor::zeros(shape, DType::F32, dy.device())?;
            sink.give(0, zeros.index_add(&index, &dy, 0)?)
        }
    }))
}
