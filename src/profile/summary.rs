//! Sums over all spans of a name, and the table of them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use super::recorder::{Done, Kind};

/// What all spans of a name did.
#[derive(Default)]
struct Line {
    calls: u64,
    /// Without spans of the same kind inside.
    time: Duration,
    /// With them.
    whole: Duration,
    flops: u64,
    bytes: u64,
    tokens: u64,
}

/// Sums by kind and name.
#[derive(Default)]
pub(super) struct Summary(BTreeMap<(Kind, &'static str), Line>);

impl Summary {
    /// Counts a span; returns the tokens of its name so far.
    pub(super) fn add(&mut self, done: &Done) -> u64 {
        let line = self.0.entry((done.kind, done.name)).or_default();
        line.calls += 1;
        line.time += done.taken.saturating_sub(done.nested);
        line.whole += done.taken;
        line.flops += done.fields.get("flops");
        line.bytes += done.fields.get("bytes");
        line.tokens += done.fields.get("tokens");
        line.tokens
    }

    /// Phases, then operations, each with the longest first, as shares of `all`.
    pub(super) fn table(&self, all: Duration, trace: &Path) -> String {
        let mut text = format!(
            "profile of {:.3} s; {} opens in ui.perfetto.dev\n",
            all.as_secs_f64(),
            trace.display()
        );
        for (kind, heading, rates) in [
            (Kind::Phase, "phase", ["tokens", "tokens/s"]),
            (Kind::Op, "operation", ["GFLOP/s", "GB/s"]),
        ] {
            let [first, second] = rates;
            let _ = write!(text, "\n{heading:<26}   calls    seconds   share");
            let _ = writeln!(text, " {first:>10} {second:>10}");
            text += &self.lines(kind, all);
        }
        text.truncate(text.trim_end().len());
        text
    }

    fn lines(&self, kind: Kind, all: Duration) -> String {
        let mut lines: Vec<_> = self.0.iter().filter(|((of, _), _)| *of == kind).collect();
        lines.sort_by_key(|(_, line)| std::cmp::Reverse(line.time));
        let mut text = String::new();
        let mut rest = all;
        for ((_, name), line) in lines {
            rest = rest.saturating_sub(line.time);
            let per_second = |n: u64, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
            let rates = match kind {
                Kind::Phase => [line.tokens as f64, per_second(line.tokens, line.whole)],
                Kind::Op => [line.flops, line.bytes].map(|n| per_second(n, line.time) / 1e9),
            };
            text += &row(name, &line.calls.to_string(), line.time, all);
            let decimals = if kind == Kind::Phase { 0 } else { 1 };
            for rate in rates {
                let rate = if rate > 0.0 { format!("{rate:.decimals$}") } else { String::new() };
                let _ = write!(text, " {rate:>10}");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text + &row("outside of these", "", rest, all) + "\n"
    }
}

fn row(name: &str, calls: &str, time: Duration, all: Duration) -> String {
    let (seconds, whole) = (time.as_secs_f64(), all.as_secs_f64().max(1e-9));
    format!("{name:<26} {calls:>7} {seconds:>10.3} {:>5.1} %", 100.0 * seconds / whole)
}

#[cfg(test)]
mod tests {
    use super::super::recorder::Fields;
    use super::*;

    #[test]
    fn shares_add_up_although_spans_lie_inside_each_other() {
        let mut summary = Summary::default();
        let second = Duration::from_secs(1);
        let done = |kind, name, seconds: u32, nested: u32, fields: &[(&'static str, u64)]| Done {
            kind,
            name,
            fields: Fields(fields.to_vec()),
            start: Duration::ZERO,
            taken: second * seconds,
            nested: second * nested,
        };
        summary.add(&done(Kind::Phase, "step", 8, 6, &[("tokens", 16)]));
        summary.add(&done(Kind::Phase, "forward", 6, 0, &[("tokens", 12)]));
        summary.add(&done(Kind::Op, "linear", 3, 0, &[("flops", 6_000_000_000)]));
        let tokens = summary.add(&done(Kind::Phase, "forward", 0, 0, &[("tokens", 6)]));
        assert_eq!(tokens, 18);
        let table = summary.table(10 * second, Path::new("t.json"));
        let words = |name: &str| -> Vec<String> {
            let line = table.lines().find(|line| line.starts_with(name)).unwrap();
            line[26..].split_whitespace().map(String::from).collect()
        };
        assert_eq!(words("forward"), ["2", "6.000", "60.0", "%", "18", "3"]);
        assert_eq!(words("step"), ["1", "2.000", "20.0", "%", "16", "2"]);
        assert_eq!(words("linear"), ["1", "3.000", "30.0", "%", "2.0"]);
        assert_eq!(words("outside of these"), ["2.000", "20.0", "%"]);
    }
}
