"""The products of benches/matmul.rs in PyTorch: oneDNN's bf16 or MKL's f32.

usage: python benches/vs_pytorch/matmul.py MODEL [--rows 512] [--dtype f32|bf16] [--steps 5]
"""

import argparse
import os
import resource
import statistics
import time

import torch

LAYERS = 30
SHAPES = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="not read; the comparison gives it to every script")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    torch.manual_seed(0)
    layers = [torch.rand(outputs, inputs).to(dtype) for _ in range(LAYERS) for inputs, outputs in SHAPES]
    x = {n: torch.rand(args.rows, n).to(dtype) for n in (192, 576, 1536)}

    def one_pass():
        start = time.perf_counter()
        for w in layers:
            torch.nn.functional.linear(x[w.shape[1]], w)
            torch.mm(x[w.shape[0]], w)
        return time.perf_counter() - start

    with torch.inference_mode():
        one_pass()
        seconds = statistics.median(one_pass() for _ in range(args.steps))
    flops = 4 * args.rows * LAYERS * sum(inputs * outputs for inputs, outputs in SHAPES)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"median_s {seconds:.4f} gflop_s {flops / seconds / 1e9:.0f} peak_mib {peak}")


if __name__ == "__main__":
    main()
