//! The trace as a file of Chrome's trace events, which ui.perfetto.dev and chrome://tracing open.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use serde::{Serialize, Serializer};
use serde_json::json;

use super::recorder::{Done, Fields};

/// A file that grows while the program runs.
pub(super) struct TraceFile {
    out: BufWriter<File>,
    /// The first thing that went wrong.
    failed: Option<io::Error>,
}

/// A span that is over ("complete event").
#[derive(Serialize)]
struct Complete<'a> {
    name: &'static str,
    cat: &'static str,
    ph: &'static str,
    /// Microseconds.
    ts: f64,
    dur: f64,
    pid: u32,
    tid: u32,
    #[serde(serialize_with = "arguments")]
    args: (&'a Fields, Duration),
}

/// The fields of a span, and the rate that follows from its FLOPs and time.
fn arguments<S: Serializer>(args: &(&Fields, Duration), to: S) -> Result<S::Ok, S::Error> {
    let (fields, taken) = args;
    let rate = fields.get("flops") as f64 / taken.as_nanos().max(1) as f64;
    let numbers = fields.0.iter().map(|(name, value)| (*name, json!(value)));
    let rate = (rate > 0.0).then(|| ("gflops", json!(rate)));
    to.collect_map(numbers.chain(rate))
}

impl TraceFile {
    /// Starts the file.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut out = BufWriter::new(File::create(path)?);
        let program = json!({"name": "process_name", "ph": "M", "pid": 1,
                             "args": {"name": "steersman"}});
        write!(out, "[\n{program}")?;
        Ok(TraceFile { out, failed: None })
    }

    /// Adds a span.
    pub(super) fn span(&mut self, done: &Done) {
        self.add(&Complete {
            name: done.name,
            cat: done.kind.name(),
            ph: "X",
            ts: microseconds(done.start),
            dur: microseconds(done.taken),
            pid: 1,
            tid: 1,
            args: (&done.fields, done.taken),
        });
    }

    /// Adds how many tokens have gone through a phase so far.
    pub(super) fn tokens(&mut self, now: Duration, phase: &str, tokens: u64) {
        let ts = microseconds(now);
        self.add(
            &json!({"name": "tokens", "ph": "C", "ts": ts, "pid": 1, "args": {phase: tokens}}),
        );
    }

    fn add(&mut self, event: &impl Serialize) {
        if self.failed.is_some() {
            return;
        }
        let written = self.out.write_all(b",\n");
        let written = written
            .and_then(|()| serde_json::to_writer(&mut self.out, event).map_err(io::Error::from));
        self.failed = written.err();
    }

    /// Ends the file.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.out.write_all(b"\n]\n")?;
        self.out.flush()
    }
}

fn microseconds(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}
