//! How many sequences are decoded at once, on how many threads, and in which order sequences are
//! packed change no bit: every family at every precision, over KV pages and windows.

mod common;

use common::passes::{
    Adapters, alone, assert_same_bits, gradients, in_every_form, packed, several, target_logps,
    targets, text, with_threads,
};
use steersman::model::{Batch, Policy};
use steersman::ops::Target;

/// Token ids, and how many of them are the prompt.
type Text = (Vec<u32>, usize);

/// 64 texts of 3 to 84 tokens, the prompt being up to 20 of them. Their ends are such that decoding
/// them together is decoding 64, 63, ... 1 at once.
fn texts(policy: &Policy) -> Vec<Text> {
    let prompt = |i: usize| 1 + i * 7 % 20;
    (0..64).map(|i| (text(policy, i, prompt(i) + i + 2), prompt(i))).collect()
}

/// Log-probs of each text's tokens after the prompt: the prompts are taken up in one pass, then
/// every pass takes the next token of each text that goes on.
fn decoded(policy: &Policy, adapters: &Adapters, texts: &[Text]) -> Vec<Vec<f32>> {
    let mut cache = policy.kv_cache();
    let slots: Vec<_> = texts.iter().map(|_| cache.open()).collect();
    let mut logps = vec![Vec::new(); texts.len()];
    let mut sizes = Vec::new();
    for step in 0.. {
        let goes_on = |i: &usize| texts[*i].1 + step < texts[*i].0.len();
        let active: Vec<usize> = (0..texts.len()).filter(goes_on).collect();
        if active.is_empty() {
            break;
        }
        let (mut batch, mut wanted) = (Batch::new(), Vec::new());
        for (ids, prompt) in active.iter().map(|i| &texts[*i]) {
            let (from, to) = (if step == 0 { 0 } else { prompt + step - 1 }, prompt + step);
            batch.push_cached(&ids[from..to], *prompt, from);
            wanted.push(Target { row: batch.len() as u32 - 1, token: ids[to] });
        }
        let held: Vec<_> = active.iter().map(|i| slots[*i]).collect();
        let hidden = policy.hidden_cached(&batch, adapters, &mut cache, &held).unwrap();
        let found = target_logps(policy, hidden, &wanted);
        active.iter().zip(found).for_each(|(i, logp)| logps[*i].push(logp));
        sizes.push(active.len());
        active
            .iter()
            .filter(|i| logps[**i].len() + texts[**i].1 == texts[**i].0.len())
            .for_each(|i| cache.close(slots[*i]));
    }
    assert!(sizes[1..].iter().rev().copied().eq(1..=64), "{sizes:?}");
    logps
}

#[test]
fn decoding_64_sequences_down_to_1_is_decoding_each_alone() {
    in_every_form(|policy, form| {
        let (texts, adapters) = (texts(policy), several(policy));
        let wanted: Vec<_> = texts
            .iter()
            .map(|(ids, prompt)| alone(policy, &adapters, ids, *prompt)[prompt - 1..].to_vec())
            .collect();
        for threads in [1, 2] {
            let found = with_threads(threads, || decoded(policy, &several(policy), &texts));
            assert!(found == wanted, "{form}, {threads} threads");
        }
    });
}

#[test]
fn the_order_of_packing_and_the_threads_change_no_log_prob() {
    in_every_form(|policy, form| {
        let mut texts = texts(policy);
        let adapters = several(policy);
        let mut wanted: Vec<_> =
            texts.iter().map(|(ids, prompt)| alone(policy, &adapters, ids, *prompt)).collect();
        for (threads, turn) in [(1, 0), (2, 0), (1, 17), (2, 40)] {
            texts.rotate_left(turn);
            wanted.rotate_left(turn);
            let found = with_threads(threads, || packed(policy, &several(policy), &texts));
            assert!(found == wanted, "{form}, {threads} threads, turned by {turn}");
        }
    });
}

#[test]
fn the_threads_change_no_bit_of_a_gradient() {
    in_every_form(|policy, form| {
        let (mut batch, mut wanted) = (Batch::new(), Vec::new());
        for (ids, prompt) in texts(policy).iter().rev().take(30) {
            wanted.extend(targets(batch.len(), ids));
            batch.push(ids, *prompt, None);
        }
        let passes = [(batch, wanted)];
        let on =
            |threads| with_threads(threads, || gradients(policy, &several(policy), &passes, false));
        let (one, two) = (on(1), on(2));
        assert_same_bits(&one.0, &two.0, form);
        assert!(one.1 == two.1, "{form}");
    });
}
