//! ListOps.
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::{Message, Problem};

fn build(rng: &mut ChaCha8Rng, depth: usize, args: (usize, usize)) -> (String, u32) {
    let n = args.0 + rng.next_u32() as usize % (args.1 - args.0 + 1);
    let op = ["MAX", "MIN", "MED", "SM"][rng.next_u32() as usize % 4];
    let mut parts = vec![];
    let mut values = vec![];
    for _ in 0..n {
        if depth > 1 && rng.next_u32() % 4 == 0 {
            let (text, value) = build(rng, depth - 1, args);
            parts.push(text);
            values.push(value);
        } else {
            let digit = rng.next_u32() % 10;
            parts.push(digit.to_string());
            values.push(digit);
        }
    }
    values.sort_unstable();
    let value = match op {
        "MAX" => values[n - 1],
        "MIN" => values[0],
        "SM" => values.iter().sum::<u32>() % 10,
        _ if n % 2 == 1 => values[n / 2],
        _ => (values[n / 2 - 1] + values[n / 2]) / 2,
    };
    (format!("[{op} {} ]", parts.join(" ")), value)
}

/// Generates.
pub fn generate(split: u64, n: usize, seed: u64) -> Vec<Problem> {
    (0..n as u64)
        .map(|id| {
            let mut key = [0u8; 32];
            key[..8].copy_from_slice(&seed.to_le_bytes());
            key[8..16].copy_from_slice(&split.to_le_bytes());
            key[16..24].copy_from_slice(&id.to_le_bytes());
            let mut rng = ChaCha8Rng::from_seed(key);
            let (text, value) = build(&mut rng, 2, (2, 4));
            let prompt = vec![Message::new("system", ""), Message::user(text)];
            Problem { id, prompt, target: value.to_string(), gold: value.to_string() }
        })
        .collect()
}
