//! The sink that writes `metrics.jsonl`: one JSON object a line, one line a logging step or
//! evaluation.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::{Event, MetricLine, Sink};
use crate::train::files::{disk_error, write_atomic};
use crate::{Error, Result};

/// Name of the file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// An open `metrics.jsonl`. Every line reaches the operating system whole as it is written.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file of a run. `None` begins it afresh; `Some(step)` keeps the lines up to the
    /// resumed step and drops later ones, which the run writes again, and a last line that a killed
    /// process left unfinished. Any other line that is no metrics is an error with its number.
    pub fn open(path: &Path, resumed_step: Option<u64>) -> Result<Self> {
        let kept = match resumed_step {
            Some(step) => kept_lines(path, step)?,
            None => String::new(),
        };
        write_atomic(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends a line; if it does not fit on the disk, the file is left as it was.
    fn append(&mut self, line: &MetricLine) -> Result<()> {
        let mut text = serde_json::to_string(line)
            .map_err(|error| Error::failure(format!("{}: {error}", self.path.display())))?;
        text.push('\n');
        let before = self.file.metadata().map_err(Error::io(&self.path))?.len();
        self.file.write_all(text.as_bytes()).map_err(|error| {
            let _ = self.file.set_len(before);
            disk_error(&self.path)(error)
        })
    }
}

impl Sink for MetricsFile {
    fn take(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Logged(line) | Event::Evaluated(line) => self.append(line),
            _ => Ok(()),
        }
    }
}

/// The whole lines of a file up to a step.
fn kept_lines(path: &Path, step: u64) -> Result<String> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
        bytes => bytes.map_err(Error::io(path))?,
    };
    let text = String::from_utf8_lossy(&bytes);
    let mut kept = String::new();
    for (index, line) in text.split_inclusive('\n').enumerate().filter(|(_, l)| l.ends_with('\n')) {
        let parsed: MetricLine = serde_json::from_str(line).map_err(|error| {
            let (path, number) = (path.display(), index + 1);
            Error::failure(format!("{path}:{number}: not a line of metrics: {error}"))
        })?;
        if parsed.step <= step {
            kept += line;
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Metrics;
    use crate::train::files::tiny_disk::TinyDisk;

    fn logged(step: u64) -> Event {
        Event::Logged(MetricLine::new(step, Metrics::new().with("loss", 0.5)))
    }

    #[test]
    fn a_resumed_file_equals_the_unbroken_one() {
        let dir = tempfile::tempdir().unwrap();
        let (unbroken, resumed) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
        let mut file = MetricsFile::open(&unbroken, None).unwrap();
        (1..=4).for_each(|step| file.take(&logged(step)).unwrap());
        let whole = fs::read_to_string(&unbroken).unwrap();
        assert_eq!(whole.lines().count(), 4);

        let mut file = MetricsFile::open(&resumed, None).unwrap();
        (1..=3).for_each(|step| file.take(&logged(step)).unwrap());
        file.file.write_all(b"{\"step\":4,\"lo").unwrap();
        let mut file = MetricsFile::open(&resumed, Some(2)).unwrap();
        (3..=4).for_each(|step| file.take(&logged(step)).unwrap());
        assert_eq!(fs::read_to_string(&resumed).unwrap(), whole);
    }

    #[test]
    fn only_metrics_are_written_and_a_fresh_run_begins_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        fs::write(&path, "old\n").unwrap();
        let mut file = MetricsFile::open(&path, None).unwrap();
        file.take(&Event::Warning("careful".to_string())).unwrap();
        file.take(&Event::Step { step: 1, tokens: 1, seconds: 1.0 }).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_damaged_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        fs::write(&path, "{\"step\":1}\nbroken\n{\"step\":2}\n").unwrap();
        let error = MetricsFile::open(&path, Some(9)).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:2: not a line of metrics"), "{error}");
        assert!(MetricsFile::open(&dir.path().join("none.jsonl"), Some(9)).is_ok());
    }

    #[test]
    fn a_full_disk_is_an_error_and_leaves_whole_lines() {
        let Some(disk) = TinyDisk::mount(16) else { return };
        let path = disk.path().join(METRICS_FILE);
        let mut file = MetricsFile::open(&path, None).unwrap();
        let error = (0..9999).find_map(|step| file.take(&logged(step)).err()).unwrap().to_string();
        assert!(error.contains("no space left on the disk"), "{error}");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("}\n") && text.len() > 1000);
    }
}
