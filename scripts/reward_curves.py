"""Prints the reward curves of runs as tab-separated values: run, step, reward, entropy, and at evaluations
the greedy reward of held-out prompts.

usage: python scripts/reward_curves.py RUN_FOLDER ... > curves.tsv
"""

import json
import os
import sys

COLUMNS = ["reward", "entropy", "eval_reward"]


def main():
    print("run", "step", *COLUMNS, sep="\t")
    for folder in sys.argv[1:]:
        name = os.path.basename(os.path.normpath(folder))
        with open(os.path.join(folder, "metrics.jsonl")) as lines:
            for line in map(json.loads, lines):
                cells = [line.get(column) for column in COLUMNS]
                if any(cell is not None for cell in cells):
                    shown = ["" if cell is None else f"{cell:.4f}" for cell in cells]
                    print(name, line["step"], *shown, sep="\t")


if __name__ == "__main__":
    main()
