//! The progress of one download on standard error: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// One file on its way.
pub(crate) struct Transfer {
    label: String,
    total: u64,
    /// On a terminal.
    bar: Option<ProgressBar>,
    /// Quarters that have been reported in lines.
    quarters: u64,
}

impl Transfer {
    /// Starts showing a download of `total` bytes.
    pub(crate) fn new(label: &str, total: u64) -> Transfer {
        let bar = std::io::stderr().is_terminal().then(|| bar(label, total));
        if bar.is_none() {
            eprintln!("fetching {label} ({})", HumanBytes(total));
        }
        Transfer { label: label.to_string(), total, bar, quarters: 0 }
    }

    /// `done` bytes have arrived.
    pub(crate) fn set(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            return bar.set_position(done.min(self.total));
        }
        let quarters = (4 * done).checked_div(self.total).unwrap_or(4).min(4);
        if quarters > self.quarters {
            self.quarters = quarters;
            eprintln!("{}: {} %", self.label, 25 * quarters);
        }
    }

    /// Everything has arrived.
    pub(crate) fn finish(&mut self) {
        self.set(self.total);
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

fn bar(label: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total).with_message(label.to_string());
    let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}
