//! How much memory a training pass takes.

use crate::model::{Matrix, ModelConfig};

/// Bytes of activations that a pass over `tokens` packed tokens keeps for the backward pass, with a
/// steering adapter in every layer, plus the working memory of one block.
///
/// A block keeps, in f32: its input, the normed inputs of both halves, q, k and v before and after
/// rotation, the mixed values, gate, up, their product, and its output before and after the shift.
pub fn activation_bytes(config: &ModelConfig, tokens: usize, checkpointing: bool) -> usize {
    let out = |matrix: Matrix| config.linear_shape(matrix).1;
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let qkv = out(Matrix::Q) + out(Matrix::K) + out(Matrix::V);
    let attention = qkv + out(Matrix::Q) + out(Matrix::K) + out(Matrix::Q);
    let block = 5 * hidden + attention + 3 * inner;
    let kept = if checkpointing { hidden } else { block };
    let working = block + 4 * inner;
    4 * tokens * (config.layers.len() * kept + working)
}
