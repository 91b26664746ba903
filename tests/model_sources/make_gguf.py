"""Writes tiny.gguf: every storage type beside its values, and a Llama of one block.

    python tests/model_sources/make_gguf.py tests/model_sources/tiny.gguf

Made with gguf 0.19.0 (llama.cpp's own package) and numpy. `t.<TYPE>` is [2, 256] in that type and
`expect.<TYPE>` the same as llama.cpp dequantises it. The block's q and k (and their biases) are
permuted as llama.cpp's converter does; `expect.<name>` is the Hugging Face order.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize

rng = np.random.default_rng(7)
HIDDEN, HEADS, KV, HEAD, FFN, VOCAB = 16, 2, 1, 8, 24, 10


def k_quant(kind):
    """Two rows of one block of random bits with sane scales."""
    parts = {
        T.Q4_K: [("h", 2), ("b", 12), ("b", 128)],
        T.Q5_K: [("h", 2), ("b", 12), ("b", 32), ("b", 128)],
        T.Q6_K: [("b", 128), ("b", 64), ("b", 16), ("h", 1)],
    }[kind]
    rows = []
    for _ in range(2):
        row = [rng.uniform(1e-3, 1e-1, n).astype(np.float16).tobytes() if what == "h"
               else rng.integers(0, 256, n, dtype=np.uint8).tobytes() for what, n in parts]
        rows.append(np.frombuffer(b"".join(row), dtype=np.uint8))
    return np.stack(rows)


def permute(weights, heads):
    """llama.cpp's LlamaModel.permute: halves of a head become neighbours."""
    shape = weights.shape
    split = weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(shape))


def main():
    out = GGUFWriter(sys.argv[1], "llama")
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(500000.0)
    out.add_rope_dimension_count(HEAD)
    out.add_eos_token_id(2)
    out.add_eot_token_id(5)
    out.add_bos_token_id(1)

    values = rng.normal(size=(2, 256)).astype(np.float32)
    for kind in [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0,
                 T.Q4_K, T.Q5_K, T.Q6_K]:
        raw = k_quant(kind) if kind.name.endswith("K") else quantize(values, kind)
        expected = dequantize(raw, kind).astype(np.float32).reshape(2, 256)
        out.add_tensor(f"t.{kind.name}", raw, raw_dtype=kind)
        out.add_tensor(f"expect.{kind.name}", expected)

    def add(name, *shape, heads=None):
        data = rng.normal(size=shape).astype(np.float32)
        if heads:
            out.add_tensor(f"expect.{name}", data)
            data = permute(data, heads)
        out.add_tensor(name, data)

    add("token_embd.weight", VOCAB, HIDDEN)
    add("output_norm.weight", HIDDEN)
    out.add_tensor("rope_freqs.weight", np.array([1, 1, 4, 8], dtype=np.float32))
    add("blk.0.attn_norm.weight", HIDDEN)
    add("blk.0.ffn_norm.weight", HIDDEN)
    add("blk.0.attn_q.weight", HEADS * HEAD, HIDDEN, heads=HEADS)
    add("blk.0.attn_k.weight", KV * HEAD, HIDDEN, heads=KV)
    add("blk.0.attn_v.weight", KV * HEAD, HIDDEN)
    add("blk.0.attn_q.bias", HEADS * HEAD, heads=HEADS)
    add("blk.0.attn_k.bias", KV * HEAD, heads=KV)
    add("blk.0.attn_v.bias", KV * HEAD)
    add("blk.0.attn_output.weight", HIDDEN, HEADS * HEAD)
    add("blk.0.ffn_gate.weight", FFN, HIDDEN)
    add("blk.0.ffn_up.weight", FFN, HIDDEN)
    add("blk.0.ffn_down.weight", HIDDEN, FFN)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


main()
