//! What the policy must know of a model, as plain data: sizes, switches, one window and one rotary
//! table per layer. Families differ only in these values: nothing downstream asks for the family.

use std::fmt;

use crate::model::config_rope::Rope;

/// The architectures that are served; for messages, never for decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2, TinyLlama and everything else with `model_type = "llama"`.
    Llama,
    /// Mistral 7B: Llama with an optional sliding window in every layer.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 (dense): RMS norms on the heads of q and k.
    Qwen3,
    /// Gemma 3, text only: sandwich norms, sliding and global layers, scaled embedding.
    Gemma3,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma3 => "gemma3",
        })
    }
}

/// The non-linearity of the gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)` (SwiGLU).
    Silu,
    /// GELU by its tanh approximation (GeGLU of Gemma).
    GeluTanh,
    /// GELU by the error function.
    Gelu,
}

/// The seven matrices of a block, as LoRA addresses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Matrix {
    /// Queries, hidden → heads · head_dim.
    Q,
    /// Keys, hidden → kv heads · head_dim.
    K,
    /// Values, hidden → kv heads · head_dim.
    V,
    /// Attention output, heads · head_dim → hidden.
    O,
    /// Gate of the MLP, hidden → intermediate.
    Gate,
    /// Up projection of the MLP, hidden → intermediate.
    Up,
    /// Down projection of the MLP, intermediate → hidden.
    Down,
}

impl Matrix {
    /// All seven, in the order of a block.
    pub const ALL: [Matrix; 7] =
        [Matrix::Q, Matrix::K, Matrix::V, Matrix::O, Matrix::Gate, Matrix::Up, Matrix::Down];

    /// The module's path inside a block, as Hugging Face names it: `self_attn.q_proj`.
    pub fn module(self) -> &'static str {
        match self {
            Matrix::Q => "self_attn.q_proj",
            Matrix::K => "self_attn.k_proj",
            Matrix::V => "self_attn.v_proj",
            Matrix::O => "self_attn.o_proj",
            Matrix::Gate => "mlp.gate_proj",
            Matrix::Up => "mlp.up_proj",
            Matrix::Down => "mlp.down_proj",
        }
    }

    /// The module's own name, as PEFT's `target_modules` lists it: `q_proj`.
    pub fn short_name(self) -> &'static str {
        self.module().rsplit('.').next().unwrap_or_default()
    }
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Sliding window: the query at position p sees the key at j only if `p - j < window`.
    /// `None` sees the whole past.
    pub window: Option<usize>,
    /// Index into [`ModelConfig::ropes`].
    pub rope: usize,
}

/// A decoder's configuration, the same for every family and every kind of file.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Where it came from, for messages.
    pub family: Family,
    /// Rows of the embedding, V.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; need not be `hidden_size / num_attention_heads`. Even.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f64,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Non-linearity of the gated MLP.
    pub hidden_act: Activation,
    /// q, k and v have a bias.
    pub attention_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up and down have a bias.
    pub mlp_bias: bool,
    /// RMS norms over each head of q and k (weights `self_attn.q_norm`, `k_norm`, `[head_dim]`),
    /// before the rotation.
    pub qk_norm: bool,
    /// Four norms a block (Gemma): `input_layernorm` and `pre_feedforward_layernorm` before
    /// attention and MLP, `post_attention_layernorm` and `post_feedforward_layernorm` on what each
    /// adds to the residual stream. Without: `post_attention_layernorm` is the MLP's input norm.
    pub sandwich_norms: bool,
    /// Norm weights are stored as w with `1 + w` meant (Gemma's safetensors; its GGUF files hold
    /// the sum already).
    pub norm_plus_one: bool,
    /// Factor on the embedding's rows (Gemma: sqrt(D)). Transformers rounds it to the dtype of the
    /// embedding: exact here is its f32 value; its bf16 models use `bf16(sqrt(D))`.
    pub embedding_scale: Option<f64>,
    /// Factor on q·k before the softmax.
    pub attention_scale: f64,
    /// Logits become `cap * tanh(logits / cap)`.
    pub final_logit_softcapping: Option<f64>,
    /// One entry per block; its length is L.
    pub layers: Vec<LayerConfig>,
    /// The distinct rotary tables.
    pub ropes: Vec<Rope>,
}

impl ModelConfig {
    /// (in, out) of a block's matrix; its weight is stored as [out, in].
    pub fn linear_shape(&self, matrix: Matrix) -> (usize, usize) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        match matrix {
            Matrix::Q => (hidden, q),
            Matrix::K | Matrix::V => (hidden, kv),
            Matrix::O => (q, hidden),
            Matrix::Gate | Matrix::Up => (hidden, inner),
            Matrix::Down => (inner, hidden),
        }
    }

    /// Whether a block's matrix has a bias.
    pub fn has_bias(&self, matrix: Matrix) -> bool {
        match matrix {
            Matrix::Q | Matrix::K | Matrix::V => self.attention_bias,
            Matrix::O => self.o_bias,
            Matrix::Gate | Matrix::Up | Matrix::Down => self.mlp_bias,
        }
    }

    /// Parameters of one block: matrices, biases and norms.
    pub fn block_parameters(&self) -> usize {
        let matrices: usize = Matrix::ALL
            .iter()
            .map(|&matrix| {
                let (input, output) = self.linear_shape(matrix);
                input * output + if self.has_bias(matrix) { output } else { 0 }
            })
            .sum();
        let norms = if self.sandwich_norms { 4 } else { 2 } * self.hidden_size;
        let head_norms = if self.qk_norm { 2 * self.head_dim } else { 0 };
        matrices + norms + head_norms
    }

    /// Parameters of the whole model, a tied head counted once.
    pub fn parameters(&self) -> usize {
        let embedding = self.vocab_size * self.hidden_size;
        let tables = if self.tie_word_embeddings { embedding } else { 2 * embedding };
        tables + self.layers.len() * self.block_parameters() + self.hidden_size
    }
}
