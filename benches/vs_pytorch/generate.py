"""Seconds of transformers' generate for the completions of benches/generate.rs.

The last line of the output is `key value ...`; new tokens a second count the prompts' time.

usage: python generate.py GGUF [--sequences 64] [--group 1] [--prompt_tokens 100] [--new_tokens 64]
       [--dtype f32|bf16] [--steps 1]
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
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    model = load(args.gguf, {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]).eval()
    starts = torch.arange(args.sequences) // args.group * args.prompt_tokens
    ids = (starts[:, None] + torch.arange(args.prompt_tokens)) * 7919 % 49000

    def draw(new_tokens):
        start = time.time()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return time.time() - start

    draw(2)
    median = statistics.median(draw(args.new_tokens) for _ in range(args.steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rate = args.sequences * args.new_tokens / median
    print(f"median_s {median:.3f} tokens_per_s {rate:.1f} peak_mib {peak}")


if __name__ == "__main__":
    main()
