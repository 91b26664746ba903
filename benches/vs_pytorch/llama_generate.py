"""Seconds of llama.cpp for the completions of benches/generate.rs, without its sampling.

The prompts of a group are computed once and their cells shared; then every sequence decodes a given
token at each position, as llama-batched-bench does, so drawing tokens costs nothing here. The weights
are those of the GGUF file, requantised to --dtype. The last line of the output is `key value ...`; new
tokens a second count the prompts' time.

usage: python llama_generate.py GGUF [--sequences 64] [--group 1] [--prompt_tokens 100] [--new_tokens 64]
       [--dtype f32|bf16] [--steps 1]
"""

import argparse
import ctypes
import os
import resource
import statistics
import tempfile
import time

import llama_cpp as llama


def requantised(gguf, dtype):
    """The path of the model with all matrices in `dtype`, made once."""
    path = os.path.join(tempfile.gettempdir(), f"steersman-bench-{dtype}.gguf")
    if not os.path.exists(path):
        params = llama.llama_model_quantize_default_params()
        kinds = {"f32": llama.LLAMA_FTYPE_ALL_F32, "bf16": llama.LLAMA_FTYPE_MOSTLY_BF16}
        params.ftype, params.allow_requantize = kinds[dtype], True
        params.nthread = 1  # with more it never ends where the result is f32
        failed = llama.llama_model_quantize(gguf.encode(), (path + ".new").encode(), ctypes.byref(params))
        if failed:
            raise SystemExit(f"llama.cpp cannot requantise {gguf} to {dtype}")
        os.rename(path + ".new", path)
    return path


def context(path, args):
    """A context with room for all sequences."""
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    context.quiet = quiet  # the library keeps only a pointer to it
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = args.sequences * (args.prompt_tokens + args.new_tokens) + 256
    params.n_batch, params.n_ubatch = 2048, 512
    params.n_seq_max, params.kv_unified = args.sequences, True
    params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    return llama.llama_init_from_model(model, params)


def decode(ctx, tokens):
    """Computes (token, position, sequence, wants logits) rows."""
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence, wanted) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    failed = llama.llama_decode(ctx, batch)
    llama.llama_batch_free(batch)
    if failed:
        raise SystemExit(f"llama_decode failed with {failed}")


def draw(ctx, args, new_tokens):
    memory = llama.llama_get_memory(ctx)
    llama.llama_memory_clear(memory, True)
    start = time.time()
    prompt = args.prompt_tokens
    for first in range(0, args.sequences, args.group):
        ids = [(first // args.group * prompt + i) * 7919 % 49000 for i in range(prompt)]
        decode(ctx, [(token, i, first, i + 1 == prompt) for i, token in enumerate(ids)])
        for other in range(first + 1, first + args.group):
            llama.llama_memory_seq_cp(memory, first, other, -1, -1)
    for position in range(prompt, prompt + new_tokens - 1):
        rows = range(args.sequences)
        decode(ctx, [((position * 64 + row) * 7919 % 49000, position, row, True) for row in rows])
    return time.time() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--prompt_tokens", type=int, default=100)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bf16", choices=["f32", "bf16"])
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    ctx = context(requantised(args.gguf, args.dtype), args)
    draw(ctx, args, 2)
    median = statistics.median(draw(ctx, args, args.new_tokens) for _ in range(args.steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rate = args.sequences * args.new_tokens / median
    print(f"median_s {median:.3f} tokens_per_s {rate:.1f} peak_mib {peak}")


if __name__ == "__main__":
    main()
