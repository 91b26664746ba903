//! Attention: packed sequences forwards and backwards, and one new token each over a long past.

use steersman::kernels::attention::{
    AttentionShape, BackwardInput, Gradients, Segment, backward, chains, forward,
};
use steersman::kernels::attention_cached::{CachedSegment, LayerPages, forward_cached};
use steersman::kernels::pages::{PAGE, Page, PageDtype, PageShape};

use crate::{Benches, measure, noise};

const SHAPE: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    scale: 0.125,
    window: None,
    softcap: None,
    rounded: false,
};
const WIDTH: usize = SHAPE.heads * SHAPE.head_dim;
const KV_WIDTH: usize = SHAPE.kv_heads * SHAPE.head_dim;

pub fn bench(benches: &mut Benches) {
    let packed: &[(usize, usize)] =
        if benches.quick { &[(8, 256)] } else { &[(8, 256), (1, 2048), (64, 64)] };
    packed.iter().for_each(|(sequences, len)| of_packed(benches, *sequences, *len));
    for sequences in [1, 16, 64] {
        of_new_tokens(benches, sequences, 512);
    }
    of_samples(benches);
}

fn of_packed(benches: &mut Benches, sequences: usize, len: usize) {
    let segment = |i| Segment { start: i * len, len, position0: 0, parent: None };
    let (segments, n): (Vec<_>, _) = ((0..sequences).map(segment).collect(), sequences * len);
    let (q, k, v) = (noise(n * WIDTH), noise(n * KV_WIDTH), noise(n * KV_WIDTH));
    let (mut out, mut lse) = (vec![0.0; n * WIDTH], vec![0.0; n * SHAPE.heads]);
    let (flops, name) = (SHAPE.flops(&segments), format!("{sequences}x{len}"));
    let all = chains(&segments, &k, &v, KV_WIDTH);
    measure(&mut benches.flops, &format!("attention/{name}"), flops, || {
        forward(&q, &all, &SHAPE, &mut out, Some(&mut lse));
    });
    let dout = noise(n * WIDTH);
    let (mut dq, mut dk, mut dv) = (vec![0.0; n * WIDTH], vec![0.0; k.len()], vec![0.0; v.len()]);
    let input = BackwardInput { q: &q, k: &k, v: &v, out: &out, lse: &lse, dout: &dout };
    measure(&mut benches.flops, &format!("attention_grad/{name}"), 5 * flops / 2, || {
        let grads = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        backward(&input, &segments, &SHAPE, grads);
    });
}

/// One query each of `sequences`, over `past` keys of their own, which lie in pages.
fn of_new_tokens(benches: &mut Benches, sequences: usize, past: usize) {
    for dtype in [PageDtype::F32, PageDtype::Bf16] {
        let (kv_heads, head_dim) = (SHAPE.kv_heads, SHAPE.head_dim);
        let shape = PageShape { layers: 1, kv_heads, head_dim, dtype };
        let (of_one, rows) = ((past + 1).div_ceil(PAGE), noise(PAGE * KV_WIDTH));
        let mut page = Page::new(shape);
        page.write(shape, 0, 0, &rows, &rows);
        let pages = vec![page; sequences * of_one];
        let numbers: Vec<u32> = (0..pages.len() as u32).collect();
        let parts = numbers.chunks(of_one).enumerate();
        let segments: Vec<_> = parts
            .map(|(start, pages)| CachedSegment { start, len: 1, position0: past, pages })
            .collect();
        let layer = LayerPages { pages: &pages, shape, layer: 0 };
        let (q, mut out) = (noise(sequences * WIDTH), vec![0.0; sequences * WIDTH]);
        let name = format!("attention_cached/{sequences}x{past}/{dtype:?}").to_lowercase();
        let bytes = 2 * sequences * (past + 1) * KV_WIDTH * dtype.bytes();
        measure(&mut benches.bytes, &name, bytes, || {
            forward_cached(&q, &segments, layer, &SHAPE, &mut out, None);
        });
    }
}

/// One query each of eight samples of eight prompts in all layers of SmolLM2-135M, whose pages are more than
/// caches hold. Samples share the prompt's whole page.
fn of_samples(benches: &mut Benches) {
    let (layers, prompts, samples, past) = (30, 8, 8, 150);
    for dtype in [PageDtype::F32, PageDtype::Bf16] {
        let (kv_heads, head_dim) = (SHAPE.kv_heads, SHAPE.head_dim);
        let shape = PageShape { layers, kv_heads, head_dim, dtype };
        let (own, sequences) = (past / PAGE, prompts * samples);
        let rows = noise(PAGE * KV_WIDTH);
        let page = |_| {
            let mut page = Page::new(shape);
            (0..layers).for_each(|layer| page.write(shape, layer, 0, &rows, &rows));
            page
        };
        let pages: Vec<_> = (0..prompts + sequences * own).map(page).collect();
        let numbers = |i: usize| {
            let first = prompts + i * own;
            std::iter::once(i / samples).chain(first..first + own).map(|page| page as u32).collect()
        };
        let numbers: Vec<Vec<u32>> = (0..sequences).map(numbers).collect();
        let segment = |(start, pages)| CachedSegment { start, len: 1, position0: past, pages };
        let segments: Vec<_> =
            numbers.iter().enumerate().map(|(i, pages)| segment((i, &pages[..]))).collect();
        let (q, mut out) = (noise(sequences * WIDTH), vec![0.0; sequences * WIDTH]);
        let name = format!("attention_cached/{prompts}x{samples}x{past}/{dtype:?}").to_lowercase();
        let read = prompts * PAGE + sequences * (past + 1 - PAGE);
        let bytes = 2 * layers * read * KV_WIDTH * dtype.bytes();
        measure(&mut benches.bytes, &name, bytes, || {
            for layer in 0..layers {
                let layer = LayerPages { pages: &pages, shape, layer };
                forward_cached(&q, &segments, layer, &SHAPE, &mut out, None);
            }
        });
    }
}
