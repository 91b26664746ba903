"""Seconds of one SFT step in PyTorch, the twin of benches/sft_step.rs.

8 x 256 random tokens, all in the loss, f32 or bf16; post-block linear steering of rank 8 by forward
hooks, or PEFT's LoRA r8 on all linear layers.

usage: python sft_step.py GGUF [--lora] [--steps N] [--dtype f32|bf16]
"""

import argparse
import os
import resource
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

SEQUENCES, LENGTH = 8, 256


class PostBlock(torch.nn.Module):
    """h + Wup Wdown h"""

    def __init__(self, width, rank):
        super().__init__()
        self.down = torch.nn.Parameter((torch.rand(rank, width) * 2 - 1) * 1e-3 / width**0.5)
        self.up = torch.nn.Parameter(torch.zeros(width, rank))

    def forward(self, h):
        return h + (h @ self.down.T.to(h.dtype)) @ self.up.T.to(h.dtype)


def load(path, dtype):
    folder, name = os.path.split(os.path.abspath(path))
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)


def adapt(model, lora):
    if lora:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.requires_grad_(False)
    for block in model.model.layers:
        adapter = PostBlock(model.config.hidden_size, 8)
        block.steering = adapter
        block.register_forward_hook(
            lambda module, args, out: (module.steering(out[0]), *out[1:])
            if isinstance(out, tuple)
            else module.steering(out)
        )
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="f32")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = adapt(load(args.gguf, dtype), args.lora).train()
    position = torch.arange(SEQUENCES * LENGTH).reshape(SEQUENCES, LENGTH)
    ids = position * 7919 % 49000
    seconds = []
    for step in range(args.steps + 1):
        start = time.time()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        taken = time.time() - start
        print(f"step {step}: {taken:.3f} s, loss {loss.item():.6f}", flush=True)
        if step > 0:
            seconds.append(taken)
    median = statistics.median(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rate = SEQUENCES * LENGTH / median
    print(f"median_s {median:.3f} tokens_per_s {rate:.1f} peak_mib {peak}")


if __name__ == "__main__":
    main()
