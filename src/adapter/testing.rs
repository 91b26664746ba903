//! What the tests of several files need.

use serde_json::json;

use crate::model::ModelConfig;

/// A llama of three layers whose hidden size is 10.
pub(crate) fn tiny_model() -> ModelConfig {
    ModelConfig::from_json(&json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 10, "num_hidden_layers": 3, "num_attention_heads": 1,
        "num_key_value_heads": 1, "intermediate_size": 12, "vocab_size": 16,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    }))
    .unwrap()
}
