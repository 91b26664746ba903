//! Attention against plain f64 loops, and bit for bit against itself.

use std::collections::HashMap;

use half::bf16;

use super::attention::*;
use super::attention_backward::backward_at;
use super::attention_cached::{CachedSegment, LayerPages, forward_cached_at};
use super::attention_forward::forward_at;
use super::dispatch::CpuLevel;
use super::pages::{PAGE, Page, PageDtype, PageShape};
use super::slices::rounded_to_bf16;

/// A packed batch with all its numbers.
#[derive(Clone)]
struct Batch {
    segments: Vec<Segment>,
    shape: AttentionShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

/// Results of a pass or of the f64 loops.
#[derive(Clone, Debug, Default)]
struct Numbers {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 * 4.0 - 2.0
    };
    (0..n).map(|_| next()).collect()
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    let scale = (head_dim as f32).sqrt().recip();
    let (window, softcap, rounded) = (None, None, false);
    AttentionShape { heads, kv_heads, head_dim, scale, window, softcap, rounded }
}

/// Segments of these lengths, one after the other, continuing these parents.
fn tree(lengths: &[(usize, Option<usize>)]) -> Vec<Segment> {
    let mut all: Vec<Segment> = Vec::new();
    let mut start = 0;
    for &(len, parent) in lengths {
        let position0 = parent.map_or(0, |p| all[p].position0 + all[p].len);
        all.push(Segment { start, len, position0, parent });
        start += len;
    }
    all
}

impl Batch {
    fn new(segments: Vec<Segment>, shape: AttentionShape) -> Self {
        let rows: usize = segments.iter().map(|s| s.len).sum();
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_width());
        Self {
            segments,
            shape,
            q: random(1, rows * width),
            k: random(2, rows * kv_width),
            v: random(3, rows * kv_width),
            dout: random(4, rows * width),
        }
    }

    fn run(&self, level: CpuLevel) -> Numbers {
        let mut n = self.forward(level);
        (n.dq, n.dk, n.dv) = (vec![9.0; self.q.len()], vec![9.0; self.k.len()], self.v.clone());
        let Self { q, k, v, dout, .. } = self;
        let input = BackwardInput { q, k, v, out: &n.out, lse: &n.lse, dout };
        let grads = Gradients { dq: &mut n.dq, dk: &mut n.dk, dv: &mut n.dv };
        backward_at(level, &input, &self.segments, &self.shape, grads);
        n
    }

    fn forward(&self, level: CpuLevel) -> Numbers {
        let chains = chains(&self.segments, &self.k, &self.v, self.shape.kv_width());
        let mut out = vec![9.0; self.q.len()];
        let mut lse = vec![9.0; self.q.len() / self.shape.head_dim];
        forward_at(level, &self.q, &chains, &self.shape, &mut out, Some(&mut lse));
        Numbers { out, lse, ..Numbers::default() }
    }

    /// Rows of the chain of a segment, by position.
    fn rows(&self, segment: usize) -> Vec<usize> {
        let s = &self.segments[segment];
        let mut rows = s.parent.map_or_else(Vec::new, |p| self.rows(p));
        rows.extend(s.start..s.start + s.len);
        rows
    }

    /// The batch of one segment's chain alone, as one segment without a parent.
    fn alone(&self, segment: usize) -> (Self, Vec<usize>) {
        let rows = self.rows(segment);
        let take = |x: &[f32]| {
            let width = x.len() * self.shape.heads * self.shape.head_dim / self.q.len();
            rows.iter().flat_map(|r| x[r * width..(r + 1) * width].to_vec()).collect()
        };
        let segments = tree(&[(rows.len(), None)]);
        let (q, k, v, dout) = (take(&self.q), take(&self.k), take(&self.v), take(&self.dout));
        (Self { segments, shape: self.shape, q, k, v, dout }, rows)
    }

    /// Plain loops in f64.
    fn exact(&self) -> Numbers {
        let (d, shape) = (self.shape.head_dim, &self.shape);
        let (width, kv_width) = (shape.heads * d, shape.kv_width());
        let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<f64>>();
        let (q, k, v, dout) = (wide(&self.q), wide(&self.k), wide(&self.v), wide(&self.dout));
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; q.len() / d]);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let add = |y: &mut [f64], a: f64, x: &[f64]| {
            y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
        };
        for (i, segment) in self.segments.iter().enumerate() {
            let rows = self.rows(i);
            for n in 0..segment.len * shape.heads {
                let (row, head) = (segment.start + n / shape.heads, n % shape.heads);
                let position = segment.position0 + n / shape.heads;
                let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
                let at = row * width + head * d..row * width + head * d + d;
                let kv = |j: usize| {
                    let at = rows[j] * kv_width + head / shape.group() * d;
                    at..at + d
                };
                let score = |j: usize| {
                    let s = dot(&q[at.clone()], &k[kv(j)]) * shape.scale as f64;
                    shape.softcap.map_or(s, |cap| cap as f64 * (s / cap as f64).tanh())
                };
                let top = (first..=position).map(score).fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = (first..=position).map(|j| (score(j) - top).exp()).sum();
                let log_total = top + total.ln();
                for j in first..=position {
                    add(&mut out[at.clone()], (score(j) - log_total).exp(), &v[kv(j)]);
                }
                lse[row * shape.heads + head] = log_total;
                let delta = dot(&dout[at.clone()], &out[at.clone()]);
                for j in first..=position {
                    let s = score(j);
                    let p = (s - log_total).exp();
                    let bend = shape.softcap.map_or(1.0, |cap| 1.0 - (s / cap as f64).powi(2));
                    let ds = p * (dot(&dout[at.clone()], &v[kv(j)]) - delta) * bend;
                    let ds = ds * shape.scale as f64;
                    add(&mut dv[kv(j)], p, &dout[at.clone()]);
                    add(&mut dk[kv(j)], ds, &q[at.clone()]);
                    add(&mut dq[at.clone()], ds, &k[kv(j)]);
                }
            }
        }
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        let [out, lse, dq, dk, dv] = [out, lse, dq, dk, dv].map(narrow);
        Numbers { out, lse, dq, dk, dv }
    }
}

fn assert_close(name: &str, got: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(got.len(), wanted.len());
    let size = wanted.iter().fold(1.0f32, |m, x| m.max(x.abs()));
    for (i, (x, y)) in got.iter().zip(wanted).enumerate() {
        assert!((x - y).abs() <= tolerance * size, "{name}[{i}]: {x} instead of {y}");
    }
}

fn assert_bits(name: &str, got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len(), "{name}");
    for (i, (x, y)) in got.iter().zip(wanted).enumerate() {
        assert!(x.to_bits() == y.to_bits(), "{name}[{i}]: {x} instead of {y}");
    }
}

fn assert_same(got: &Numbers, wanted: &Numbers) {
    assert_bits("out", &got.out, &wanted.out);
    assert_bits("lse", &got.lse, &wanted.lse);
    assert_bits("dq", &got.dq, &wanted.dq);
    assert_bits("dk", &got.dk, &wanted.dk);
    assert_bits("dv", &got.dv, &wanted.dv);
}

/// Shapes with grouped heads, odd head widths, windows shorter and longer than a tile, softcap.
fn shapes() -> Vec<AttentionShape> {
    vec![
        shape(2, 2, 8),
        shape(9, 3, 64),
        shape(4, 1, 16),
        shape(2, 1, 20),
        shape(4, 2, 5),
        AttentionShape { window: Some(9), ..shape(2, 1, 17) },
        AttentionShape { window: Some(1), ..shape(2, 1, 12) },
        AttentionShape { window: Some(7), ..shape(6, 2, 32) },
        AttentionShape { window: Some(70), ..shape(3, 1, 16) },
        AttentionShape { softcap: Some(1.5), ..shape(4, 2, 32) },
        AttentionShape { window: Some(33), softcap: Some(3.0), scale: 0.4, ..shape(8, 1, 24) },
    ]
}

/// A prompt with three continuations, one of them continued, beside two sequences.
fn forest() -> Vec<Segment> {
    let prompt = Some(1);
    tree(&[
        (5, None),
        (75, None),
        (40, prompt),
        (1, prompt),
        (66, prompt),
        (130, None),
        (9, Some(4)),
    ])
}

fn in_pool<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

#[test]
fn values_and_gradients_are_those_of_plain_loops() {
    for shape in shapes() {
        let batch = Batch::new(forest(), shape);
        let (got, wanted) = (batch.run(CpuLevel::detect()), batch.exact());
        assert_close("out", &got.out, &wanted.out, 1e-6);
        assert_close("lse", &got.lse, &wanted.lse, 1e-6);
        assert_close("dq", &got.dq, &wanted.dq, 5e-6);
        assert_close("dk", &got.dk, &wanted.dk, 5e-6);
        assert_close("dv", &got.dv, &wanted.dv, 5e-6);
    }
}

#[test]
fn long_segments_are_cut_into_pieces_without_a_trace() {
    let windowed = AttentionShape { window: Some(300), ..shape(2, 1, 8) };
    for shape in [shape(2, 1, 8), windowed] {
        let batch = Batch::new(tree(&[(700, None), (20, Some(0)), (300, Some(0))]), shape);
        let (got, wanted) = (batch.run(CpuLevel::detect()), batch.exact());
        assert_close("out", &got.out, &wanted.out, 1e-6);
        assert_close("dq", &got.dq, &wanted.dq, 5e-6);
        assert_close("dk", &got.dk, &wanted.dk, 5e-6);
        assert_close("dv", &got.dv, &wanted.dv, 5e-6);
    }
}

#[test]
fn large_scores_neither_overflow_nor_lose_the_maximum() {
    let sharp = AttentionShape { scale: 60.0, ..shape(2, 1, 16) };
    let batch = Batch::new(tree(&[(150, None)]), sharp);
    let (got, wanted) = (batch.run(CpuLevel::detect()), batch.exact());
    assert!(got.lse.iter().any(|x| *x > 100.0));
    assert_close("dv", &got.dv, &wanted.dv, 2e-3);
    assert_close("out", &got.out, &wanted.out, 2e-3);
}

#[test]
fn rounded_results_are_the_nearest_bf16_numbers_and_the_denominators_stay() {
    for shape in shapes() {
        let plain = Batch::new(forest(), shape);
        let rounded = Batch { shape: AttentionShape { rounded: true, ..shape }, ..plain.clone() };
        for level in [CpuLevel::Portable, CpuLevel::Avx2, CpuLevel::Avx512] {
            let (plain, rounded) = (plain.forward(level), rounded.forward(level));
            assert_ne!(plain.out, rounded.out);
            assert_bits("out", &rounded.out, &rounded_to_bf16(&plain.out));
            assert_bits("lse", &rounded.lse, &plain.lse);
        }
    }
}

#[test]
fn packed_is_alone_to_the_bit() {
    for shape in shapes() {
        let batch = Batch::new(forest(), shape);
        let packed = batch.forward(CpuLevel::detect());
        for (i, segment) in batch.segments.iter().enumerate() {
            let (alone, rows) = batch.alone(i);
            let own = alone.forward(CpuLevel::detect());
            let (width, heads) = (shape.heads * shape.head_dim, shape.heads);
            for (position, row) in rows.iter().enumerate().skip(segment.position0) {
                let (a, b) = (position * width, row * width);
                assert_bits("out", &own.out[a..a + width], &packed.out[b..b + width]);
                let (a, b) = (position * heads, row * heads);
                assert_bits("lse", &own.lse[a..a + heads], &packed.lse[b..b + heads]);
            }
        }
    }
}

/// Keys of the first `len` positions, cut into spans of `cut` positions.
fn cut<'a>(batch: &'a Batch, len: usize, cut: usize) -> Vec<KeySpan<'a>> {
    let width = batch.shape.kv_width();
    (0..len)
        .step_by(cut)
        .map(|position0| {
            let len = cut.min(len - position0);
            let part = position0 * width..(position0 + len) * width;
            KeySpan { k: &batch.k[part.clone()], v: &batch.v[part], position0, len }
        })
        .collect()
}

#[test]
fn cached_decoding_is_the_full_forward_to_the_bit() {
    for shape in shapes() {
        let batch = Batch::new(tree(&[(203, None)]), shape);
        let full = batch.forward(CpuLevel::detect());
        let width = shape.heads * shape.head_dim;
        for (step, size) in [(1, 16), (1, 203), (5, 7), (66, 1), (100, 64), (203, 37)] {
            for position0 in (0..203).step_by(step) {
                let len = step.min(203 - position0);
                let spans = cut(&batch, position0 + len, size);
                let chain = Chain { start: 0, len, position0, spans };
                let q = &batch.q[position0 * width..(position0 + len) * width];
                let mut out = vec![0.0; q.len()];
                forward(q, &[chain], &shape, &mut out, None);
                let wanted = &full.out[position0 * width..(position0 + len) * width];
                assert_bits("out", &out, wanted);
            }
        }
    }
}

#[test]
fn decoding_many_sequences_is_decoding_each() {
    let shape = AttentionShape { window: Some(90), ..shape(6, 2, 16) };
    let batch = Batch::new(tree(&[(160, None)]), shape);
    let full = batch.forward(CpuLevel::detect());
    let width = shape.heads * shape.head_dim;
    let positions: Vec<usize> = (0..64).map(|i| (i * 53 + 7) % 160).collect();
    let chains: Vec<Chain> = positions
        .iter()
        .enumerate()
        .map(|(start, &p)| Chain { start, len: 1, position0: p, spans: cut(&batch, p + 1, 16) })
        .collect();
    let at = |p: usize| p * width..(p + 1) * width;
    let q: Vec<f32> = positions.iter().flat_map(|&p| batch.q[at(p)].to_vec()).collect();
    let mut out = vec![0.0; q.len()];
    forward(&q, &chains, &shape, &mut out, None);
    for (row, &p) in positions.iter().enumerate() {
        assert_bits("out", &out[at(row)], &full.out[at(p)]);
    }
}

/// The pages of all segments' chains, equal ones once, and each segment's page numbers.
fn pages(batch: &Batch, parts: PageShape, layer: usize) -> (Vec<Page>, Vec<Vec<u32>>) {
    let width = batch.shape.kv_width();
    let (mut pages, mut known) = (Vec::new(), HashMap::new());
    let mut number = |rows: &[usize]| {
        *known.entry(rows.to_vec()).or_insert_with(|| {
            let mut page = match parts.dtype {
                PageDtype::F32 => Page::F32(vec![7.0; parts.len()].into()),
                PageDtype::Bf16 => Page::Bf16(vec![bf16::from_f32(7.0); parts.len()].into()),
            };
            let take = |x: &[f32]| -> Vec<f32> {
                rows.iter().flat_map(|r| x[r * width..][..width].to_vec()).collect()
            };
            page.write(parts, layer, 0, &take(&batch.k), &take(&batch.v));
            pages.push(page);
            pages.len() as u32 - 1
        })
    };
    let numbers = (0..batch.segments.len())
        .map(|segment| batch.rows(segment).chunks(PAGE).map(&mut number).collect());
    let numbers = numbers.collect();
    (pages, numbers)
}

#[test]
fn new_tokens_over_shared_pages_get_the_bits_of_the_full_pass() {
    let dtypes = [PageDtype::F32, PageDtype::Bf16];
    for (shape, dtype) in shapes().into_iter().flat_map(|shape| dtypes.map(|dtype| (shape, dtype)))
    {
        let shape = AttentionShape { rounded: dtype == PageDtype::Bf16, ..shape };
        let mut batch = Batch::new(forest(), shape);
        if dtype == PageDtype::Bf16 {
            (batch.k, batch.v) = (rounded_to_bf16(&batch.k), rounded_to_bf16(&batch.v));
        }
        let (layers, kv_heads, head_dim) = (2, shape.kv_heads, shape.head_dim);
        let parts = PageShape { layers, kv_heads, head_dim, dtype };
        let (pages, numbers) = pages(&batch, parts, 1);
        assert!(pages.len() < numbers.iter().map(Vec::len).sum());
        let rows = batch.segments.iter().zip(&numbers);
        let segments: Vec<_> = rows
            .map(|(s, pages)| CachedSegment {
                start: s.start,
                len: s.len,
                position0: s.position0,
                pages,
            })
            .collect();
        let layer = LayerPages { pages: &pages, shape: parts, layer: 1 };
        for level in [CpuLevel::Portable, CpuLevel::Avx2, CpuLevel::Avx512] {
            let mut out = vec![9.0; batch.q.len()];
            let mut lse = vec![9.0; batch.q.len() / shape.head_dim];
            let results = (out.as_mut_slice(), Some(lse.as_mut_slice()));
            forward_cached_at(level, &batch.q, &segments, layer, &shape, results);
            let full = batch.forward(level);
            assert_bits("out", &out, &full.out);
            assert_bits("lse", &lse, &full.lse);
        }
    }
}

#[test]
fn threads_and_instruction_set_change_no_bit() {
    for shape in shapes() {
        let batch = Batch::new(forest(), shape);
        let one = in_pool(1, || batch.run(CpuLevel::detect()));
        assert_same(&in_pool(2, || batch.run(CpuLevel::detect())), &one);
        assert_same(&in_pool(5, || batch.run(CpuLevel::detect())), &one);
        assert_same(&batch.run(CpuLevel::Portable), &one);
    }
}

#[test]
fn gradients_of_a_tree_do_not_depend_on_its_neighbours() {
    for shape in shapes() {
        let batch = Batch::new(forest(), shape);
        let packed = batch.run(CpuLevel::detect());
        let moved = Batch { segments: tree(&[(130, None)]), ..batch.clone() };
        let before: usize = batch.segments[..5].iter().map(|s| s.len).sum();
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_width());
        let part = |x: &[f32], w: usize| x[before * w..(before + 130) * w].to_vec();
        let moved = Batch {
            q: part(&batch.q, width),
            dout: part(&batch.dout, width),
            k: part(&batch.k, kv_width),
            v: part(&batch.v, kv_width),
            ..moved
        };
        let own = moved.run(CpuLevel::detect());
        assert_bits("dq", &own.dq, &part(&packed.dq, width));
        assert_bits("dk", &own.dk, &part(&packed.dk, kv_width));
        assert_bits("dv", &own.dv, &part(&packed.dv, kv_width));
    }
}

#[test]
fn an_empty_segment_changes_no_gradient() {
    for shape in shapes() {
        let with = Batch::new(tree(&[(75, None), (0, Some(0)), (40, Some(0))]), shape);
        let without = Batch { segments: tree(&[(75, None), (40, Some(0))]), ..with.clone() };
        assert_same(&with.run(CpuLevel::detect()), &without.run(CpuLevel::detect()));
    }
}

#[test]
fn a_shared_prefix_gets_the_sum_of_the_gradients_of_repeated_ones() {
    for shape in shapes() {
        let mut shared = Batch::new(tree(&[(75, None), (40, Some(0)), (66, Some(0))]), shape);
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_width());
        shared.dout[..75 * width].fill(0.0);
        let got = shared.run(CpuLevel::detect());
        let (mut dk, mut dv) = (vec![0.0; 75 * kv_width], vec![0.0; 75 * kv_width]);
        for i in [1, 2] {
            let own = shared.alone(i).0.run(CpuLevel::detect());
            dk.iter_mut().zip(&own.dk).for_each(|(sum, x)| *sum += x);
            dv.iter_mut().zip(&own.dv).for_each(|(sum, x)| *sum += x);
            let start = shared.segments[i].start * width;
            let wanted = &own.dq[75 * width..];
            assert_close("dq", &got.dq[start..start + wanted.len()], wanted, 1e-6);
        }
        assert_close("dk", &got.dk[..75 * kv_width], &dk, 1e-6);
        assert_close("dv", &got.dv[..75 * kv_width], &dv, 1e-6);
    }
}

#[test]
#[should_panic(expected = "spans do not cover the chain")]
fn a_chain_without_its_own_keys_is_refused() {
    let shape = shape(1, 1, 8);
    let batch = Batch::new(tree(&[(10, None)]), shape);
    let chain = Chain { start: 0, len: 10, position0: 0, spans: cut(&batch, 9, 4) };
    forward(&batch.q, &[chain], &shape, &mut vec![0.0; 80], None);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(40))]
    #[test]
    fn any_forest_is_its_chains_to_the_bit(
        parts in proptest::collection::vec((1usize..90, proptest::option::of(0usize..8)), 1..8),
        window in proptest::option::of(1usize..100),
    ) {
        let parts: Vec<_> = parts
            .iter()
            .enumerate()
            .map(|(i, &(len, parent))| (len, parent.filter(|p| *p < i)))
            .collect();
        let shape = AttentionShape { window, ..shape(3, 1, 8) };
        let batch = Batch::new(tree(&parts), shape);
        let packed = batch.forward(CpuLevel::detect());
        for (i, segment) in batch.segments.iter().enumerate() {
            let own = batch.alone(i).0.forward(CpuLevel::detect());
            let wanted = &packed.out[segment.start * 24..(segment.start + segment.len) * 24];
            assert_bits("out", &own.out[segment.position0 * 24..], wanted);
        }
    }
}
