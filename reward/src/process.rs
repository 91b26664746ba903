//! Rewards in other processes, which speak JSON lines on standard input and output: a line a call, a line
//! an answer.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::parse::ParseOptions;
use crate::reward::{Reward, Sample, Score};
use crate::wire::{failed, request, scores};
use crate::worker::{Failure, Worker};

/// What a worker runs.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) command: String,
    pub(crate) arguments: Vec<String>,
    /// Whether it says `{"ready": ...}` first.
    pub(crate) says_ready: bool,
    /// What a shell command begins with, where that must be a program.
    pub(crate) first_word: Option<String>,
}

impl Program {
    /// Looks for the program that a shell command begins with; words that the shell rewrites are left
    /// to it.
    ///
    /// # Errors
    /// If it is not there.
    fn find(&self) -> Result<(), String> {
        let Some(first) = &self.first_word else { return Ok(()) };
        let plain = first.chars().all(|c| c.is_alphanumeric() || "./_-+".contains(c));
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let found = match first.contains('/') {
            true => Path::new(first).is_file(),
            false => std::env::split_paths(&paths).any(|folder| folder.join(first).is_file()),
        };
        match found || !plain {
            true => Ok(()),
            false => {
                Err(format!("there is no program {first}: give its path, or one that PATH has"))
            }
        }
    }
}

/// A reward that processes compute; samples are split among its workers in order.
pub(crate) struct ProcessReward {
    name: String,
    workers: Vec<Seat>,
    timeout: Duration,
}

/// A worker's place: it is started when it is wanted, and again after it died.
struct Seat {
    program: Program,
    stderr: Option<PathBuf>,
    worker: Option<Worker>,
    /// Whether its last call failed and it wrote to its standard error meanwhile.
    told: bool,
}

impl ProcessReward {
    /// The reward that a shell command computes, called by the name of its program.
    pub(crate) fn of_command(command: &str, options: &ParseOptions) -> Result<Self, String> {
        let first =
            command.split_whitespace().next().ok_or("process: wants a command behind it")?;
        let name = first.rsplit('/').next().unwrap_or(first);
        let program = Program {
            command: "sh".to_string(),
            arguments: vec!["-c".to_string(), format!("exec {command}")],
            says_ready: false,
            first_word: Some(first.to_string()),
        };
        Ok(Self::new(name, program, options))
    }

    pub(crate) fn new(name: &str, program: Program, options: &ParseOptions) -> Self {
        let seat = |i: usize| Seat {
            program: program.clone(),
            stderr: options
                .stderr_dir
                .as_ref()
                .map(|dir| dir.join(format!("{name}-{i}.stderr.log"))),
            worker: None,
            told: false,
        };
        let workers = (0..options.num_workers.max(1)).map(seat).collect();
        ProcessReward { name: name.to_string(), workers, timeout: options.timeout }
    }
}

impl Reward for ProcessReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&mut self) -> Result<(), String> {
        let timeout = self.timeout;
        self.workers.iter_mut().try_for_each(|seat| {
            seat.program.find()?;
            seat.ready(timeout).map(drop)
        })
    }

    fn log(&self) -> Option<PathBuf> {
        self.workers.iter().find(|seat| seat.told).and_then(|seat| seat.stderr.clone())
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
        let (each, timeout) = (samples.len().div_ceil(self.workers.len()).max(1), self.timeout);
        thread::scope(|scope| {
            let parts = self.workers.iter_mut().zip(samples.chunks(each));
            let calls: Vec<_> = parts
                .map(|(seat, part)| (part.len(), scope.spawn(move || seat.score(part, timeout))))
                .collect();
            let joined = calls.into_iter().map(|(n, call)| {
                call.join().unwrap_or_else(|_| failed("the call to it panicked", n))
            });
            joined.flatten().collect()
        })
    }
}

impl Seat {
    /// The worker, started if there is none.
    fn ready(&mut self, timeout: Duration) -> Result<&mut Worker, String> {
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => Worker::start(&self.program, self.stderr.as_deref(), timeout)?,
        };
        Ok(self.worker.insert(worker))
    }

    /// One score a sample; notes whether the log tells of a failure.
    fn score(&mut self, samples: &[Sample], timeout: Duration) -> Vec<Score> {
        let path = self.stderr.clone();
        let len =
            || path.as_ref().and_then(|path| path.metadata().ok()).map_or(0, |file| file.len());
        let before = len();
        let scores = self.ask(samples, timeout);
        let failed = scores.iter().any(|score| matches!(score, Score::Error(_) | Score::Timeout));
        self.told = failed && len() > before;
        scores
    }

    /// One score a sample. A worker that dies is started again and asked once more; one that hangs
    /// or talks nonsense is killed, and started again for the next call.
    fn ask(&mut self, samples: &[Sample], timeout: Duration) -> Vec<Score> {
        let (request, n) = (request(samples).to_string(), samples.len());
        for last in [false, true] {
            let worker = match self.ready(timeout) {
                Ok(worker) => worker,
                Err(reason) => return failed(&reason, n),
            };
            match worker.call(&request, timeout) {
                Ok(line) => match scores(&line, n) {
                    Ok(scores) => return scores,
                    Err(reason) => {
                        self.worker = None;
                        return failed(&reason, n);
                    }
                },
                Err(Failure::Timeout) => {
                    self.worker = None;
                    return vec![Score::Timeout; n];
                }
                Err(Failure::Died(reason)) => {
                    self.worker = None;
                    if last {
                        return failed(&reason, n);
                    }
                }
            }
        }
        Vec::new()
    }
}
