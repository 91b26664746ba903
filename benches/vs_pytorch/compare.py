"""Runs our SFT step and PyTorch's in turn on the same machine and prints both with their ratio.

usage: python benches/vs_pytorch/compare.py GGUF [--pairs 5] [--steps 2] [--lora] [--dtype f32]
needs: pip install -r benches/vs_pytorch/requirements.txt, and `cargo bench --no-run`
"""

import argparse
import glob
import os
import statistics
import subprocess
import sys


def measure(command):
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    words = out.strip().splitlines()[-1].split()
    return float(words[words.index("median_s") + 1]), int(words[words.index("peak_mib") + 1])


def spread(values, digits):
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--pairs", type=int, default=5)
    args, rest = parser.parse_known_args()
    built = [p for p in glob.glob("target/release/deps/sft_step-*") if not p.endswith(".d")]
    if not built:
        sys.exit("the benchmark is not built: run cargo bench --no-run")
    ours = [max(built, key=os.path.getmtime), *rest]
    twin = os.path.join(os.path.dirname(__file__), "sft_step.py")
    theirs = [sys.executable, twin, args.gguf, *rest]
    pairs = []
    for i in range(args.pairs):
        pairs.append((measure(ours), measure(theirs)))
        (a, am), (b, bm) = pairs[-1]
        print(f"pair {i + 1}: {a:.2f} s {am} MiB, PyTorch {b:.2f} s {bm} MiB", flush=True)
    rows = [
        ("seconds a step", 2, [a for (a, _), _ in pairs], [b for _, (b, _) in pairs]),
        ("peak memory, MiB", 0, [a for (_, a), _ in pairs], [b for _, (_, b) in pairs]),
    ]
    print("\n| median [min, max] | steersman | PyTorch | PyTorch / steersman |\n|---|---|---|---|")
    for name, digits, a, b in rows:
        ratios = [y / x for x, y in zip(a, b)]
        print(f"| {name} | {spread(a, digits)} | {spread(b, digits)} | {spread(ratios, 2)} |")


if __name__ == "__main__":
    main()
