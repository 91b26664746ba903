"""Seconds of the gradients of a GRPO step in PyTorch, the twin of benches/grpo_update.rs.

64 unshared sequences of a 128-token prompt and a 128-token completion, 8 a micro-batch, logits of the
completions only, on-policy. The last line of the output is `key value ...`.

usage: python grpo_update.py GGUF [--adapter steering|lora] [--steps 1] [--micro_batch 8] [--dtype f32|bf16]
"""

import argparse
import resource
import statistics
import time

import torch
from sft_step import adapt, load, start_values

PROMPTS, COMPLETIONS, LENGTH = 8, 8, 128


def rows(numbers):
    return (numbers[:, None] * LENGTH + torch.arange(LENGTH)) * 7919 % 49000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--adapter", default="steering")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--dtype", default="f32")
    args = parser.parse_args()
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = adapt(load(args.gguf, dtype), args.adapter).train()
    start_values([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    sequence = torch.arange(PROMPTS * COMPLETIONS)
    completions = rows(PROMPTS + sequence)
    ids = torch.cat([rows(sequence // COMPLETIONS), completions], 1)
    advantages = (sequence % COMPLETIONS) - (COMPLETIONS - 1) / 2

    def step():
        start, total = time.time(), 0.0
        for part in sequence.split(args.micro_batch):
            out = model(input_ids=ids[part], logits_to_keep=LENGTH + 1, use_cache=False)
            logits = out.logits[:, :-1].float()
            picked = logits.gather(-1, completions[part, :, None]).squeeze(-1)
            logps = picked - logits.logsumexp(-1)
            ratio = torch.exp(logps - logps.detach())
            loss = -(ratio * advantages[part, None]).sum() / completions.numel()
            loss.backward()
            total -= (logps.detach() * advantages[part, None]).sum().item() / completions.numel()
        for parameter in model.parameters():
            parameter.grad = None
        return time.time() - start, total

    loss = step()[1]
    median = statistics.median(step()[0] for _ in range(args.steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"median_s {median:.3f} loss {loss:.6f} peak_mib {peak}")


if __name__ == "__main__":
    main()
