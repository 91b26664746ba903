"""Seconds of one SFT step in PyTorch, the twin of benches/sft_step.rs.

8 x 256 tokens, all in the loss, AdamW included; post-block linear steering of rank 8 by forward hooks,
or PEFT's LoRA r8 on all linear layers. With f32 the matrices are rounded to bf16 and widened again, so
that both sides have the same numbers. The last line of the output is `key value ...`.

usage: python sft_step.py GGUF [--adapter steering|lora] [--steps N] [--losses N] [--dtype f32|bf16|f64]
                          [--learning_rate 1e-3]
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
        self.down = torch.nn.Parameter(torch.zeros(rank, width))
        self.up = torch.nn.Parameter(torch.zeros(width, rank))

    def forward(self, h):
        return h + (h @ self.down.T.to(h.dtype)) @ self.up.T.to(h.dtype)


def load(path, dtype):
    folder, name = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    return model.requires_grad_(False)


def adapt(model, kind):
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for block in model.model.layers:
        block.steering = PostBlock(model.config.hidden_size, 8)
        block.register_forward_hook(
            lambda module, args, out: (module.steering(out[0]), *out[1:])
            if isinstance(out, tuple)
            else module.steering(out)
        )
    return model


def start_values(parameters):
    """Those of benches/sft_step.rs: a pattern for the first matrix of a pair, zeros for the second."""
    for name, parameter in parameters:
        first = "lora_A" in name or name.endswith(".down")
        bound = parameter.shape[1] ** -0.5 if first else 0.0
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        values = ((i * 7919 % 1000) / 500 - 1) * bound
        parameter.data = values.reshape(parameter.shape).to(parameter.dtype)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--adapter", default="steering")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--losses", type=int)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}[args.dtype]
    model = adapt(load(args.gguf, dtype), args.adapter).train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    start_values(trained)
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=args.learning_rate, weight_decay=0.0)
    position = torch.arange(SEQUENCES * LENGTH).reshape(SEQUENCES, LENGTH)
    ids = position * 7919 % 49000

    def step():
        start = time.time()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.time() - start, loss.item()

    if args.losses:
        print("losses", *(f"{step()[1]:.7f}" for _ in range(args.losses)))
        return
    step()
    median = statistics.median(step()[0] for _ in range(args.steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rate = SEQUENCES * LENGTH / median
    print(f"median_s {median:.3f} tokens_per_s {rate:.1f} peak_mib {peak}")


if __name__ == "__main__":
    main()
