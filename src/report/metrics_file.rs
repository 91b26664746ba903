//! The sink that writes `metrics.jsonl`: one JSON object a line, one line a logging step or
//! evaluation.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{Event, MetricLine, Sink};
use crate::files::{disk_error, write_atomic};
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
    /// Opens the file of a run and begins it with `history`: the lines up to the checkpoint that is
    /// resumed, or none. What a killed process wrote after that is gone; the run writes it again.
    pub fn open(path: &Path, history: &[MetricLine]) -> Result<Self> {
        let lines = history.iter().map(|line| text_of(path, line)).collect::<Result<String>>()?;
        write_atomic(path, lines.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends a line; if it does not fit on the disk, the file is left as it was.
    fn append(&mut self, line: &MetricLine) -> Result<()> {
        let text = text_of(&self.path, line)?;
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

/// A line as it stands in the file.
fn text_of(path: &Path, line: &MetricLine) -> Result<String> {
    let text = serde_json::to_string(line)
        .map_err(|error| Error::failure(format!("{}: {error}", path.display())))?;
    Ok(text + "\n")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::files::tiny_disk::TinyDisk;
    use crate::report::Metrics;

    fn line(step: u64) -> MetricLine {
        MetricLine::new(step, Metrics::new().with("loss", 0.5).with("grad_norm", f64::NAN))
    }

    fn logged(step: u64) -> Event {
        Event::Logged(line(step))
    }

    #[test]
    fn a_resumed_file_equals_the_unbroken_one() {
        let dir = tempfile::tempdir().unwrap();
        let (unbroken, resumed) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
        let mut file = MetricsFile::open(&unbroken, &[]).unwrap();
        (1..=4).for_each(|step| file.take(&logged(step)).unwrap());
        let whole = fs::read_to_string(&unbroken).unwrap();
        assert_eq!(whole.lines().count(), 4);

        fs::write(&resumed, "{\"step\":1}\n{\"step\":4,\"lo").unwrap();
        let mut file = MetricsFile::open(&resumed, &[line(1), line(2)]).unwrap();
        (3..=4).for_each(|step| file.take(&logged(step)).unwrap());
        assert_eq!(fs::read_to_string(&resumed).unwrap(), whole);
    }

    #[test]
    fn only_metrics_are_written_and_a_fresh_run_begins_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        fs::write(&path, "old\n").unwrap();
        let mut file = MetricsFile::open(&path, &[]).unwrap();
        file.take(&Event::Warning("careful".to_string())).unwrap();
        file.take(&Event::Step { step: 1, tokens: 1, seconds: 1.0 }).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_full_disk_is_an_error_and_leaves_whole_lines() {
        let Some(disk) = TinyDisk::mount(16) else { return };
        let path = disk.path().join(METRICS_FILE);
        let mut file = MetricsFile::open(&path, &[]).unwrap();
        let error = (0..9999).find_map(|step| file.take(&logged(step)).err()).unwrap().to_string();
        assert!(error.contains("no space left on the disk"), "{error}");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("}\n") && text.len() > 1000);
    }
}
