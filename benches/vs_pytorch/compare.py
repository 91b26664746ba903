"""Runs our programs and their twins, PyTorch or llama.cpp, in turn on this machine and prints the
README's table.

usage: python benches/vs_pytorch/compare.py [CASE ...] [--pairs 5] [--steps 1] [--threads N]
       python benches/vs_pytorch/compare.py --list
       python benches/vs_pytorch/compare.py [CASE ...] --losses [10] [--learning_rate 1e-3]
needs: pip install -r benches/vs_pytorch/requirements.txt

A CASE is a name of --list or the beginning of one; without any, all run. Both sides have the same
model, bf16-rounded weights, tokens, adapters, first values and threads. A cell is the median over the
pairs and, in brackets, the least and the most; a ratio is taken within each pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
MODEL = "smollm2-135m-instruct"


@dataclass
class Case:
    """A pair of programs, each of which ends with a line `median_s S ... peak_mib M`."""

    name: str
    row: str  # first cell of its row
    ours: list  # bench target and flags
    theirs: list  # script beside this one and flags; it gets the model's path first


def sft(adapter, precision, dtype):
    return Case(
        name=f"sft-{adapter}-{precision}",
        row=f"SFT step, {adapter}, `{precision}` / PyTorch {dtype}",
        ours=["sft_step", "--adapter", adapter, "--dtype", "bf16", "--matmul_precision", precision],
        theirs=["sft_step.py", "--adapter", adapter, "--dtype", dtype],
    )


def grpo(adapter, precision, dtype):
    return Case(
        name=f"grpo-{adapter}-{precision}",
        row=f"GRPO gradients, {adapter}, `{precision}` / PyTorch {dtype}",
        ours=["grpo_update", "--adapter", adapter, "--matmul_precision", precision],
        theirs=["grpo_update.py", "--adapter", adapter, "--dtype", dtype],
    )


def trl(precision):
    """A whole step of sampling, rewards and update against TRL, which is at its fastest in f32 on a CPU."""
    return Case(
        name=f"trl-lora-{precision}",
        row=f"GRPO step, lora, reuse_activations, `{precision}` / TRL f32",
        ours=["grpo_step", *"--adapter lora --reuse_activations true".split(), "--matmul_precision", precision],
        theirs=["grpo_step.py"],
    )


def generate(sequences, precision):
    """Sampling against transformers' f32, its faster type on a CPU; 64 sequences share 8 prompts."""
    flags = ["--sequences", str(sequences), "--prompt_tokens", "128", "--new_tokens", "128"]
    flags += ["--group", "8"] if sequences == 64 else []
    return Case(
        name=f"generate-{sequences}-{precision}",
        row=f"{sequences} x 128 new tokens, `{precision}` / transformers f32",
        ours=["generate", *flags, "--matmul_precision", precision],
        theirs=["generate.py", *flags],
    )


def llama(sequences, precision, dtype):
    """Sampling against llama.cpp, which is spared the drawing of tokens."""
    flags = ["--sequences", str(sequences), "--prompt_tokens", "128", "--new_tokens", "128"]
    flags += ["--group", "8"] if sequences == 64 else []
    return Case(
        name=f"llama-{sequences}-{precision}",
        row=f"{sequences} x 128 new tokens, `{precision}` / llama.cpp {dtype}",
        ours=["generate", *flags, "--matmul_precision", precision],
        theirs=["llama_generate.py", *flags, "--dtype", dtype],
    )


def matmul(rows, precision, dtype):
    """Products and input gradients of all blocks; PyTorch's are oneDNN's in bf16, MKL's in f32."""
    return Case(
        name=f"matmul-{rows}-{precision}",
        row=f"products of {rows} rows, `{precision}` / PyTorch {dtype}",
        ours=["matmul", "--rows", str(rows), "--matmul_precision", precision],
        theirs=["matmul.py", "--rows", str(rows), "--dtype", dtype],
    )


PRECISIONS = [("highest", "f32"), ("high", "f32"), ("medium", "bf16")]
ADAPTERS = ("steering", "lora")
CASES = [
    *(matmul(rows, *pair) for rows in (64, 512, 2048) for pair in PRECISIONS),
    *(sft(adapter, *pair) for adapter in ADAPTERS for pair in PRECISIONS),
    *(grpo(adapter, *pair) for adapter in ADAPTERS for pair in PRECISIONS),
    *(trl(precision) for precision in ("high", "medium")),
    *(generate(n, precision) for n in (1, 16, 64) for precision in ("high", "medium")),
    *(llama(n, *pair) for n in (1, 16, 64) for pair in (("high", "f32"), ("medium", "bf16"))),
]


def build(bench):
    """The path of a bench's program, built if need be."""
    command = ["cargo", "bench", "--bench", bench, "--no-run", "--message-format", "json"]
    out = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == bench)


def fetch_model():
    command = ["cargo", "run", "--release", "-q", "--bin", "steer", "--", "model", "fetch", MODEL]
    out = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return out.strip().splitlines()[-1]


def last_line(command, threads):
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    if ran.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{ran.stderr}")
    return ran.stdout.strip().splitlines()[-1].split()


def numbers(words):
    return {key: float(value) for key, value in zip(words[::2], words[1::2])}


def spread(values, digits):
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def cells(pairs, key, digits):
    ours, theirs = [a[key] for a, _ in pairs], [b[key] for _, b in pairs]
    ratios = [b / a for a, b in zip(ours, theirs)]
    return [spread(ours, digits), spread(theirs, digits), spread(ratios, 2)]


def compare(case, commands, pairs, threads):
    """A row of the table."""
    measured = []
    for i in range(pairs):
        measured.append([numbers(last_line(command, threads)) for command in commands])
        told = (f"{m['median_s']:.2f} s {m['peak_mib']:.0f} MiB" for m in measured[-1])
        print(f"{case.name} {i + 1}/{pairs}: " + ", other ".join(told), file=sys.stderr, flush=True)
    return [case.row, *cells(measured, "median_s", 2), *cells(measured, "peak_mib", 0)]


def compare_losses(case, commands, threads):
    """Losses of steps of both sides, and of PyTorch in f64, which shows what rounding alone does to them."""
    ours, theirs = commands
    exact = [*theirs, "--dtype", "f64"]
    ours, theirs, exact = [list(map(float, last_line(c, threads)[1:])) for c in (ours, theirs, exact)]
    print(f"{case.row}, losses; in brackets the distance from PyTorch f64")
    for step, (a, b, c) in enumerate(zip(ours, theirs, exact), 1):
        print(f"  step {step:2}: {a:.6f} [{a - c:+.1e}]  PyTorch {b:.6f} [{b - c:+.1e}]", flush=True)
    for name, a, b in (("the two", ours, theirs), ("ours and f64", ours, exact), ("PyTorch and f64", theirs, exact)):
        print(f"  {name}: at most {max(abs(x - y) for x, y in zip(a, b)):.1e} apart", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="measured steps of a run, after a first one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--losses", type=int, nargs="?", const=10, help="losses of so many steps, no times")
    parser.add_argument("--learning_rate", default="1e-3", help="of --losses")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.losses:
        args.cases = args.cases or ["sft"]
    names = args.cases or [""]
    exact = {case.name for case in CASES}.intersection(names)
    beginnings = tuple(name for name in names if name not in exact)
    chosen = [case for case in CASES if case.name in exact or case.name.startswith(beginnings)]
    if args.list or not chosen:
        print("\n".join(case.name for case in CASES))
        sys.exit(0 if args.list else f"no case is called {' or '.join(args.cases)}; these are all")
    model = fetch_model()
    programs = {bench: build(bench) for bench in {case.ours[0] for case in chosen}}
    losses = ["--losses", str(args.losses), "--learning_rate", args.learning_rate]
    flags = losses if args.losses else ["--steps", str(args.steps)]
    rows = []
    for case in chosen:
        twin = [sys.executable, os.path.join(HERE, case.theirs[0]), model]
        commands = [
            [programs[case.ours[0]], *case.ours[1:], *flags],
            [*twin, *case.theirs[1:], *flags],
        ]
        if args.losses:
            compare_losses(case, commands, args.threads)
        else:
            rows.append(compare(case, commands, args.pairs, args.threads))
    if rows:
        heads = ["", "steersman, s", "other, s", "ratio", "steersman, MiB", "other, MiB", "ratio"]
        for row in [heads, ["---"] * len(heads), *rows]:
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
