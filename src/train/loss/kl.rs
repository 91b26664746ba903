//! Estimators of the KL divergence from the policy to the reference at a sampled token
//! (joschu.net/blog/kl-approx.html), with their derivative in the policy's log-prob.

/// Which estimator; the names are TRL's (`kl_estimator`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KlEstimator {
    /// `log p - log q`: unbiased in value, of no use in a loss, since its expected gradient is 0.
    K1,
    /// `(log p - log q)^2 / 2`.
    K2,
    /// `q / p - 1 - log (q / p)`: unbiased, never negative.
    #[default]
    K3,
}

impl KlEstimator {
    /// The estimate for the policy's log-prob `logp` and the reference's, and its derivative in `logp`.
    pub fn at(self, logp: f64, reference: f64) -> (f64, f64) {
        let d = reference - logp;
        match self {
            KlEstimator::K1 => (-d, 1.0),
            KlEstimator::K2 => (0.5 * d * d, -d),
            KlEstimator::K3 => (d.exp_m1() - d, -d.exp_m1()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [KlEstimator; 3] = [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3];

    #[test]
    fn estimates_are_those_of_the_formulas() {
        let (logp, reference) = ((0.5f64).ln(), (0.25f64).ln());
        let two = 2f64.ln();
        let want = [two, 0.5 * two * two, 0.5 - 1.0 + two];
        for (kind, want) in ALL.into_iter().zip(want) {
            assert!((kind.at(logp, reference).0 - want).abs() < 1e-12, "{kind:?}");
            assert_eq!(kind.at(logp, logp).0, 0.0);
        }
    }

    #[test]
    fn derivatives_are_finite_differences() {
        let (logp, reference, step) = (-1.3, -0.4, 1e-6);
        for kind in ALL {
            let slope = (kind.at(logp + step, reference).0 - kind.at(logp - step, reference).0)
                / (2.0 * step);
            assert!((kind.at(logp, reference).1 - slope).abs() < 1e-8, "{kind:?}");
        }
    }
}
