//! Running the real programs on a tiny model and looking at what they leave behind.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The program that trains.
pub const SFT: &str = env!("CARGO_BIN_EXE_sft");
/// The program of policy gradients.
pub const GRPO: &str = env!("CARGO_BIN_EXE_grpo");
/// The program that does everything else.
pub const STEER: &str = env!("CARGO_BIN_EXE_steer");

/// What a program said before it ended.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; nothing if it was killed.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// The program did its work.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// The program failed with `code` and said why, in one lower-case sentence at the end; returns it.
    pub fn sentence(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let errors = self.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(errors, 1, "{}", self.stderr);
        let last = self.stderr.lines().last().unwrap_or_default();
        let said = last.strip_prefix("error: ").unwrap_or_else(|| panic!("{}", self.stderr));
        let first = said.chars().next().unwrap();
        assert!(!first.is_uppercase() && said.len() > 15, "not a sentence: {said}");
        said
    }

    /// As [`Ran::sentence`], and nothing else was said.
    pub fn only_sentence(&self, code: i32) -> &str {
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert_eq!(self.stdout, "");
        self.sentence(code)
    }
}

/// A tiny model, rows to learn, and a folder for runs of a program that trains.
pub struct Place {
    folder: tempfile::TempDir,
    /// The model's folder.
    pub model: PathBuf,
    /// The file or folder of the rows.
    pub rows: PathBuf,
    program: &'static str,
    /// Flags of every run.
    fixed: &'static str,
}

impl Place {
    /// A place with some rows, or nothing (with a visible line) without the model.
    pub fn of(program: &'static str, fixed: &'static str, rows: usize) -> Option<Self> {
        let model = super::shared("models/stories260k")?;
        let folder = tempfile::tempdir().unwrap();
        let rows = toy_rows(folder.path(), rows);
        Some(Place { folder, model, rows, program, fixed })
    }

    /// A path in the folder.
    pub fn dir(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The arguments of a run into the folder `name`.
    fn args(&self, name: &str, extra: &str) -> Vec<String> {
        let dir = self.dir(name);
        let paths = [
            ("--model_name_or_path", text(&self.model)),
            ("--dataset_name", text(&self.rows)),
            ("--output_dir", text(&dir)),
        ];
        let paths = paths.into_iter().flat_map(|(flag, path)| [flag, path]);
        let words = self.fixed.split_whitespace().chain(extra.split_whitespace());
        paths.chain(words).map(String::from).collect()
    }

    /// A run into the folder `name`.
    pub fn run(&self, name: &str, extra: &str) -> Ran {
        let args = self.args(name, extra);
        run(self.program, &args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts a run and kills it, as kill -9 does, as soon as `moment` has come in its folder.
    pub fn kill(&self, name: &str, extra: &str, moment: impl Fn(&Path) -> bool) {
        let args = self.args(name, extra);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut child = command(self.program, &args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (dir, start) = (self.dir(name), Instant::now());
        while !moment(&dir) {
            assert!(start.elapsed() < Duration::from_secs(30), "the moment never came");
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9), "the run was over too soon");
    }
}

/// Lines of metrics that a run has written so far.
pub fn lines(output_dir: &Path) -> usize {
    let text = fs::read_to_string(output_dir.join("metrics.jsonl"));
    text.map_or(0, |text| text.lines().count())
}

/// The metrics without the times, which no two runs share.
pub fn timeless(output_dir: &Path) -> Vec<Value> {
    let mut lines = metrics(output_dir);
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.retain(|name, _| name != "step_time" && !name.starts_with("time/"));
    }
    lines
}

/// A command that never leaves the machine.
pub fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
    command
}

/// Runs a program to its end.
pub fn run(program: &str, args: &[&str]) -> Ran {
    ran(command(program, args))
}

/// Runs a command to its end.
pub fn ran(mut command: Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Names in a folder, sorted; none if there is no such folder.
pub fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A copy of a model's folder whose files can be changed.
pub fn copy_model(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    for name in names(from).iter().filter(|name| from.join(name).is_file()) {
        fs::write(to.join(name), fs::read(from.join(name)).unwrap()).unwrap();
    }
    to.to_path_buf()
}

/// Rows of prompts whose completions can be learnt, as a JSONL file in `folder`.
pub fn toy_rows(folder: &Path, rows: usize) -> PathBuf {
    let names = ["Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"];
    let things = [
        "a red ball",
        "a big blue car",
        "the old brown dog very much",
        "cake",
        "a small yellow bird in the tree",
        "milk",
        "a toy",
        "the sun and the moon",
    ];
    let row = |i: usize| {
        let (name, thing) = (names[i % 8], things[i % 8]);
        json!({"prompt": format!("{name} likes"), "completion": format!(" {thing}")}).to_string()
    };
    let text: String = (0..rows).map(|i| row(i) + "\n").collect();
    let path = folder.join("rows.jsonl");
    fs::write(&path, text).unwrap();
    path
}

/// The lines of a run's metrics.
pub fn metrics(output_dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(output_dir.join("metrics.jsonl")).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "half a line of metrics");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The values of one metric, in order.
pub fn series(output_dir: &Path, name: &str) -> Vec<f64> {
    metrics(output_dir).iter().filter_map(|line| line.get(name)?.as_f64()).collect()
}

/// Steps of the checkpoints in a run's folder, in order.
pub fn checkpoints(output_dir: &Path) -> Vec<u64> {
    let step = |name: &String| name.strip_prefix("checkpoint-")?.parse().ok();
    let mut steps: Vec<u64> = names(output_dir).iter().filter_map(step).collect();
    steps.sort_unstable();
    steps
}

/// The files of the final adapter with their bytes.
pub fn adapter_files(output_dir: &Path) -> Vec<(String, Vec<u8>)> {
    let ours = |name: &String| name.contains("steering_") || name.contains("adapter_");
    let read = |name: String| (name.clone(), fs::read(output_dir.join(name)).unwrap());
    names(output_dir).into_iter().filter(ours).map(read).collect()
}
