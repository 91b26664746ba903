//! Attention: packed sequences forwards and backwards, and one new token each over a long past.

use steersman::kernels::attention::{
    AttentionShape, BackwardInput, Chain, Gradients, KeySpan, Segment, backward, chains, forward,
};

use crate::{Benches, measure, noise};

const SHAPE: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    scale: 0.125,
    window: None,
    softcap: None,
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

/// One query each of `sequences`, over `past` keys of their own.
fn of_new_tokens(benches: &mut Benches, sequences: usize, past: usize) {
    let len = past + 1;
    let floats = len * KV_WIDTH;
    let (k, v) = (noise(sequences * floats), noise(sequences * floats));
    let chain = |i: usize| {
        let rows = i * floats..(i + 1) * floats;
        let span = KeySpan { k: &k[rows.clone()], v: &v[rows], position0: 0, len };
        Chain { start: i, len: 1, position0: past, spans: vec![span] }
    };
    let all: Vec<_> = (0..sequences).map(chain).collect();
    let (q, mut out) = (noise(sequences * WIDTH), vec![0.0; sequences * WIDTH]);
    let name = format!("attention_cached/{sequences}x{past}");
    measure(&mut benches.bytes, &name, 8 * sequences * floats, || {
        forward(&q, &all, &SHAPE, &mut out, None);
    });
}
