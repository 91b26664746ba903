//! Wall time, told as a rate and its share of a peak.

use std::time::{Duration, Instant};

use criterion::Throughput;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};

/// Wall time of work that is counted in FLOPs or bytes.
pub struct Rate {
    wall: WallTime,
    told: Told,
}

struct Told {
    unit: &'static str,
    /// In thousands of millions a second.
    peak: f64,
}

impl Rate {
    /// Rates in `unit` (1e9 a second) beside `peak`.
    pub fn new(unit: &'static str, peak: f64) -> Self {
        Rate { wall: WallTime, told: Told { unit, peak } }
    }
}

impl Measurement for Rate {
    type Intermediate = Instant;
    type Value = Duration;

    fn start(&self) -> Instant {
        self.wall.start()
    }

    fn end(&self, start: Instant) -> Duration {
        self.wall.end(start)
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        self.wall.add(a, b)
    }

    fn zero(&self) -> Duration {
        self.wall.zero()
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        self.wall.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &self.told
    }
}

/// What a throughput counts.
fn amount(throughput: &Throughput) -> f64 {
    match throughput {
        Throughput::Elements(amount) => *amount as f64,
        _ => 0.0,
    }
}

impl ValueFormatter for Told {
    fn format_throughput(&self, throughput: &Throughput, nanoseconds: f64) -> String {
        let rate = amount(throughput) / nanoseconds;
        let Told { unit, peak } = self;
        format!("{rate:.1} {unit} = {:.0} % of {peak:.0}", 100.0 * rate / peak)
    }

    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(&self, _: f64, per: &Throughput, values: &mut [f64]) -> &'static str {
        values.iter_mut().for_each(|value| *value = amount(per) / *value);
        self.unit
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}
