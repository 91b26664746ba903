//! What a run tells: the trainer emits [`Event`]s, and sinks make of them a progress bar or plain
//! lines on the terminal and `metrics.jsonl` in the run's folder.

mod completions;
mod metrics;
mod metrics_file;
mod pace;
mod progress;
mod terminal;
mod window;

use std::path::{Path, PathBuf};

pub use completions::{CompletionRow, CompletionsFolder};
pub use metrics::{MetricLine, Metrics};
pub use metrics_file::{METRICS_FILE, MetricsFile};
pub use progress::Progress;
pub use terminal::{Terminal, duration};
pub use window::{Fold, StepMetrics, Window};

use crate::Result;

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Training begins.
    RunStarted {
        /// The run's name.
        name: String,
        /// Steps already made by the run that is resumed, else 0.
        done_steps: u64,
        /// Steps that the whole run has.
        total_steps: u64,
    },
    /// How the steps are cut to fit the memory, in a few words.
    Planned(String),
    /// An optimizer step was made. Moves the progress bar and sets the pace.
    Step {
        /// The step's number, from 1.
        step: u64,
        /// Tokens it trained on.
        tokens: u64,
        /// Seconds it took.
        seconds: f64,
    },
    /// The metrics of a logging step.
    Logged(MetricLine),
    /// The metrics of an evaluation.
    Evaluated(MetricLine),
    /// A checkpoint is complete and on disk.
    CheckpointSaved {
        /// Its step.
        step: u64,
        /// Its folder.
        path: PathBuf,
    },
    /// Completions that a step sampled.
    Sampled {
        /// All of them.
        rows: Vec<CompletionRow>,
        /// How many of them a person is shown.
        shown: usize,
    },
    /// Something that explains what the user sees.
    Note(String),
    /// Something that the user should know and that did not stop the run.
    Warning(String),
    /// Training ended.
    RunEnded {
        /// The last step.
        step: u64,
        /// Why it ended or what came of it, in a sentence.
        message: String,
    },
}

/// Something that takes events.
pub trait Sink {
    /// Takes one event. An error stops the run.
    fn take(&mut self, event: &Event) -> Result<()>;
}

/// Passes every event to all its sinks in order.
#[derive(Default)]
pub struct Reporter {
    sinks: Vec<Box<dyn Sink>>,
}

impl Reporter {
    /// A reporter without sinks, which says nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The reporter of a training run: the terminal, and in `output_dir` tables of
    /// completions and `metrics.jsonl`, which is begun with the lines of the checkpoint that is
    /// resumed.
    pub fn for_run(output_dir: &Path, history: &[MetricLine]) -> Result<Self> {
        let metrics = MetricsFile::open(&output_dir.join(METRICS_FILE), history)?;
        let completions = CompletionsFolder::new(output_dir);
        Ok(Self::new().with(Terminal::stderr()).with(metrics).with(completions))
    }

    /// Adds a sink.
    pub fn with(mut self, sink: impl Sink + 'static) -> Self {
        self.sinks.push(Box::new(sink));
        self
    }

    /// Passes an event on. The first error of a sink is returned.
    pub fn emit(&mut self, event: Event) -> Result<()> {
        self.sinks.iter_mut().try_for_each(|sink| sink.take(&event))
    }
}
