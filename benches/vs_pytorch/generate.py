"""New tokens a second of transformers' generate, the twin of benches/generate.rs.

usage: python generate.py GGUF [--sequences 64] [--group 1] [--prompt_tokens 100] [--new_tokens 64]
       [--dtype f32|bf16] [--runs 3]
"""

import argparse
import os
import resource
import statistics
import time

import torch
from sft_step import load


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--prompt_tokens", type=int, default=100)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    model = load(args.gguf, {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]).eval()
    prompts = torch.arange(args.sequences) // args.group * args.prompt_tokens
    ids = (prompts[:, None] + torch.arange(args.prompt_tokens)) * 7919 % 49000
    rates = []
    for run in range(args.runs):
        start = time.time()
        with torch.no_grad():
            done = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=args.new_tokens,
                max_new_tokens=args.new_tokens,
                pad_token_id=0,
            )
        taken = time.time() - start
        tokens = (done.shape[1] - args.prompt_tokens) * args.sequences
        print(f"run {run}: {taken:.3f} s, {tokens} tokens", flush=True)
        rates.append(tokens / taken)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"tokens_per_s {statistics.median(rates):.1f} peak_mib {peak}")


if __name__ == "__main__":
    main()
