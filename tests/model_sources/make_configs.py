"""Writes configs.json: config.json texts and what transformers makes of them.

    python tests/model_sources/make_configs.py > tests/model_sources/configs.json

Made with transformers 5.23.0. Frequencies are f32 bit patterns, so that nothing is lost in print.
"""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
        "max_position_embeddings": 128}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
          "original_max_position_embeddings": 8192, "rope_type": "llama3"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "llama, all defaults of rope": {"model_type": "llama", **TINY},
    "llama, theta of transformers 4": {"model_type": "llama", **TINY, "rope_theta": 100000.0},
    "llama, theta of transformers 5": {
        "model_type": "llama", **TINY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama 3, transformers 4": {
        "model_type": "llama", **TINY, "head_dim": 64, "rope_theta": 500000.0,
        "rope_scaling": LLAMA3},
    "llama 3, transformers 5": {
        "model_type": "llama", **TINY, "head_dim": 128,
        "rope_parameters": {**LLAMA3, "factor": 32.0, "rope_theta": 500000.0}},
    "llama, linear with the old key": {
        "model_type": "llama", **TINY, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama, biases, kv heads as heads": {
        "model_type": "llama", **{k: v for k, v in TINY.items() if k != "num_key_value_heads"},
        "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-5},
    "llama, context beside the rope": {
        "model_type": "llama", **TINY, "original_max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0,
                         "low_freq_factor": 1.0}},
    "mistral, window by default": {"model_type": "mistral", **TINY},
    "mistral, window null": {"model_type": "mistral", **TINY, "sliding_window": None},
    "mistral, window 9": {"model_type": "mistral", **TINY, "sliding_window": 9,
                          "head_dim": 16, "rope_theta": 1e6},
    "qwen2, window not used": {"model_type": "qwen2", **TINY, "sliding_window": 32768,
                               "use_sliding_window": False, "max_window_layers": 2},
    "qwen2, window from layer 2 on": {"model_type": "qwen2", **TINY, "sliding_window": 7,
                                      "use_sliding_window": True, "max_window_layers": 2},
    "qwen2, yarn": {"model_type": "qwen2", **TINY, "rope_theta": 1e6, "rope_scaling": YARN},
    "qwen3, head_dim by default": {"model_type": "qwen3", **TINY, "rope_theta": 1e6},
    "qwen3, layer types": {
        "model_type": "qwen3", **TINY, "head_dim": 16, "use_sliding_window": True,
        "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2,
        "attention_bias": True},
    "qwen3, yarn with everything": {
        "model_type": "qwen3", **TINY,
        "rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": 16.0, "beta_slow": 2.0,
                            "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    "qwen3, yarn with its own attention factor": {
        "model_type": "qwen3", **TINY,
        "rope_parameters": {**YARN, "rope_theta": 1e4, "attention_factor": 0.9}},
    "gemma3, all defaults of layers": {"model_type": "gemma3_text", **TINY,
                                       "num_hidden_layers": 7},
    "gemma3, transformers 4": {
        "model_type": "gemma3_text", **TINY, "head_dim": 8, "query_pre_attn_scalar": 168,
        "rope_theta": 2e6, "rope_local_base_freq": 2e4, "sliding_window": 6,
        "sliding_window_pattern": 2, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "final_logit_softcapping": 30.0},
    "gemma3, transformers 5": {
        "model_type": "gemma3_text", **TINY, "head_dim": 8, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention",
                        "sliding_attention"], "sliding_window": 3, "attention_bias": True,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0,
                                               "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
}


def bits(tensor):
    return tensor.float().view(torch.int32).tolist()


def rope(model, kind):
    emb = model.model.rotary_emb
    if hasattr(emb, "inv_freq"):
        return {"inv_freq": bits(emb.inv_freq), "attention_factor": emb.attention_scaling}
    return {"inv_freq": bits(getattr(emb, f"{kind}_inv_freq")),
            "attention_factor": getattr(emb, f"{kind}_attention_scaling")}


def reference(text):
    config = AutoConfig.for_model(**text)
    model = AutoModelForCausalLM.from_config(config)
    layers = []
    for i, block in enumerate(model.model.layers):
        types = getattr(config, "layer_types", None)
        window = getattr(block.self_attn, "sliding_window", None)
        if config.model_type == "mistral":
            window = config.sliding_window
        kind = types[i] if types else "full_attention"
        layers.append({"window": window, **rope(model, kind)})
    attn, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "head_dim": attn.head_dim,
        "attention_scale": attn.scaling,
        "attention_bias": attn.q_proj.bias is not None,
        "o_bias": attn.o_proj.bias is not None,
        "mlp_bias": mlp.up_proj.bias is not None,
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "eps": getattr(model.model.norm, "eps", None) or model.model.norm.variance_epsilon,
        "embedding_scale": getattr(model.model.embed_tokens, "scalar_embed_scale", None),
        "layers": layers,
    }


cases = [{"name": name, "config": text, "reference": reference(dict(text))}
         for name, text in CASES.items()]
print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
