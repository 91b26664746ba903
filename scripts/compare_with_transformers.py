"""Compares `steer forward` with transformers on random models of every family and many settings.

For each case a small model with random weights is saved, run by both, and the largest difference of
the f32 logits is printed; the exit code is 1 if one exceeds 1e-4.

usage: python scripts/compare_with_transformers.py [path/to/steer]
needs: torch, transformers, safetensors
"""

import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TOLERANCE = 1e-4
SIZES = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=256,
)
ODD = dict(
    hidden_size=10,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    vocab_size=13,
)


def rope(**options):
    return dict(rope_parameters={"rope_theta": 10000.0, **options})


def gemma(**options):
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SIZES, **options}))


def cases():
    def llama(**options):
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))

    yarn = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    scaled = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    yield "llama, biases", llama(attention_bias=True, mlp_bias=True)
    yield "llama, untied", llama(tie_word_embeddings=False)
    yield "llama, odd sizes", LlamaForCausalLM(LlamaConfig(**ODD))
    yield "llama, linear rope", llama(**rope(rope_type="linear", factor=4.0))
    yield "llama, yarn", llama(**yarn)
    yield "llama, bf16", llama().bfloat16()
    yield "llama, f16", llama().half()
    yield "mistral, window", MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9))
    yield "mistral", MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    windows = dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)
    yield "qwen2, some windows", Qwen2ForCausalLM(Qwen2Config(**SIZES, **windows))
    yield "qwen3, some windows", Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=10, **windows))
    yield "qwen3, biases", Qwen3ForCausalLM(Qwen3Config(**SIZES, attention_bias=True))
    yield "gemma3, softcap", gemma(
        num_hidden_layers=7,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=8,
        final_logit_softcapping=30.0,
    )
    yield "gemma3, scaled rope", gemma(
        head_dim=16, sliding_window=11, rope_parameters=scaled, layer_types=layers
    )


def difference(steer, model, folder):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        base = 0.0 if parameter.ndim > 1 else parameter.data.float()
        parameter.data = (base + 0.15 * noise).to(parameter.dtype)
    model.save_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 40), generator=generator)
    with torch.no_grad():
        wanted = reference(ids, use_cache=False).logits
    given, found = f"{folder}/in.safetensors", f"{folder}/out.safetensors"
    save_file({"input_ids": ids}, given)
    command = [steer, "forward", "--model_name_or_path", folder, "--dtype", "f32"]
    subprocess.run([*command, "--input", given, "--output", found], check=True)
    return (load_file(found)["logits"] - wanted).abs().max().item()


def main():
    steer = sys.argv[1] if len(sys.argv) > 1 else "target/release/steer"
    torch.manual_seed(0)
    worst = 0.0
    for name, model in cases():
        with tempfile.TemporaryDirectory() as folder:
            off = difference(steer, model, folder)
        worst = max(worst, off)
        print(f"{name:24} {off:.1e}", flush=True)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
