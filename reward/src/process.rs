//! Rewards in other processes, which speak JSON lines on standard input and output.
//!
//! A call is a line `{"prompts": [...], "completions": [...], "completion_ids": [...], columns...}`, a
//! list of one entry a completion each; the answer is a line `{"rewards": [1.0, null, ...]}`, `null`
//! for a completion that the reward is not for, or `{"error": "..."}`. A prompt of messages comes as a
//! list of them, and its completion then as a list of one message of the assistant, as in TRL.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use datasets::Prompt;
use serde_json::{Map, Value, json};

use crate::parse::ParseOptions;
use crate::reward::{Reward, Sample, Score, miscounted};
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

fn failed(reason: &str, n: usize) -> Vec<Score> {
    vec![Score::Error(reason.to_string()); n]
}

/// The call for some samples.
fn request(samples: &[Sample]) -> Value {
    let mut fields = Map::new();
    let list = |of: &dyn Fn(&Sample) -> Value| Value::Array(samples.iter().map(of).collect());
    let names: BTreeSet<&String> =
        samples.iter().flat_map(|sample| sample.columns.keys()).collect();
    for name in names {
        let column = |sample: &Sample| sample.columns.get(name).cloned().unwrap_or(Value::Null);
        fields.insert(name.clone(), list(&column));
    }
    fields.insert("prompts".into(), list(&|sample| sample.prompt.to_json()));
    fields.insert("completions".into(), list(&completion));
    fields.insert("completion_ids".into(), list(&|sample| json!(sample.completion_ids)));
    Value::Object(fields)
}

fn completion(sample: &Sample) -> Value {
    match sample.prompt {
        Prompt::Text(_) => json!(sample.completion),
        Prompt::Messages(_) => json!([{"role": "assistant", "content": sample.completion}]),
    }
}

/// The scores of an answer for `n` samples.
fn scores(line: &str, n: usize) -> Result<Vec<Score>, String> {
    let start: String = line.chars().take(80).collect();
    let not_json = ["NaN", "Infinity"].iter().find(|name| line.contains(**name));
    let hint = not_json.map(|name| format!(" ({name} is no JSON: null stands for does not apply)"));
    let hint = hint.unwrap_or_default();
    let nonsense = || format!("it answered {start:?}, which is not {{\"rewards\": [...]}}{hint}");
    let answer: Value = serde_json::from_str(line).map_err(|_| nonsense())?;
    if let Some(error) = answer.get("error") {
        return Ok(failed(error.as_str().unwrap_or("it failed without a reason"), n));
    }
    let rewards = answer.get("rewards").and_then(Value::as_array).ok_or_else(nonsense)?;
    if rewards.len() != n {
        return Ok(failed(&miscounted("reward", rewards.len(), n), n));
    }
    let score = |reward: &Value| match reward {
        Value::Null => Score::NotApplicable,
        Value::String(reason) => Score::Error(reason.clone()),
        other => match other.as_f64() {
            Some(value) => Score::Value(value),
            None => Score::Error(format!("it gave {other}, which is no number")),
        },
    };
    Ok(rewards.iter().map(score).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use datasets::Row;

    #[test]
    fn calls_hold_every_column_and_completions_as_trl_gives_them() {
        let text = Prompt::Text("p".into());
        let chat = Prompt::Messages(vec![json!({"role": "user", "content": "q"})]);
        let (a, b): (Row, Row) = (
            [("answer".to_string(), json!("1"))].into_iter().collect(),
            [("level".to_string(), json!(2))].into_iter().collect(),
        );
        let samples = [
            Sample { prompt: &text, completion: "x", completion_ids: &[3, 4], columns: &a },
            Sample { prompt: &chat, completion: "y", completion_ids: &[5], columns: &b },
        ];
        let wanted = json!({
            "answer": ["1", null], "level": [null, 2],
            "prompts": ["p", [{"role": "user", "content": "q"}]],
            "completions": ["x", [{"role": "assistant", "content": "y"}]],
            "completion_ids": [[3, 4], [5]],
        });
        assert_eq!(request(&samples), wanted);
    }

    #[test]
    fn answers_are_scores_or_say_what_is_wrong() {
        let all = scores(r#"{"rewards": [1, null, "it gave nan"]}"#, 3).unwrap();
        let nan = Score::Error("it gave nan".into());
        assert_eq!(all, [Score::Value(1.0), Score::NotApplicable, nan]);
        let reason = |line: &str| match scores(line, 1) {
            Ok(scores) => match &scores[..] {
                [Score::Error(reason)] => reason.clone(),
                other => panic!("{other:?}"),
            },
            Err(reason) => reason,
        };
        assert_eq!(reason(r#"{"rewards": [1, 2]}"#), "it gave 2 rewards for 1 completion");
        assert_eq!(reason(r#"{"rewards": [true]}"#), "it gave true, which is no number");
        assert_eq!(reason(r#"{"error": "no"}"#), "no");
        assert!(
            reason("{\"rewards\": [NaN]}")
                .ends_with("(NaN is no JSON: null stands for does not apply)")
        );
        for nonsense in ["hello", "{\"rewards\": NaN}", "[1]", "{}", ""] {
            assert!(reason(nonsense).contains("which is not"), "{nonsense}");
        }
    }
}
