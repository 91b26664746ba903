//! How much memory a training step takes, predicted from what the passes keep.
//!
//! Memory is resident memory of the process. Everything is counted in f32 numbers a token: `kept` for
//! the backward pass, and what the block at work needs besides.

use crate::adapter::Adapter;
use crate::heap;
use crate::model::{Matrix, ModelConfig, part_tokens};
use crate::ops::head_scratch;

/// The program, its libraries and its threads, and what the heap keeps for the next who asks.
const PROGRAM: usize = (22 << 20) + heap::MOST_BYTES;
/// Bytes for each trained parameter: its value, its gradient's sums, and the optimizer's two means.
const PARAMETER_BYTES: usize = 20;
/// Positions of a page of the cache.
const PAGE: usize = 64;
/// Share of the activations that lies unused between blocks of the heap, in hundredths.
const HEAP_GAPS: usize = 4;

/// What a pass computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassSize {
    /// Packed tokens.
    pub tokens: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Blocks are computed again in the backward pass.
    pub gradient_checkpointing: bool,
}

/// What sampling holds besides model and adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sampling {
    /// Sequences that are sampled at once.
    pub sequences: usize,
    /// Bytes of a number in the cache of keys and values.
    pub kv_bytes: usize,
    /// Bytes of matrices that stay rounded ([`Policy::keep_rounded`](crate::model::Policy::keep_rounded)).
    pub rounded: usize,
    /// Tokens of which what is computed is kept for the updates.
    pub kept: usize,
    /// Sequences that those tokens are of.
    pub kept_sequences: usize,
    /// Whether what attention reads and makes is kept of them too.
    pub attention: bool,
    /// Bytes of the head's transpose ([`Policy::transposed_head`](crate::model::Policy::transposed_head)), if gradients
    /// of the kept tokens are taken at the head.
    pub head: usize,
}

/// What is trained on what, as far as memory goes.
pub struct MemoryModel<'a> {
    config: &'a ModelConfig,
    adapters: &'a [Box<dyn Adapter>],
    weights: usize,
}

impl<'a> MemoryModel<'a> {
    /// Adapters on a model whose matrices take `weights` bytes.
    pub fn new(config: &'a ModelConfig, adapters: &'a [Box<dyn Adapter>], weights: usize) -> Self {
        MemoryModel { config, adapters, weights }
    }

    /// Most bytes that the process takes at any time in a training step.
    pub fn peak(&self, size: PassSize) -> usize {
        let parameters: usize = self.adapters.iter().map(|a| a.parameter_count()).sum();
        let activations = self.activations(size) / 100 * (100 + HEAP_GAPS);
        PROGRAM + self.weights + PARAMETER_BYTES * parameters + activations
    }

    /// Bytes that a sequence of `tokens` tokens takes in the cache of keys and values, of `kv_bytes` a number.
    pub fn cached_sequence(&self, tokens: usize, kv_bytes: usize) -> usize {
        let out = |matrix: Matrix| self.config.linear_shape(matrix).1;
        let of_token = self.config.layers.len() * (out(Matrix::K) + out(Matrix::V));
        kv_bytes * of_token * tokens.next_multiple_of(PAGE)
    }

    /// Bytes of what sampling keeps of `tokens` tokens for updates: the outputs of the blocks from below the
    /// lowest adapter on.
    pub fn recorded(&self, tokens: usize) -> usize {
        let layers = self.config.layers.len() - self.lowest().saturating_sub(1);
        4 * layers * self.config.hidden_size * tokens
    }

    /// Bytes of all that a sampling keeps for updates besides its cache: [`MemoryModel::recorded`], results of
    /// attention in bf16 and its denominators where the cache is of bf16, and gradients at the head.
    pub fn kept_of_sampling(&self, sampling: Sampling) -> usize {
        let Sampling { kept, kv_bytes, attention, head, .. } = sampling;
        let gradients = if head > 0 { kept } else { 0 };
        let mixed = 2 * self.config.linear_shape(Matrix::Q).1 + 4 * self.config.num_attention_heads;
        let of_layer = if attention && kv_bytes == 2 { mixed } else { 0 };
        let attended = of_layer * (self.config.layers.len() - self.lowest()) * kept;
        self.recorded(kept) + attended + 4 * self.config.hidden_size * gradients
    }

    /// Bytes of the cache's pages that stay for updates.
    pub fn kept_cache(&self, sampling: Sampling) -> usize {
        // each sequence has a page of its own that is not full, and copies the last one of its prompt
        let positions = sampling.kept + 2 * PAGE * sampling.kept_sequences;
        match sampling.attention {
            true => self.cached_sequence(positions, sampling.kv_bytes),
            false => 0,
        }
    }

    /// The lowest layer that has an adapter.
    fn lowest(&self) -> usize {
        let lowest = self.adapters.iter().filter_map(|adapter| adapter.lowest_layer()).min();
        lowest.unwrap_or(self.config.layers.len())
    }

    /// Most bytes that the process takes while it samples sequences of `tokens` tokens.
    pub fn sampling(&self, tokens: usize, sampling: Sampling) -> usize {
        let parameters: usize = self.adapters.iter().map(|a| a.parameter_count()).sum();
        let model = PROGRAM + self.weights + PARAMETER_BYTES * parameters + sampling.rounded;
        let cache = sampling.sequences * self.cached_sequence(tokens, sampling.kv_bytes);
        let cache = cache.max(self.kept_cache(sampling));
        model + cache + sampling.head + self.kept_of_sampling(sampling)
    }

    /// Bytes of a pass and its way back at their largest: while the head works, or while the topmost
    /// block goes back.
    fn activations(&self, size: PassSize) -> usize {
        let (hidden, block) = (self.config.hidden_size, self.block());
        let layers = self.config.layers.len();
        let lowest = self.lowest();
        let kept: usize = match size.gradient_checkpointing {
            true => (layers - lowest) * hidden,
            false => (lowest..layers).map(|layer| self.kept(layer, layer > lowest)).sum(),
        };
        let part = part(size);
        let again = if size.gradient_checkpointing { block } else { 0 };
        let head =
            4 * (kept + 2 * hidden) * size.tokens + head_scratch(self.config.vocab_size, hidden);
        let back = 4 * (kept + hidden) * size.tokens + 4 * (again + self.working()) * part;
        head.max(back)
    }

    /// Numbers a token kept of a layer; of the lowest one only what comes after its first shift.
    fn kept(&self, layer: usize, whole: bool) -> usize {
        let own: usize = self.adapters.iter().map(|adapter| adapter.kept(self.config, layer)).sum();
        let mut lowest = self.adapters.iter().filter(|a| a.lowest_layer() == Some(layer));
        let late = lowest.all(|adapter| adapter.acts_last());
        match whole || !late {
            true => own + self.block(),
            false => own + self.config.hidden_size,
        }
    }

    /// Numbers a token kept of a block that gradients pass through: its input, q, k, v, the mixed
    /// values and their softmax's denominators, the stream between its halves, gate and up.
    fn block(&self) -> usize {
        let config = self.config;
        let out = |matrix: Matrix| config.linear_shape(matrix).1;
        let attention = 2 * out(Matrix::Q) + out(Matrix::K) + out(Matrix::V);
        let norms = if config.sandwich_norms { 2 * config.hidden_size } else { 0 };
        let streams = 2 * config.hidden_size + norms;
        streams + attention + config.num_attention_heads + 2 * config.intermediate_size
    }

    /// Bytes of a block's results that are cheap to make again, and kept where it goes back at once from what
    /// sampling computed: normed streams, the input of the MLP's last matrix, queries and keys before their norm.
    pub fn cheap(&self, size: PassSize) -> usize {
        let config = self.config;
        let out = |matrix: Matrix| config.linear_shape(matrix).1;
        let unnormed = if config.qk_norm { out(Matrix::Q) + out(Matrix::K) } else { 0 };
        4 * (2 * config.hidden_size + config.intermediate_size + unnormed) * part(size)
    }

    /// Numbers a token that a block at work needs besides: the gradients of its MLP.
    fn working(&self) -> usize {
        let lora = self.adapters.iter().any(|adapter| adapter.group() == "lora");
        let inner = if lora { 4 } else { 3 } * self.config.intermediate_size;
        inner + 2 * self.config.hidden_size
    }
}

/// Tokens that go through a block at once: a part ends where a sequence ends.
fn part(size: PassSize) -> usize {
    size.tokens.min(part_tokens().max(size.longest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Lora, LoraConfig, Steering, SteeringConfig};
    use candle_core::Device;
    use serde_json::json;

    /// Peaks of `benches/sft_step` on SmolLM2, 256-token sequences, less `weights`.
    #[test]
    fn the_prediction_is_near_what_steps_on_smollm2_took() {
        let config = ModelConfig::from_json(&json!({
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
            "tie_word_embeddings": true,
        }));
        let config = config.unwrap();
        let steering = SteeringConfig::post_block(&config);
        let steering = Steering::new(steering, &config, 0, &Device::Cpu).unwrap();
        let lora = Lora::new(LoraConfig::all_linear(), &config, 0, &Device::Cpu).unwrap();
        let steering: Vec<Box<dyn Adapter>> = vec![Box::new(steering)];
        let lora: Vec<Box<dyn Adapter>> = vec![Box::new(lora)];
        let weights = 513 << 20;
        for (adapters, tokens, gradient_checkpointing, measured) in [
            (&steering, 2048, false, 1946),
            (&lora, 2048, false, 1992),
            (&steering, 2048, true, 744),
        ] {
            let size = PassSize { tokens, longest: 256, gradient_checkpointing };
            let peak = MemoryModel::new(&config, adapters, weights).peak(size) >> 20;
            let near = peak.abs_diff(measured) * 100 < 15 * measured;
            assert!(near, "{size:?}: {peak} MiB instead of {measured}");
        }
    }
}
