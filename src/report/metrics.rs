//! Named values of a step.

use serde::de::Error as _;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// Named values in the order in which they were set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(Vec<(String, f64)>);

impl Metrics {
    /// No values.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a value; a name that is there keeps its place.
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    /// The same with one more value set.
    pub fn with(mut self, name: impl Into<String>, value: f64) -> Self {
        self.set(name, value);
        self
    }

    /// A value by name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// All values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

/// The metrics of one step: a line of `metrics.jsonl` and an entry of `log_history`. In JSON a flat
/// object, `step` first; whole numbers without a point, and `null` for a value that is not finite.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricLine {
    /// Optimizer steps made.
    pub step: u64,
    /// The values.
    pub metrics: Metrics,
}

impl MetricLine {
    /// The metrics of a step.
    pub fn new(step: u64, metrics: Metrics) -> Self {
        Self { step, metrics }
    }
}

/// Whole numbers below this are exact as f64 and as integers.
const EXACT: f64 = (1u64 << 53) as f64;

impl Serialize for MetricLine {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        map.serialize_entry("step", &self.step)?;
        for (name, value) in self.metrics.iter().filter(|(name, _)| *name != "step") {
            match value.fract() == 0.0 && value.abs() < EXACT {
                true => map.serialize_entry(name, &(value as i64))?,
                false => map.serialize_entry(name, &value)?,
            }
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for MetricLine {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut map = Map::<String, Value>::deserialize(from)?;
        let step = map.shift_remove("step").and_then(|step| step.as_u64());
        let step = step.ok_or_else(|| D::Error::custom("step is missing or no whole number"))?;
        let mut metrics = Metrics::new();
        for (name, value) in map {
            let number = match value {
                Value::Null => Some(f64::NAN),
                value => value.as_f64(),
            };
            let number = number.ok_or_else(|| D::Error::custom(format!("{name} is no number")))?;
            metrics.set(name, number);
        }
        Ok(Self { step, metrics })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_is_a_flat_object_in_the_order_of_setting() {
        let mut metrics = Metrics::new().with("loss", 1.25).with("num_tokens", 4096.0);
        metrics.set("epoch", f64::NAN);
        metrics.set("loss", 0.1);
        let text = serde_json::to_string(&MetricLine::new(3, metrics)).unwrap();
        assert_eq!(text, r#"{"step":3,"loss":0.1,"num_tokens":4096,"epoch":null}"#);
        let line: MetricLine = serde_json::from_str(&text).unwrap();
        assert_eq!((line.step, line.metrics.get("loss")), (3, Some(0.1)));
        assert!(line.metrics.get("epoch").unwrap().is_nan());
        for bad in [r#"{"loss":1}"#, r#"{"step":-1}"#, r#"{"step":1,"loss":"x"}"#, "[]"] {
            assert!(serde_json::from_str::<MetricLine>(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_line_reads_back_to_the_bit(
            step in any::<u64>(),
            values in prop::collection::btree_map("[a-r_/]{1,9}", any::<f64>(), 0..6),
        ) {
            let mut metrics = Metrics::new();
            for (name, value) in values.iter().filter(|(_, value)| value.is_finite()) {
                metrics.set(name, *value);
            }
            let line = MetricLine::new(step, metrics);
            let text = serde_json::to_string(&line).unwrap();
            prop_assert_eq!(serde_json::from_str::<MetricLine>(&text).unwrap(), line);
        }
    }
}
