//! Causal attention over chains of segments, for grouped query heads, without padding.

/// One contiguous run of the keys and values of a chain.
#[derive(Clone, Copy, Debug)]
pub struct KeySpan<'a> {
    /// Keys, `[len, kv_heads * head_dim]`.
    pub k: &'a [f32],
    /// Values, `[len, kv_heads * head_dim]`.
    pub v: &'a [f32],
    /// Position in the chain of the first key.
    pub position0: usize,
    /// Number of keys.
    pub len: usize,
}

/// The queries of one segment and all the keys they may see.
#[derive(Clone, Debug)]
pub struct Chain<'a> {
    /// First row of the segment in the packed queries.
    pub start: usize,
    /// Number of queries.
    pub len: usize,
    /// Position in the chain of the first query.
    pub position0: usize,
    /// The keys at positions `0..position0 + len` in order, the segment's own keys last.
    pub spans: Vec<KeySpan<'a>>,
}

/// Sizes and options of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Number of query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Number of key and value heads; query head `h` reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the dot products of queries and keys.
    pub scale: f32,
    /// A query sees only keys less than this many positions back.
    pub window: Option<usize>,
    /// Bounds a score `s` to `softcap * tanh(s / softcap)`.
    pub softcap: Option<f32>,
}

/// A run of rows of a packed batch and the segment it continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row in the packed batch.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Position in the chain of the first row: where the parent ends, or 0.
    pub position0: usize,
    /// Index of the segment that this one continues, smaller than its own.
    pub parent: Option<usize>,
}

/// What the backward pass reads: the forward pass's inputs and results, and `dout`.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInput<'a> {
    /// Queries, `[N, heads * head_dim]`.
    pub q: &'a [f32],
    /// Keys, `[N, kv_heads * head_dim]`.
    pub k: &'a [f32],
    /// Values, `[N, kv_heads * head_dim]`.
    pub v: &'a [f32],
    /// Result of the forward pass, `[N, heads * head_dim]`.
    pub out: &'a [f32],
    /// Logarithm of each softmax's denominator, `[N, heads]`.
    pub lse: &'a [f32],
    /// Gradient of the loss to `out`, `[N, heads * head_dim]`.
    pub dout: &'a [f32],
}

/// Where the backward pass writes; the buffers' old contents do not matter.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Gradient to the queries, `[N, heads * head_dim]`.
    pub dq: &'a mut [f32],
    /// Gradient to the keys, `[N, kv_heads * head_dim]`.
    pub dk: &'a mut [f32],
    /// Gradient to the values, `[N, kv_heads * head_dim]`.
    pub dv: &'a mut [f32],
}

/// The chain of each segment of a packed batch whose keys and values are rows of `k` and `v`,
/// `[N, kv_width]` with `kv_width = kv_heads * head_dim`.
pub fn chains<'a>(
    segments: &[Segment],
    k: &'a [f32],
    v: &'a [f32],
    kv_width: usize,
) -> Vec<Chain<'a>> {
    let span = |s: &Segment| {
        let rows = s.start * kv_width..(s.start + s.len) * kv_width;
        KeySpan { k: &k[rows.clone()], v: &v[rows], position0: s.position0, len: s.len }
    };
    let mut all: Vec<Chain<'a>> = Vec::with_capacity(segments.len());
    for s in segments {
        let mut spans = s.parent.map_or_else(Vec::new, |p| all[p].spans.clone());
        spans.push(span(s));
        all.push(Chain { start: s.start, len: s.len, position0: s.position0, spans });
    }
    all
}

/// Softmax attention of the packed queries `q` to the keys of their chains, into `out`, both
/// `[N, heads * head_dim]`; `lse`, `[N, heads]`, is what the backward pass needs.
pub fn forward(
    q: &[f32],
    chains: &[Chain],
    shape: &AttentionShape,
    out: &mut [f32],
    mut lse: Option<&mut [f32]>,
) {
    let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
    for chain in chains {
        for i in 0..chain.len * shape.heads {
            let (row, head) = (chain.start + i / shape.heads, i % shape.heads);
            let at = row * width + head * d;
            let query = &q[at..at + d];
            let position = chain.position0 + i / shape.heads;
            let kept = scores(query, chain, shape, position, head / (shape.heads / shape.kv_heads));
            let top = kept.iter().fold(f32::NEG_INFINITY, |m, (s, _)| m.max(*s));
            let total: f32 = kept.iter().map(|(s, _)| (s - top).exp()).sum();
            let target = &mut out[at..at + d];
            target.fill(0.0);
            for (s, value) in &kept {
                let p = (s - top).exp() / total;
                target.iter_mut().zip(*value).for_each(|(o, x)| *o += p * x);
            }
            if let Some(lse) = lse.as_deref_mut() {
                lse[row * shape.heads + head] = top + total.ln();
            }
        }
    }
}

fn scores<'a>(
    query: &[f32],
    chain: &Chain<'a>,
    shape: &AttentionShape,
    position: usize,
    kv_head: usize,
) -> Vec<(f32, &'a [f32])> {
    let (d, width) = (shape.head_dim, shape.kv_heads * shape.head_dim);
    let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let mut kept = Vec::new();
    for span in &chain.spans {
        for j in 0..span.len {
            if (first..=position).contains(&(span.position0 + j)) {
                let at = j * width + kv_head * d;
                let dot: f32 = query.iter().zip(&span.k[at..at + d]).map(|(a, b)| a * b).sum();
                let s = dot * shape.scale;
                let s = shape.softcap.map_or(s, |cap| cap * (s / cap).tanh());
                kept.push((s, &span.v[at..at + d]));
            }
        }
    }
    kept
}

/// Gradients of [`forward`] over a packed batch, to queries, keys and values. A parent's keys
/// gather the gradients of all segments that continue it, in the order of their indices.
pub fn backward(
    input: &BackwardInput,
    segments: &[Segment],
    shape: &AttentionShape,
    grads: &mut Gradients,
) {
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let (width, kv_width) = (shape.heads * d, shape.kv_heads * d);
    grads.dq.fill(0.0);
    grads.dk.fill(0.0);
    grads.dv.fill(0.0);
    for segment in segments {
        let mut rows: Vec<usize> = (segment.start..segment.start + segment.len).rev().collect();
        let mut parent = segment.parent;
        while let Some(p) = parent {
            rows.extend((segments[p].start..segments[p].start + segments[p].len).rev());
            parent = segments[p].parent;
        }
        rows.reverse();
        for i in 0..segment.len * shape.heads {
            let (row, head) = (segment.start + i / shape.heads, i % shape.heads);
            let position = segment.position0 + i / shape.heads;
            let at = row * width + head * d..row * width + head * d + d;
            let delta = dot(&input.dout[at.clone()], &input.out[at.clone()]);
            let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for &key in &rows[first..=position] {
                let kv = key * kv_width + head / group * d;
                let kv = kv..kv + d;
                let mut s = dot(&input.q[at.clone()], &input.k[kv.clone()]) * shape.scale;
                let mut slope = shape.scale;
                if let Some(cap) = shape.softcap {
                    let t = (s / cap).tanh();
                    s = cap * t;
                    slope *= 1.0 - t * t;
                }
                let p = (s - input.lse[row * shape.heads + head]).exp();
                let ds = p * (dot(&input.dout[at.clone()], &input.v[kv.clone()]) - delta) * slope;
                add(&mut grads.dv[kv.clone()], p, &input.dout[at.clone()]);
                add(&mut grads.dk[kv.clone()], ds, &input.q[at.clone()]);
                add(&mut grads.dq[at.clone()], ds, &input.k[kv]);
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn add(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}
