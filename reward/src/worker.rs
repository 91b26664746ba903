//! One process that answers lines with lines.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::process::Program;

/// Bytes of the standard error's end that an error quotes.
const QUOTED: u64 = 300;

/// How long a process that closed its output has to end.
const GRACE: Duration = Duration::from_millis(50);

/// Why a call has no answer.
pub(crate) enum Failure {
    /// It took too long.
    Timeout,
    /// The process is gone, and how.
    Died(String),
}

/// A running process; it is killed with all that it started when it is dropped.
pub(crate) struct Worker {
    child: Child,
    requests: Sender<String>,
    answers: Receiver<String>,
    stderr: Option<PathBuf>,
    /// How it ended, once it has.
    status: Option<ExitStatus>,
}

impl Worker {
    /// Starts a process and waits until it is ready, if it says so.
    pub(crate) fn start(
        program: &Program,
        stderr: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, String> {
        let name = &program.command;
        let mut child = Command::new(name)
            .args(&program.arguments)
            .env("PYTHONIOENCODING", "utf-8")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr.map_or(Ok(Stdio::inherit()), log)?)
            // a group of its own, so that what it starts can be killed with it
            .process_group(0)
            .spawn()
            .map_err(|error| format!("{name} cannot be started: {error}"))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(format!("{name} has no standard input and output"));
        };
        let (requests, to_write) = channel();
        let (to_read, answers) = channel();
        // threads of their own, so that neither side waits for the other with a full pipe
        thread::spawn(move || write_lines(stdin, to_write));
        thread::spawn(move || read_lines(BufReader::new(stdout), to_read));
        let stderr = stderr.map(Path::to_path_buf);
        let mut worker = Worker { child, requests, answers, stderr, status: None };
        if program.says_ready {
            worker.wait_until_ready(timeout)?;
        }
        Ok(worker)
    }

    fn wait_until_ready(&mut self, timeout: Duration) -> Result<(), String> {
        let line = match self.answer(timeout) {
            Ok(line) => line,
            Err(Failure::Timeout) => {
                return Err(format!("it was not ready after {} s", timeout.as_secs_f64()));
            }
            Err(Failure::Died(reason)) => return Err(reason),
        };
        let said: Value = serde_json::from_str(&line).unwrap_or_default();
        match (said.get("ready"), said.get("error").and_then(Value::as_str)) {
            (Some(_), _) => Ok(()),
            (None, Some(error)) => Err(error.to_string()),
            (None, None) => Err(format!("it began with {line:?}")),
        }
    }

    /// The line that answers a line.
    pub(crate) fn call(&mut self, request: &str, timeout: Duration) -> Result<String, Failure> {
        // a process that is gone shows in the answer
        let _ = self.requests.send(request.to_string());
        self.answer(timeout)
    }

    fn answer(&mut self, timeout: Duration) -> Result<String, Failure> {
        self.answers.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => Failure::Timeout,
            RecvTimeoutError::Disconnected => Failure::Died(self.obituary()),
        })
    }

    /// How the process ended, with the end of what it said.
    fn obituary(&mut self) -> String {
        // one that closed its output is given a moment to end by itself
        thread::sleep(GRACE);
        let how = self.end().map_or("it ended".to_string(), ended);
        match self.stderr.as_deref().and_then(end_of) {
            Some(last) => format!("{how}; the last that it said: {last}"),
            None => how,
        }
    }

    /// Ends the process and all of its group, and returns how it ended.
    fn end(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            let early = self.child.try_wait().ok().flatten();
            // SAFETY: `kill` takes numbers. The group is that of our own child: its number is not
            // given away while the child or anything of its group is left.
            unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
            self.status = early.or_else(|| self.child.wait().ok());
        }
        self.status
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

fn write_lines(mut stdin: impl Write, lines: Receiver<String>) {
    for mut line in lines {
        line.push('\n');
        if stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_lines(stdout: impl BufRead, to: Sender<String>) {
    for line in stdout.split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line).into_owned();
        if to.send(line).is_err() {
            return;
        }
    }
}

/// The file that standard error goes to, behind what is there.
fn log(path: &Path) -> Result<Stdio, String> {
    let named = |error: std::io::Error| format!("{}: {error}", path.display());
    path.parent().map_or(Ok(()), std::fs::create_dir_all).map_err(named)?;
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(named)?;
    Ok(Stdio::from(file))
}

/// The last line of a file, or the end of it.
fn end_of(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(QUOTED))).ok()?;
    let mut end = Vec::new();
    file.read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end);
    end.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_string)
}

fn ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it ended with exit code {code}"),
        (None, Some(signal)) => format!("it was killed by signal {signal}"),
        (None, None) => "it ended".to_string(),
    }
}
