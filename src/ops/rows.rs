//! Operations on whole rows: sums, scaling, selection.

use std::rc::Rc;

use candle_core::{DType, Tensor};
use half::bf16;
use tracing::trace_span;

use super::engine::{Engine, host};
use super::sums::Layout;
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::row_sum::add_rows;
use crate::kernels::slices::{add_to_rows, copied, gathered, gathered_bf16, mask};
use crate::random::Stream;

/// a + b of equal shapes.
pub fn add(tape: &Tape, a: &Value, b: &Value) -> Result<Value> {
    let sum = tape.engine().add(a.tensor(), b.tensor())?;
    Ok(add_known(tape, a, b, sum))
}

/// [`add`] where the sum is known.
pub fn add_known(tape: &Tape, a: &Value, b: &Value, sum: Tensor) -> Value {
    tape.push(sum, &[a, b], || {
        |dy, sink| {
            sink.give(0, dy.clone())?;
            sink.give(1, dy)
        }
    })
}

/// x [N, D] + v `[D]` on every row.
pub fn add_vector(tape: &Tape, x: &Value, v: &Value) -> Result<Value> {
    let _span = trace_span!("add vector", bytes = 8 * x.tensor().elem_count()).entered();
    let y = if tape.engine().fused() {
        let mut y = copied(&host(x.tensor())?);
        add_to_rows(&mut y, &host(v.tensor())?);
        tape.engine().tensor(y, x.tensor().dims())?
    } else {
        x.tensor().broadcast_add(v.tensor())?
    };
    Ok(tape.push(y, &[x, v], || {
        let fused = tape.engine().fused();
        move |dy: Tensor, sink: &mut Sink| {
            let _span = trace_span!("add vector backward", bytes = 4 * dy.elem_count()).entered();
            if fused && sink.wants(1) {
                let [mut dv] = sink.take_rows([(1, dy.dims2()?.1)]);
                add_rows(&host(&dy)?, &mut dv);
                sink.give_rows([(1, dv, Layout::Vector)])?;
            } else if sink.wants(1) {
                sink.give(1, dy.sum(0)?)?;
            }
            sink.give(0, dy)
        }
    }))
}

/// x [N, D] with `new` [rows, D] in the place of the rows named by `rows`.
pub fn replace_rows(tape: &Tape, x: &Value, new: &Value, rows: &[u32]) -> Result<Value> {
    let _span = trace_span!("replace rows", bytes = 8 * x.tensor().elem_count()).entered();
    let index = Tensor::new(rows, x.tensor().device())?;
    let y = x.tensor().scatter(&wide(&index, new.tensor())?, new.tensor(), 0)?;
    Ok(tape.push(y, &[x, new], || {
        move |dy: Tensor, sink: &mut Sink| {
            let _span = trace_span!("replace rows backward", bytes = 8 * dy.elem_count()).entered();
            let picked = dy.index_select(&index, 0)?;
            let dx = dy.scatter(&wide(&index, &picked)?, &picked.zeros_like()?, 0)?;
            sink.give(0, dx)?;
            sink.give(1, picked)
        }
    }))
}

/// Rows of tensors [_, D] on the CPU, each given as its tensor and its place there, one after the other.
pub fn pick_rows(engine: &Engine, rows: &[(&Tensor, usize)]) -> Result<Tensor> {
    let width = rows.first().map_or(Ok(0), |(tensor, _)| tensor.dim(1))?;
    let _span = trace_span!("pick rows", bytes = 8 * rows.len() * width).entered();
    let from = rows.iter().map(|(tensor, _)| host(tensor)).collect::<Result<Vec<_>>>()?;
    let from: Vec<&[f32]> =
        from.iter().zip(rows).map(|(all, (_, row))| &all[row * width..][..width]).collect();
    engine.tensor(gathered(&from, width), &[rows.len(), width])
}

/// [`pick_rows`] of rows of bf16 numbers, `width` each.
pub fn pick_rows_bf16(engine: &Engine, rows: &[&[bf16]], width: usize) -> Result<Tensor> {
    let _span = trace_span!("pick rows", bytes = 6 * rows.len() * width).entered();
    engine.tensor(gathered_bf16(rows, width), &[rows.len(), width])
}

/// Whether two tensors on the CPU hold the same numbers, to the bit.
pub fn equal_bits(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(same_bits(&host(a)?, &host(b)?))
}

/// [`equal_bits`] of slices.
pub(super) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    let mut pairs = a.iter().zip(b);
    a.len() == b.len() && pairs.all(|(a, b)| a.to_bits() == b.to_bits())
}

/// `index` [rows], repeated for every column of `of` [rows, D].
fn wide(index: &Tensor, of: &Tensor) -> Result<Tensor> {
    Ok(index.unsqueeze(1)?.broadcast_as(of.shape())?.contiguous()?)
}

/// Inverted dropout: entries of x [N, D] are zeroed with probability `p`, the others divided by
/// 1 - p. The mask belongs to (key, the row's own key, column), whatever else is in the batch.
pub fn dropout(tape: &Tape, x: &Value, p: f64, key: &[u64], row_keys: &[u64]) -> Result<Value> {
    let _span = trace_span!("dropout", bytes = 8 * x.tensor().elem_count()).entered();
    let width = x.tensor().dims2()?.1;
    let mask = Rc::new(Mask::new(p, key, row_keys, width));
    let y = mask.apply(tape.engine(), x.tensor())?;
    Ok(tape.push_cheap(y, &[x], || {
        let (x, again, engine) = (x.keep(), mask.clone(), tape.engine().clone());
        let backwards = engine.clone();
        let pullback =
            move |dy: Tensor, sink: &mut Sink| sink.give(0, mask.apply(&backwards, &dy)?);
        (pullback, move || again.apply(&engine, &x.tensor()?))
    }))
}

/// A mask of dropout, a bit an entry.
struct Mask {
    bits: Vec<u64>,
    kept: f32,
}

impl Mask {
    fn new(p: f64, key: &[u64], row_keys: &[u64], width: usize) -> Self {
        let limit = (p * 4294967296.0) as u64;
        let mut bits = vec![0u64; (row_keys.len() * width).div_ceil(64)];
        let mut entry = 0;
        for row in row_keys {
            let address: Vec<u64> = key.iter().chain([row]).copied().collect();
            let mut stream = Stream::new(&address);
            for _ in 0..width {
                let keep = u64::from(stream.bits() as u64 >= limit);
                bits[entry / 64] |= keep << (entry % 64);
                entry += 1;
            }
        }
        Mask { bits, kept: (1.0 / (1.0 - p)) as f32 }
    }

    /// Entries of x that are kept, scaled; the others times zero.
    fn apply(&self, engine: &Engine, x: &Tensor) -> Result<Tensor> {
        let mut y = match engine.fused() {
            true => copied(&host(x)?),
            false => x.flatten_all()?.to_vec1()?,
        };
        mask(&mut y, &self.bits, self.kept);
        engine.tensor(y, x.dims())
    }
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
