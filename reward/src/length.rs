//! Rewards by the length of a completion in tokens.

use std::f64::consts::PI;

/// DAPO's soft punishment of overlong completions (arXiv:2503.14476, equation 13; TRL's
/// `get_soft_overlong_punishment`): 0 up to `max_completion_length - cache` tokens, then down
/// linearly to -1 at `max_completion_length`, and -1 beyond it.
pub fn soft_overlong(tokens: usize, max_completion_length: usize, cache: usize) -> f64 {
    let allowed = max_completion_length.saturating_sub(cache);
    match tokens {
        _ if tokens <= allowed => 0.0,
        _ if tokens <= max_completion_length => -((tokens - allowed) as f64) / cache as f64,
        _ => -1.0,
    }
}

/// What a right and a wrong answer are worth at no length and at the greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CosineLength {
    /// A right answer without a token.
    pub right_short: f64,
    /// A right answer of `max_length` tokens.
    pub right_long: f64,
    /// A wrong answer without a token.
    pub wrong_short: f64,
    /// A wrong answer of `max_length` tokens.
    pub wrong_long: f64,
    /// Tokens at which the curve ends.
    pub max_length: usize,
}

impl Default for CosineLength {
    /// Open-R1's numbers: being right is better the shorter, being wrong the longer.
    fn default() -> Self {
        Self {
            right_short: 1.0,
            right_long: 0.5,
            wrong_short: -1.0,
            wrong_long: -0.5,
            max_length: 1000,
        }
    }
}

impl CosineLength {
    /// The reward on half a cosine between the two ends (arXiv:2502.03373); constant beyond
    /// `max_length`.
    pub fn reward(&self, right: bool, tokens: usize) -> f64 {
        let (short, long) = match right {
            true => (self.right_short, self.right_long),
            false => (self.wrong_short, self.wrong_long),
        };
        let done = (tokens as f64 / self.max_length.max(1) as f64).min(1.0);
        long + 0.5 * (short - long) * (1.0 + (done * PI).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlong_completions_are_punished_softly() {
        for (tokens, want) in [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.0)] {
            assert_eq!(soft_overlong(tokens, 100, 20), want, "{tokens}");
        }
        assert_eq!([soft_overlong(100, 100, 0), soft_overlong(101, 100, 0)], [0.0, -1.0]);
        assert_eq!(soft_overlong(1, 2, 10), -0.1);
    }

    #[test]
    fn right_answers_are_better_short_and_wrong_ones_long() {
        let cosine = CosineLength { max_length: 100, ..Default::default() };
        let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
        for (right, ends) in [(true, [1.0, 0.75, 0.5]), (false, [-1.0, -0.75, -0.5])] {
            for (tokens, want) in [0, 50, 100].into_iter().zip(ends) {
                assert!(close(cosine.reward(right, tokens), want), "{right} {tokens}");
            }
            assert!(close(cosine.reward(right, 500), ends[2]));
        }
    }
}
