//! The learning rate's course over a run: the factors of transformers' `get_scheduler`.

use std::f64::consts::PI;

use crate::config::{LrSchedulerType, OptimArgs};

/// Factor on the peak learning rate at each step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LrScheduler {
    kind: LrSchedulerType,
    warmup_steps: u64,
    total_steps: u64,
    min_lr_rate: f64,
}

/// Number of warm-up steps: the value itself from 1 up, below 1 that share of all steps rounded up
/// (transformers' `TrainingArguments.get_warmup_steps`).
pub fn warmup_steps(value: f64, total_steps: u64) -> u64 {
    if value >= 1.0 { value as u64 } else { (total_steps as f64 * value).ceil() as u64 }
}

impl LrScheduler {
    /// The schedule of a run of `total_steps` optimizer steps.
    pub fn new(args: &OptimArgs, total_steps: u64) -> Self {
        Self {
            kind: args.lr_scheduler_type,
            warmup_steps: warmup_steps(args.warmup_steps, total_steps),
            total_steps,
            min_lr_rate: args.lr_scheduler_min_lr_rate,
        }
    }

    /// The factor for the optimizer step after `done` completed ones, so 0 for the very first step
    /// of a run with warm-up. Past the end it stays what it was there.
    pub fn factor(&self, done: u64) -> f64 {
        if self.kind == LrSchedulerType::Constant {
            return 1.0;
        }
        if done < self.warmup_steps {
            return done as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((done - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (PI * progress).cos());
        match self.kind {
            LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
            LrSchedulerType::Linear => {
                self.total_steps.saturating_sub(done) as f64 / decay_steps as f64
            }
            LrSchedulerType::Cosine => cosine,
            LrSchedulerType::CosineWithMinLr => {
                cosine * (1.0 - self.min_lr_rate) + self.min_lr_rate
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(kind: LrSchedulerType) -> Vec<f64> {
        let args = OptimArgs { lr_scheduler_type: kind, warmup_steps: 3.0, ..Default::default() };
        let scheduler = LrScheduler::new(&args, 10);
        (0..=10).map(|done| scheduler.factor(done)).collect()
    }

    /// From transformers 5.23: `get_scheduler(kind, SGD([p], lr=1.0), num_warmup_steps=3,
    /// num_training_steps=10, scheduler_specific_kwargs={"min_lr_rate": 0.1} or None)`,
    /// `get_last_lr()` before each of 11 steps.
    #[test]
    fn factors_are_those_of_transformers() {
        use LrSchedulerType::*;
        let third = [0.0, 0.333333333333, 0.666666666667];
        let cases: [(LrSchedulerType, [f64; 8]); 4] = [
            (
                Linear,
                [
                    1.0,
                    0.857142857143,
                    0.714285714286,
                    0.571428571429,
                    0.428571428571,
                    0.285714285714,
                    0.142857142857,
                    0.0,
                ],
            ),
            (
                Cosine,
                [
                    1.0,
                    0.950484433951,
                    0.811744900929,
                    0.611260466978,
                    0.388739533022,
                    0.188255099071,
                    0.049515566049,
                    0.0,
                ],
            ),
            (ConstantWithWarmup, [1.0; 8]),
            (
                CosineWithMinLr,
                [
                    1.0,
                    0.955435990556,
                    0.830570410836,
                    0.65013442028,
                    0.44986557972,
                    0.269429589164,
                    0.144564009444,
                    0.1,
                ],
            ),
        ];
        for (kind, after) in cases {
            for (got, want) in factors(kind).iter().zip(third.iter().chain(&after)) {
                assert!((got - want).abs() < 1e-12, "{kind:?}: {got} {want}");
            }
        }
        assert_eq!(factors(Constant), [1.0; 11]);
    }

    /// From transformers 5.23: `TrainingArguments(warmup_steps=value).get_warmup_steps(total)`.
    #[test]
    fn warmup_below_1_is_a_share_rounded_up() {
        for (value, total, steps) in
            [(0.03, 100, 3), (0.07, 100, 8), (0.03, 10, 1), (5.0, 100, 5), (0.0, 10, 0)]
        {
            assert_eq!(warmup_steps(value, total), steps, "{value} of {total}");
        }
    }

    #[test]
    fn the_end_is_kept_and_odd_lengths_do_not_divide_by_zero() {
        use LrSchedulerType::*;
        for kind in [Linear, Cosine, ConstantWithWarmup, CosineWithMinLr] {
            for total in 0..4 {
                let args = OptimArgs { lr_scheduler_type: kind, ..Default::default() };
                let scheduler = LrScheduler::new(&args, total);
                assert!((0..9).all(|done| (0.0..=1.0).contains(&scheduler.factor(done))));
            }
        }
        let scheduler =
            LrScheduler::new(&OptimArgs { lr_scheduler_type: Cosine, ..Default::default() }, 10);
        assert_eq!(scheduler.factor(11), scheduler.factor(10));
    }
}
