//! Confidence intervals of proportions.

use statrs::distribution::{ContinuousCDF, Normal};

/// A proportion of successes with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Proportion {
    /// Number of successes.
    pub successes: usize,
    /// Number of trials.
    pub trials: usize,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Proportion {
    /// The Wilson score interval (Wilson 1927), which stays inside [0, 1] and is right near its
    /// ends.
    pub fn new(successes: usize, trials: usize) -> Self {
        if trials == 0 {
            return Proportion { successes, trials, low: 0.0, high: 1.0 };
        }
        let z = Normal::standard().inverse_cdf(0.975);
        let (n, p) = (trials as f64, successes as f64 / trials as f64);
        let centre = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        let (low, high) = ((centre - half).max(0.0), (centre + half).min(1.0));
        Proportion { successes, trials, low: low.min(p), high: high.max(p) }
    }

    /// The share of successes.
    pub fn rate(&self) -> f64 {
        self.successes as f64 / self.trials.max(1) as f64
    }

    /// The share and its interval in per cent: `50.0 % [44.4, 55.6]`.
    pub fn percent(&self) -> String {
        let [rate, low, high] = [self.rate(), self.low, self.high].map(|share| 100.0 * share);
        format!("{rate:.1} % [{low:.1}, {high:.1}]")
    }

    /// Whether two intervals share no point.
    pub fn is_apart_from(&self, other: &Proportion) -> bool {
        self.high < other.low || other.high < self.low
    }
}

impl std::fmt::Display for Proportion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}/{})", self.percent(), self.successes, self.trials)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_wilson() {
        let close = |p: Proportion, low: f64, high: f64| {
            assert!((p.low - low).abs() < 1e-4 && (p.high - high).abs() < 1e-4, "{p:?}");
        };
        close(Proportion::new(0, 10), 0.0, 0.27753);
        close(Proportion::new(5, 10), 0.23659, 0.76341);
        close(Proportion::new(126, 300), 0.36551, 0.47652);
    }

    #[test]
    fn a_proportion_is_written_with_its_interval_and_counts() {
        let text = Proportion::new(150, 300).to_string();
        assert_eq!(text, "50.0 % [44.4, 55.6] (150/300)");
    }

    #[test]
    fn intervals_that_overlap_are_not_apart() {
        let (a, b) = (Proportion::new(10, 100), Proportion::new(15, 100));
        assert!(!a.is_apart_from(&b));
        assert!(a.is_apart_from(&Proportion::new(50, 100)));
    }
}
