//! Progress of work that has no metrics: a bar on a terminal, otherwise a line every tenth.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::duration;

/// How far a piece of work has come.
pub struct Progress {
    what: String,
    total: usize,
    tenths: usize,
    start: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Work on `total` things; `what` names them, as in "answers".
    pub fn new(what: &str, total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}  eta {eta}");
            let bar = ProgressBar::new(total as u64).with_message(what.to_string());
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Progress { what: what.to_string(), total, tenths: 0, start: Instant::now(), bar }
    }

    /// Says that `done` things are finished.
    pub fn set(&mut self, done: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            return;
        }
        let tenths = 10 * done / self.total.max(1);
        if tenths > self.tenths {
            self.tenths = tenths;
            let seconds = self.start.elapsed().as_secs_f64();
            let left = duration(seconds * (self.total - done) as f64 / done as f64);
            eprintln!("{done}/{} {}  eta {left}", self.total, self.what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
