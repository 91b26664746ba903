//! Speed and remaining time from the last steps.

use std::collections::VecDeque;

/// Steps that the pace is averaged over.
const WINDOW: usize = 32;

/// The tokens and seconds of the last steps.
#[derive(Debug, Default)]
pub struct Pace {
    last: VecDeque<(u64, f64)>,
}

impl Pace {
    /// Takes in a step.
    pub fn push(&mut self, tokens: u64, seconds: f64) {
        if self.last.len() == WINDOW {
            self.last.pop_front();
        }
        self.last.push_back((tokens, seconds));
    }

    /// Tokens a second of the training steps; evaluations and checkpoints do not count.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let tokens: u64 = self.last.iter().map(|(tokens, _)| tokens).sum();
        let seconds = self.seconds();
        (seconds > 0.0).then(|| tokens as f64 / seconds)
    }

    /// Seconds that so many further steps take.
    pub fn seconds_for(&self, steps: u64) -> Option<f64> {
        let count = self.last.len() as f64;
        (count > 0.0).then(|| self.seconds() / count * steps as f64)
    }

    fn seconds(&self) -> f64 {
        self.last.iter().map(|(_, seconds)| seconds).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_that_of_the_last_steps() {
        let mut pace = Pace::default();
        assert_eq!((pace.tokens_per_second(), pace.seconds_for(9)), (None, None));
        pace.push(1, 1000.0);
        (0..WINDOW).for_each(|_| pace.push(100, 2.0));
        assert_eq!(pace.tokens_per_second(), Some(50.0));
        assert_eq!(pace.seconds_for(10), Some(20.0));
    }
}
