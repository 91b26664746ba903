//! The input file of `steer forward`.

use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use steersman::model::Policy;
use steersman::{Error, Result};

/// The tensors of the input file.
pub struct Input {
    /// Token ids [B, T].
    pub ids: Vec<Vec<u32>>,
    /// Which tokens count as targets, [B, T]: `mask[t]` counts the prediction of token t, which is
    /// made at t - 1; all where the file says nothing.
    pub mask: Vec<Vec<bool>>,
    /// Prompt lengths `[B]`, if the file has them.
    pub prompt_lengths: Option<Vec<usize>>,
}

/// Reads `input_ids`, `loss_mask` and `prompt_lengths` of any integer type or boolean; other tensors
/// are passed over, but for an `attention_mask`, which would change the result.
///
/// # Errors
/// If the file is damaged or holds an `attention_mask`, or a tensor has another shape or values than
/// the model takes.
pub fn read_input(path: &Path, policy: &Policy) -> Result<Input> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let path = path.display();
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::failure(format!("{path}: damaged safetensors file: {e}")))?;
    let bad = |what: &str| Error::failure(format!("{path}: {what}"));
    if file.names().contains(&"attention_mask") {
        return Err(Error::usage(format!(
            "{path}: attention_mask is not read, since every row is a whole sequence; leave it out \
             and give rows of equal length"
        )));
    }
    let ids = file.tensor("input_ids").map_err(|_| bad("'input_ids' is missing"))?;
    let &[b, t] = ids.shape() else {
        return Err(bad("'input_ids' must have two dimensions, [B, T]"));
    };
    if b == 0 || t < 2 {
        return Err(bad("'input_ids' must hold at least one sequence of two tokens"));
    }
    let context = policy.config().max_position_embeddings;
    if t > context {
        return Err(bad(&format!(
            "sequences of {t} tokens exceed the model's context of {context}"
        )));
    }
    let table = |name: &str, shape: &[usize]| -> Result<Option<Vec<i64>>> {
        let Ok(view) = file.tensor(name) else { return Ok(None) };
        if view.shape() != shape {
            let found = view.shape();
            return Err(bad(&format!("'{name}' has shape {found:?}, wanted {shape:?}")));
        }
        let dtype = view.dtype();
        let wrong = || bad(&format!("'{name}' has type {dtype:?}, wanted integers or booleans"));
        integers(&view).map(Some).ok_or_else(wrong)
    };
    let ids = table("input_ids", &[b, t])?.unwrap_or_default();
    let vocab = policy.config().vocab_size as i64;
    if let Some(id) = ids.iter().find(|id| !(0..vocab).contains(*id)) {
        return Err(bad(&format!("token id {id} is outside the vocabulary of {vocab}")));
    }
    let mask = table("loss_mask", &[b, t])?.unwrap_or_else(|| vec![1; b * t]);
    let prompt_lengths = table("prompt_lengths", &[b])?;
    if let Some(len) = prompt_lengths.iter().flatten().find(|len| !(0..=t as i64).contains(*len)) {
        return Err(bad(&format!("prompt length {len} is not between 0 and {t}")));
    }
    Ok(Input {
        ids: ids.chunks(t).map(|row| row.iter().map(|id| *id as u32).collect()).collect(),
        mask: mask.chunks(t).map(|row| row.iter().map(|counts| *counts != 0).collect()).collect(),
        prompt_lengths: prompt_lengths.map(|all| all.iter().map(|len| *len as usize).collect()),
    })
}

/// The values of a tensor of integers or booleans; nothing for another type.
fn integers(view: &TensorView) -> Option<Vec<i64>> {
    let data = view.data();
    Some(match view.dtype() {
        Dtype::I64 => words(data, i64::from_le_bytes),
        Dtype::I32 => words(data, |word| i32::from_le_bytes(word).into()),
        Dtype::U32 => words(data, |word| u32::from_le_bytes(word).into()),
        Dtype::U8 | Dtype::BOOL => data.iter().map(|byte| (*byte).into()).collect(),
        _ => return None,
    })
}

/// Little-endian words of N bytes as integers.
fn words<const N: usize>(data: &[u8], read: impl Fn([u8; N]) -> i64) -> Vec<i64> {
    data.as_chunks().0.iter().map(|word| read(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_integer_type_and_booleans_are_read() {
        let read = |dtype, data: &[u8]| integers(&TensorView::new(dtype, vec![2], data).unwrap());
        let i64s = [3i64.to_le_bytes(), (-1i64).to_le_bytes()].concat();
        let i32s = [3i32.to_le_bytes(), (-1i32).to_le_bytes()].concat();
        let u32s = [3u32.to_le_bytes(), u32::MAX.to_le_bytes()].concat();
        assert_eq!(read(Dtype::I64, &i64s), Some(vec![3, -1]));
        assert_eq!(read(Dtype::I32, &i32s), Some(vec![3, -1]));
        assert_eq!(read(Dtype::U32, &u32s), Some(vec![3, u32::MAX.into()]));
        assert_eq!(read(Dtype::U8, &[3, 255]), Some(vec![3, 255]));
        assert_eq!(read(Dtype::BOOL, &[1, 0]), Some(vec![1, 0]));
        assert_eq!(read(Dtype::F32, &[0; 8]), None);
    }
}
