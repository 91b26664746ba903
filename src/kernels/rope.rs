//! Rotary position embedding of queries and keys, in the half-split layout of Hugging Face.

/// Cosines and sines of every position's angles.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Half of the rotated width.
    pub half: usize,
    /// `[positions, half]`.
    pub cos: Vec<f32>,
    /// `[positions, half]`.
    pub sin: Vec<f32>,
}

impl RopeTable {
    /// Tables for positions `0..positions`; the angle is `position * inv_freq[i]` rounded to f32,
    /// cosine and sine are multiplied by `attention_factor`.
    pub fn new(inv_freq: &[f32], positions: usize, attention_factor: f32) -> Self {
        let angles = || (0..positions).flat_map(|p| inv_freq.iter().map(move |f| p as f32 * f));
        Self {
            half: inv_freq.len(),
            cos: angles().map(|a| a.cos() * attention_factor).collect(),
            sin: angles().map(|a| a.sin() * attention_factor).collect(),
        }
    }
}

/// Rotates each head of each row of `x`, `[positions.len(), heads * 2 * table.half]`, in place.
pub fn rope(x: &mut [f32], positions: &[u32], table: &RopeTable) {
    rotate(x, positions, table, 1.0);
}

/// Gradient of [`rope`]: rotates `dy` back in place.
pub fn rope_backward(dy: &mut [f32], positions: &[u32], table: &RopeTable) {
    rotate(dy, positions, table, -1.0);
}

fn rotate(x: &mut [f32], positions: &[u32], table: &RopeTable, sign: f32) {
    let half = table.half;
    let width = x.len() / positions.len().max(1);
    for (row, &p) in x.chunks_exact_mut(width.max(1)).zip(positions) {
        let at = p as usize * half;
        for head in row.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for i in 0..half {
                let (c, s) = (table.cos[at + i], table.sin[at + i] * sign);
                (a[i], b[i]) = (a[i] * c - b[i] * s, b[i] * c + a[i] * s);
            }
        }
    }
}
