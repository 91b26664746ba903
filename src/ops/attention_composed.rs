//! Attention of candle's own operations: the oracle in tests, and the path on devices without its kernels.
//!
//! Segments of like lengths are padded to one grid and attended to at once, because a device takes
//! about as long to start an operation on one of them as on all.

use std::collections::BTreeMap;

use candle_core::{D, DType, Tensor};

use crate::kernels::attention::{AttentionShape, Segment};

/// Attention of a packed batch, as [`attention`](super::attention::attention) defines it.
pub(super) fn attend_packed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    shape: &AttentionShape,
) -> candle_core::Result<Tensor> {
    let mut alike: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (i, segment) in segments.iter().enumerate() {
        let keys = segment.position0 + segment.len;
        let lengths = (segment.len.next_power_of_two(), keys.next_power_of_two());
        alike.entry(lengths).or_default().push(i);
    }
    let (mut places, mut rows) = (vec![0u32; q.dims2()?.0], 0);
    let mut parts = Vec::new();
    for chosen in alike.values() {
        let grid = Grid::new(segments, chosen);
        parts.push(grid.attend((q, k, v), shape)?);
        for (i, segment) in chosen.iter().map(|i| &segments[*i]).enumerate() {
            let first = rows + i * grid.len;
            let of_segment = &mut places[segment.start..segment.start + segment.len];
            of_segment.iter_mut().zip(first..).for_each(|(place, row)| *place = row as u32);
        }
        rows += chosen.len() * grid.len;
    }
    Tensor::cat(&parts, 0)?.index_select(&Tensor::new(places, q.device())?, 0)
}

/// Attention of one segment's queries over the keys and values of its cache, [keys, kv_heads * head_dim].
pub(super) fn attend_cached(
    q: &Tensor,
    (keys, values): &(Tensor, Tensor),
    segment: &Segment,
    shape: &AttentionShape,
) -> candle_core::Result<Tensor> {
    let end = (segment.position0 + segment.len) as f32;
    let positions = Tensor::arange(segment.position0 as f32, end, q.device())?.unsqueeze(0)?;
    let mask = mask(&positions, keys.dims2()?.0, shape.window)?;
    let q = q.narrow(0, segment.start, segment.len)?.unsqueeze(0)?;
    attend((&q, &keys.unsqueeze(0)?, &values.unsqueeze(0)?), &mask, shape)
}

/// Segments side by side: S of them with T queries and K keys each, the shorter ones padded with row 0.
struct Grid {
    segments: usize,
    /// T.
    len: usize,
    /// K.
    keys: usize,
    /// The row of each query, [S, T].
    query_rows: Vec<u32>,
    /// Its position; 0 where there is no query.
    positions: Vec<f32>,
    /// The row of each key, [S, K], in the order of their positions.
    key_rows: Vec<u32>,
}

impl Grid {
    fn new(segments: &[Segment], chosen: &[usize]) -> Self {
        let most = |of: &dyn Fn(&Segment) -> usize| {
            chosen.iter().map(|i| of(&segments[*i])).max().unwrap_or_default()
        };
        let (len, keys) = (most(&|s| s.len), most(&|s| s.position0 + s.len));
        let mut grid = Grid {
            segments: chosen.len(),
            len,
            keys,
            query_rows: vec![0; chosen.len() * len],
            positions: vec![0.0; chosen.len() * len],
            key_rows: vec![0; chosen.len() * keys],
        };
        for (i, segment) in chosen.iter().enumerate() {
            let Segment { start, len: own, position0, .. } = segments[*segment];
            for t in 0..own {
                grid.query_rows[i * len + t] = (start + t) as u32;
                grid.positions[i * len + t] = (position0 + t) as f32;
            }
            let mut next = Some(*segment);
            while let Some(at) = next {
                let Segment { start, len, position0, parent } = segments[at];
                let rows = &mut grid.key_rows[i * keys + position0..][..len];
                rows.iter_mut().zip(start..).for_each(|(row, of)| *row = of as u32);
                next = parent;
            }
        }
        grid
    }

    /// The results of all queries, [S * T, heads * head_dim].
    fn attend(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        shape: &AttentionShape,
    ) -> candle_core::Result<Tensor> {
        let device = q.device();
        let queries = Tensor::new(&self.query_rows[..], device)?;
        let keys = Tensor::new(&self.key_rows[..], device)?;
        let positions = Tensor::from_slice(&self.positions, (self.segments, self.len), device)?;
        let grid = |x: &Tensor, rows: &Tensor, len| {
            x.index_select(rows, 0)?.reshape((self.segments, len, x.dims2()?.1))
        };
        let mask = mask(&positions, self.keys, shape.window)?;
        let (q, k, v) =
            (grid(q, &queries, self.len)?, grid(k, &keys, self.keys)?, grid(v, &keys, self.keys)?);
        attend((&q, &k, &v), &mask, shape)
    }
}

/// What is added to the scores of queries at `positions` [S, T] over keys at 0, 1, ...: 0 where a query
/// sees a key, else -inf [S, 1, T, keys].
fn mask(positions: &Tensor, keys: usize, window: Option<usize>) -> candle_core::Result<Tensor> {
    let p = positions.unsqueeze(1)?.unsqueeze(3)?;
    let j = Tensor::arange(0f32, keys as f32, positions.device())?;
    let mut visible = p.broadcast_ge(&j)?;
    if let Some(window) = window {
        visible = (visible * p.broadcast_lt(&(j + window as f64)?)?)?;
    }
    let open = Tensor::zeros(visible.shape(), DType::F32, positions.device())?;
    visible.where_cond(&open, &(&open + f64::NEG_INFINITY)?)
}

/// q [S, T, heads * head_dim] over k and v [S, keys, kv_heads * head_dim]: [S * T, heads * head_dim].
fn attend(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    mask: &Tensor,
    shape: &AttentionShape,
) -> candle_core::Result<Tensor> {
    let (heads, kv_heads, head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    let ((s, t, _), keys) = (q.dims3()?, k.dims3()?.1);
    let spread = |x: &Tensor| {
        let x = x.reshape((s, keys, kv_heads, head_dim))?.transpose(1, 2)?.unsqueeze(2)?;
        let x = x.broadcast_as((s, kv_heads, heads / kv_heads, keys, head_dim))?;
        x.contiguous()?.reshape((s, heads, keys, head_dim))
    };
    let q = q.reshape((s, t, heads, head_dim))?.transpose(1, 2)?.contiguous()?;
    let mut scores = (q.matmul(&spread(k)?.t()?)? * shape.scale as f64)?;
    if let Some(cap) = shape.softcap {
        scores = ((scores / cap as f64)?.tanh()? * cap as f64)?;
    }
    let scores = scores.broadcast_add(mask)?;
    let shifted = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&spread(v)?)?.transpose(1, 2)?.reshape((s * t, heads * head_dim))
}
