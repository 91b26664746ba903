"""Greedy answers of transformers to ten GSM8K questions, as hashes, for tests/smollm2.rs.

The model is SmolLM2's GGUF file, dequantised to f32 by transformers. Questions 0 to 9 of the test
split are asked as one user message; the prompt is tokenised with digits split one by one, as the
model's own tokenizer does. Each line of the fixture: tokens in the prompt, sha256 of its ids, new
tokens, sha256 of the new ids (little-endian u32, the ending token included).

usage: python scripts/gsm8k_greedy_fixture.py GGUF GSM8K_TEST_JSONL > tests/fixtures/gsm8k_greedy.txt
"""

import hashlib
import json
import os
import struct
import sys

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 128


def digest(ids):
    return hashlib.sha256(b"".join(struct.pack("<I", i) for i in ids)).hexdigest()


def main():
    folder, name = os.path.split(os.path.abspath(sys.argv[1]))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    rows = [json.loads(line) for line in open(sys.argv[2])][:10]
    for row in rows:
        messages = [{"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = backend.encode(text, add_special_tokens=False).ids
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[0].tolist()
        new = ids[len(prompt) :]
        print(len(prompt), digest(prompt), len(new), digest(new), flush=True)
        print(tokenizer.decode(new)[:200].replace("\n", " "), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
