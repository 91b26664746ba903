//! Tokenised training examples.

use sha2::{Digest, Sha256};

use crate::model::Batch;
use crate::ops::Target;

/// A sequence with the tokens that count in the loss.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenExample {
    /// Token ids; the last is usually the end-of-sequence token.
    pub input_ids: Vec<u32>,
    /// Whether each token is a target, as long as `input_ids`; the first never is.
    pub loss_mask: Vec<bool>,
    /// Length of the prompt, for steering at prompt positions.
    pub prompt_length: usize,
    /// Number of its row in the file or split, from 1; 0 if it comes from none.
    pub row: usize,
}

impl TokenExample {
    /// A prompt and its completion, which alone counts in the loss unless `whole`.
    pub fn completion(prompt: &[u32], completion: &[u32], whole: bool) -> Self {
        let input_ids = [prompt, completion].concat();
        let mut loss_mask = vec![whole; prompt.len()];
        loss_mask.resize(input_ids.len(), true);
        TokenExample { input_ids, loss_mask, prompt_length: prompt.len(), row: 0 }
    }

    /// The first `len` tokens.
    pub fn cut(mut self, len: usize) -> Self {
        self.input_ids.truncate(len);
        self.loss_mask.truncate(len);
        self.prompt_length = self.prompt_length.min(len);
        self
    }

    /// Number of targets.
    pub fn targets(&self) -> usize {
        self.loss_mask.iter().skip(1).filter(|counts| **counts).count()
    }
}

/// SHA-256 of examples, in hex: equal for the same tokens, masks and prompts in the same order.
pub fn digest(examples: &[TokenExample]) -> String {
    let mut hash = Sha256::new();
    for example in examples {
        for number in [example.input_ids.len(), example.prompt_length] {
            hash.update((number as u64).to_le_bytes());
        }
        for (id, counts) in example.input_ids.iter().zip(&example.loss_mask) {
            hash.update(id.to_le_bytes());
            hash.update([u8::from(*counts)]);
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Examples packed into one batch, and the targets that count.
#[derive(Clone, Debug, Default)]
pub struct PackedExamples {
    /// The packed tokens.
    pub batch: Batch,
    /// Each target with the row that predicts it.
    pub targets: Vec<Target>,
}

impl PackedExamples {
    /// Packs `examples`; each comes with its number in the step, which its random numbers belong to.
    pub fn new<'a>(examples: impl IntoIterator<Item = (u64, &'a TokenExample)>) -> Self {
        let mut packed = Self::default();
        for (sample, example) in examples {
            let start = packed.batch.len() as u32;
            packed.batch.begin_sample(sample);
            packed.batch.push(&example.input_ids, example.prompt_length, None);
            for t in (1..example.input_ids.len()).filter(|t| example.loss_mask[*t]) {
                let target = Target { row: start + t as u32 - 1, token: example.input_ids[t] };
                packed.targets.push(target);
            }
        }
        packed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_completion_and_its_end_by_position_not_by_id() {
        let eos = 2;
        let example = TokenExample::completion(&[1, eos, 5], &[6, 7, eos], false);
        assert_eq!(example.targets(), 3);
        let packed = PackedExamples::new([(0, &example), (1, &example)]);
        let rows: Vec<(u32, u32)> = packed.targets.iter().map(|t| (t.row, t.token)).collect();
        assert_eq!(rows, [(2, 6), (3, 7), (4, eos), (8, 6), (9, 7), (10, eos)]);
    }

    #[test]
    fn the_digest_tells_ids_masks_and_boundaries_apart() {
        let example = |prompt: &[u32], rest: &[u32]| TokenExample::completion(prompt, rest, false);
        let digests = [
            digest(&[example(&[1], &[2, 3])]),
            digest(&[example(&[1, 2], &[3])]),
            digest(&[example(&[1], &[2, 4])]),
            digest(&[example(&[1], &[2]), example(&[3], &[])]),
        ];
        let different: std::collections::BTreeSet<&String> = digests.iter().collect();
        assert_eq!(different.len(), 4);
        assert_eq!(digest(&[example(&[1], &[2, 3])]), digests[0]);
    }

    #[test]
    fn the_first_token_is_never_a_target() {
        assert_eq!(TokenExample::completion(&[], &[4, 5, 6], true).targets(), 2);
    }
}
