//! A penalty for saying the same again.

use std::collections::HashSet;

/// `max_penalty` times the share of n-grams of words that occurred before (Open-R1's repetition
/// penalty; arXiv:2502.03373): 0 where none repeats or the text is shorter than `n` words. Case does
/// not count; `max_penalty` is negative where repeating is bad.
pub fn repetition(completion: &str, n: usize, max_penalty: f64) -> f64 {
    let lower = completion.to_lowercase();
    let words: Vec<&str> = lower.split_whitespace().collect();
    if n == 0 || words.len() < n {
        return 0.0;
    }
    let all = words.len() + 1 - n;
    let different: HashSet<&[&str]> = words.windows(n).collect();
    max_penalty * (1.0 - different.len() as f64 / all as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_share_of_repeated_n_grams_counts() {
        assert_eq!(repetition("a b c d", 2, -1.0), 0.0);
        // ab, ba, ab: one of three is a repetition
        assert!((repetition("a b A b", 2, -0.9) + 0.3).abs() < 1e-12);
        assert_eq!(repetition("a a a a a", 1, -1.0), -0.8);
        assert_eq!([repetition("", 2, -1.0), repetition("a", 2, -1.0)], [0.0, 0.0]);
    }

    proptest! {
        #[test]
        fn the_penalty_stays_within_its_bound(text in "[ab ]{0,40}", n in 0usize..5) {
            prop_assert!((-1.0..=0.0).contains(&repetition(&text, n, -1.0)));
        }
    }
}
