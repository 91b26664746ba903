//! Where the time of a run goes: seconds, FLOPs and bytes of each phase and operation, as a table and
//! as a trace.
//!
//! Operations (`ops/`) and phases (everything above) are spans of [`tracing`]; `rows`, `flops`,
//! `bytes` and `tokens` are fields of theirs. Unless [`during`] listens, a span costs one relaxed load
//! of an atomic number and its fields are not computed.

mod recorder;
mod summary;
mod trace_file;

use std::path::Path;

use tracing_subscriber::layer::SubscriberExt;

use crate::Result;
use recorder::Recorder;

/// Does `work` and measures it: writes a trace that ui.perfetto.dev opens to `path` while it runs,
/// and a table to standard error when it is over. Without a path it just does the work.
///
/// # Errors
/// Those of the work; else, if the trace cannot be written.
pub fn during<T>(path: Option<&Path>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(path) = path else { return work() };
    let recorder = Recorder::create(path)?;
    let subscriber = tracing_subscriber::registry().with(recorder.clone());
    let result = tracing::subscriber::with_default(subscriber, work);
    let told = recorder.finish();
    let value = result?;
    eprintln!("{}", told?);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tracing::{debug_span, trace_span};

    use super::*;
    use crate::Error;

    /// A phase of two operations, the second inside a nested phase.
    fn work() -> Result<()> {
        let _forward = debug_span!("forward", tokens = 7usize).entered();
        drop(
            trace_span!(target: "steersman::ops", "linear", rows = 7usize, flops = 9usize)
                .entered(),
        );
        let _head = debug_span!("head").entered();
        drop(trace_span!(target: "steersman::ops", "norm", bytes = 8usize).entered());
        drop(trace_span!(target: "another::crate", "foreign").entered());
        Ok(())
    }

    fn events(path: &Path) -> Vec<Value> {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_trace_holds_each_span_once_with_what_it_did() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        during(Some(&path), work).unwrap();
        let events = events(&path);
        let named = |name: &str| {
            let mut found = events.iter().filter(|event| event["name"] == name);
            let event = found.next().unwrap_or_else(|| panic!("no {name} in {events:?}"));
            assert!(found.next().is_none(), "{name} twice");
            event.clone()
        };
        let (linear, forward, norm) = (named("linear"), named("forward"), named("norm"));
        assert_eq!((&linear["ph"], &linear["cat"]), (&"X".into(), &"op".into()));
        assert_eq!((&linear["args"]["rows"], &linear["args"]["flops"]), (&7.into(), &9.into()));
        assert!(linear["args"]["gflops"].as_f64().unwrap() > 0.0);
        assert!(norm["args"].get("gflops").is_none() && norm["args"]["bytes"] == 8);
        assert_eq!((&forward["ph"], &forward["cat"]), (&"X".into(), &"phase".into()));
        let end = |event: &Value| event["ts"].as_f64().unwrap() + event["dur"].as_f64().unwrap();
        assert!(forward["ts"].as_f64() <= linear["ts"].as_f64() && end(&linear) <= end(&forward));
        assert_eq!(named("tokens")["args"]["forward"], 7);
        assert!(events.iter().all(|event| event["name"] != "foreign"));
    }

    #[test]
    fn without_a_path_nothing_listens() {
        during(None, || {
            assert!(trace_span!("linear").is_disabled());
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn the_trace_of_work_that_fails_is_whole_and_its_error_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let failed: Result<()> = during(Some(&path), || {
            work()?;
            Err(Error::failure("the work broke"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "the work broke");
        assert!(events(&path).len() > 4);
    }
}
