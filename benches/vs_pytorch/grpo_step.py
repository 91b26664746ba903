"""Seconds of a whole GRPO step of TRL's GRPOTrainer, the twin of benches/grpo_step.rs.

8 GSM8K questions with 8 completions of 128 tokens each, LoRA r8 on all linear layers, f32, 8 completions
a micro-batch (with 64 at once the process needs more than 24 GiB). The last line of the output is
`key value ...`.

usage: python grpo_step.py GGUF [--steps 1] [--beta 0]
needs: $STEERSMAN_DATA/gsm8k/train.jsonl or ../shared/data/gsm8k/train.jsonl
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from sft_step import load
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def questions():
    roots = [os.environ.get("STEERSMAN_DATA"), "../shared/data"]
    paths = [os.path.join(root, "gsm8k", "train.jsonl") for root in roots if root]
    path = next(path for path in paths if os.path.exists(path))
    asks = "Solve the problem step by step and end with #### and the number."
    with open(path) as lines:
        return [json.loads(line)["question"] + "\n" + asks for line, _ in zip(lines, range(64))]


def count_e(completions, **kwargs):
    return [float(text.count("e")) for text in completions]


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.time()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.time() - self.start)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.0)
    args = parser.parse_args()
    folder, name = os.path.split(os.path.abspath(args.gguf))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load(args.gguf, torch.float32)
    # its matrices were widened to f32 on loading
    model.is_quantized = False
    clock = Clock()
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        num_generations=8,
        max_completion_length=128,
        generation_kwargs={"min_new_tokens": 128},
        beta=args.beta,
        learning_rate=1e-4,
        max_steps=1 + args.steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        reward_funcs=count_e,
        train_dataset=Dataset.from_list([{"prompt": question} for question in questions()]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"median_s {statistics.median(clock.seconds[1:]):.3f} peak_mib {peak}")


if __name__ == "__main__":
    main()
