//! The metrics of the steps between two lines, made into one line.

use serde::{Deserialize, Serialize};

use super::Metrics;

/// How a metric of several steps becomes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fold {
    /// The mean over the steps that have it.
    Mean,
    /// The sum.
    Sum,
    /// The smallest.
    Min,
    /// The largest.
    Max,
    /// That of the last step.
    Last,
}

/// The metrics of one step, each with how it is folded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepMetrics(Vec<(String, Fold, f64)>);

impl StepMetrics {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with one more.
    pub fn with(mut self, fold: Fold, name: impl Into<String>, value: f64) -> Self {
        self.0.push((name.into(), fold, value));
        self
    }

    /// Adds one.
    pub fn push(&mut self, fold: Fold, name: impl Into<String>, value: f64) {
        self.0.push((name.into(), fold, value));
    }

    /// Appends those of `other`.
    pub fn extend(&mut self, other: StepMetrics) {
        self.0.extend(other.0);
    }

    /// The step's own values.
    pub fn metrics(&self) -> Metrics {
        self.0.iter().fold(Metrics::new(), |all, (name, _, value)| all.with(name, *value))
    }

    /// A value by name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(known, ..)| known == name).map(|(_, _, value)| *value)
    }
}

/// The steps since the last line of metrics.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Seconds that they took.
    seconds: f64,
    /// How many they are.
    steps: u32,
    entries: Vec<Entry>,
}

/// What is known of one metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    fold: Fold,
    /// Number as the bits of an f64: JSON holds no infinity.
    bits: u64,
    steps: u32,
}

impl Window {
    /// Whether no step has been made since the last line.
    pub fn is_empty(&self) -> bool {
        self.steps == 0
    }

    /// Adds a step.
    pub fn add(&mut self, metrics: &StepMetrics, seconds: f64) {
        self.seconds += seconds;
        self.steps += 1;
        for (name, fold, value) in &metrics.0 {
            match self.entries.iter_mut().find(|entry| entry.name == *name) {
                Some(entry) => entry.add(*value),
                None => self.entries.push(Entry {
                    name: name.clone(),
                    fold: *fold,
                    bits: value.to_bits(),
                    steps: 1,
                }),
            }
        }
    }

    /// The metrics of its steps, `step_time` last; it is empty then.
    pub fn take(&mut self) -> Metrics {
        let Window { seconds, steps, entries } = std::mem::take(self);
        let metrics =
            entries.iter().fold(Metrics::new(), |all, entry| all.with(&entry.name, entry.value()));
        metrics.with("step_time", seconds / f64::from(steps.max(1)))
    }
}

impl Entry {
    fn add(&mut self, value: f64) {
        let old = f64::from_bits(self.bits);
        let new = match self.fold {
            Fold::Mean | Fold::Sum => old + value,
            Fold::Min => old.min(value),
            Fold::Max => old.max(value),
            Fold::Last => value,
        };
        self.bits = new.to_bits();
        self.steps += 1;
    }

    fn value(&self) -> f64 {
        let value = f64::from_bits(self.bits);
        match self.fold {
            Fold::Mean => value / f64::from(self.steps),
            _ => value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_metric_is_folded_in_its_own_way() {
        let step = |x: f64| {
            let folds = [Fold::Mean, Fold::Sum, Fold::Min, Fold::Max, Fold::Last];
            let names = ["mean", "sum", "min", "max", "last"];
            names
                .into_iter()
                .zip(folds)
                .fold(StepMetrics::new(), |all, (name, fold)| all.with(fold, name, x))
        };
        let mut window = Window::default();
        [3.0, 1.0, 2.0].into_iter().for_each(|x| window.add(&step(x), 0.5));
        let text = serde_json::to_string(&window).unwrap();
        assert_eq!(serde_json::from_str::<Window>(&text).unwrap(), window);
        let metrics = window.take();
        let values: Vec<f64> = metrics.iter().map(|(_, value)| value).collect();
        assert_eq!(values, [2.0, 6.0, 1.0, 3.0, 2.0, 0.5]);
        assert!(window.is_empty());
    }

    #[test]
    fn a_metric_that_some_steps_lack_is_the_mean_of_the_others() {
        let mut window = Window::default();
        window.add(&StepMetrics::new().with(Fold::Mean, "kl", 4.0), 1.0);
        window.add(&StepMetrics::new(), 1.0);
        assert_eq!(window.take().get("kl"), Some(4.0));
    }
}
