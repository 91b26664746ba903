//! Estimators of the KL divergence from the policy to the reference at a sampled token
//! (joschu.net/blog/kl-approx.html), with their derivative in the policy's log-prob.

use crate::config::KlEstimator;

/// The estimate for the policy's log-prob `logp` and the reference's, and its derivative in `logp`.
pub fn kl(estimator: KlEstimator, logp: f64, reference: f64) -> (f64, f64) {
    let d = reference - logp;
    match estimator {
        KlEstimator::K1 => (-d, 1.0),
        KlEstimator::K2 => (0.5 * d * d, -d),
        KlEstimator::K3 => (d.exp_m1() - d, -d.exp_m1()),
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
            assert!((kl(kind, logp, reference).0 - want).abs() < 1e-12, "{kind:?}");
            assert_eq!(kl(kind, logp, logp).0, 0.0);
        }
    }

    #[test]
    fn derivatives_are_finite_differences() {
        let (logp, reference, step) = (-1.3, -0.4, 1e-6);
        for kind in ALL {
            let slope = (kl(kind, logp + step, reference).0 - kl(kind, logp - step, reference).0)
                / (2.0 * step);
            assert!((kl(kind, logp, reference).1 - slope).abs() < 1e-8, "{kind:?}");
        }
    }
}
