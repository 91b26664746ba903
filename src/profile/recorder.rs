//! The listener: times every span and passes what it did on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::{LookupSpan, SpanRef};

use super::summary::Summary;
use super::trace_file::TraceFile;
use crate::{Error, Result};

/// What a span stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A stretch of the program, such as the forward pass.
    Phase,
    /// One operation on tensors.
    Op,
}

impl Kind {
    fn of(metadata: &Metadata) -> Self {
        if metadata.target().starts_with("steersman::ops") { Kind::Op } else { Kind::Phase }
    }

    /// Its category in the trace.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Phase => "phase",
            Kind::Op => "op",
        }
    }
}

/// The numbers that a span was opened with, by name.
#[derive(Default)]
pub(super) struct Fields(pub(super) Vec<(&'static str, u64)>);

impl Fields {
    /// The number of that name, or 0.
    pub(super) fn get(&self, name: &str) -> u64 {
        self.0.iter().find(|(known, _)| *known == name).map_or(0, |(_, value)| *value)
    }
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.push((field.name(), value));
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// A span that is over.
pub(super) struct Done {
    pub(super) kind: Kind,
    pub(super) name: &'static str,
    pub(super) fields: Fields,
    /// Since the start of the recording.
    pub(super) start: Duration,
    pub(super) taken: Duration,
    /// What spans of the same kind inside it took.
    pub(super) nested: Duration,
}

/// What is kept with an open span.
struct Open {
    fields: Fields,
    start: Duration,
    nested: Duration,
}

/// A [`Layer`] over a registry that times all spans of this crate.
#[derive(Clone)]
pub(super) struct Recorder {
    started: Instant,
    path: PathBuf,
    state: Arc<Mutex<State>>,
}

struct State {
    trace: TraceFile,
    summary: Summary,
}

impl Recorder {
    /// Starts the clock and the file.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let trace = TraceFile::create(path).map_err(Error::io(path))?;
        let state = State { trace, summary: Summary::default() };
        let state = Arc::new(Mutex::new(state));
        Ok(Recorder { started: Instant::now(), path: path.to_path_buf(), state })
    }

    /// Ends the file and returns the table.
    pub(super) fn finish(&self) -> Result<String> {
        let all = self.started.elapsed();
        let mut state = self.state();
        state.trace.finish().map_err(Error::io(&self.path))?;
        Ok(state.summary.table(all, &self.path))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.is_span() && metadata.target().starts_with("steersman::")
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let open = Open { fields, start: Duration::ZERO, nested: Duration::ZERO };
        span.extensions_mut().insert(open);
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(open) = span.extensions_mut().get_mut::<Open>() {
            open.start = self.started.elapsed();
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let end = self.started.elapsed();
        let Some(span) = context.span(id) else { return };
        let Some(open) = span.extensions_mut().remove::<Open>() else { return };
        let (kind, name) = (Kind::of(span.metadata()), span.metadata().name());
        let Open { fields, start, nested } = open;
        let taken = end.saturating_sub(start);
        tell_enclosing(&span, kind, taken);
        let mut state = self.state();
        let done = Done { kind, name, fields, start, taken, nested };
        let tokens = state.summary.add(&done);
        state.trace.span(&done);
        if done.fields.get("tokens") > 0 {
            state.trace.tokens(end, name, tokens);
        }
    }
}

/// Adds the time of a span to the nested time of the nearest one of its kind around it.
fn tell_enclosing<'a, S: LookupSpan<'a>>(span: &SpanRef<'a, S>, kind: Kind, taken: Duration) {
    let around = span.scope().skip(1).find(|around| Kind::of(around.metadata()) == kind);
    let Some(around) = around else { return };
    if let Some(open) = around.extensions_mut().get_mut::<Open>() {
        open.nested += taken;
    }
}
