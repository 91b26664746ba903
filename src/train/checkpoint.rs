//! Checkpoints of a run, and the run's claim on its folder.
//!
//! `output_dir/checkpoint-{step}/` holds the files that the trainer names and a manifest of their
//! hashes; it appears whole or not at all. A run saves its checkpoint last in a step, after the
//! metrics of that step are written, so that the metrics up to a checkpoint's step are on disk.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{
    disk_error, remove_folder_atomic, remove_temporaries, verify, write_atomic, write_folder_atomic,
};
use crate::config::Resume;
use crate::report::MetricLine;
use crate::{Error, Result};

/// The resolved configuration in a run's folder.
pub const CONFIG_FILE: &str = "config.toml";
/// The trainer's state in a checkpoint.
pub const STATE_FILE: &str = "trainer_state.json";
/// The optimizer's state in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";

/// Where a run is: all that it needs, besides adapter and optimizer, to go on as if unbroken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerState {
    /// Optimizer steps made.
    pub global_step: u64,
    /// Passes over the training rows made.
    pub epoch: f64,
    /// Tokens trained on.
    pub num_tokens: u64,
    /// Where the next row comes from.
    pub cursor: DataCursor,
    /// Seed of the run; all randomness is a function of it and of the counters here.
    pub seed: u64,
    /// Best value of `metric_for_best_model` so far.
    pub best_metric: Option<f64>,
    /// Step of that value.
    pub best_step: Option<u64>,
    /// Evaluations since then, for early stopping.
    pub evaluations_without_best: u64,
    /// Every line of metrics so far.
    pub log_history: Vec<MetricLine>,
}

/// A place in the stream of training rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataCursor {
    /// Full passes made; the order of a pass is a function of the seed and this number.
    pub epoch: u64,
    /// Rows of the current pass already used.
    pub row: u64,
}

impl TrainerState {
    /// Writes the state to [`STATE_FILE`] in a folder. Fails for values that JSON cannot hold.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(STATE_FILE);
        let numbers = [Some(self.epoch), self.best_metric];
        if numbers.into_iter().flatten().any(|number| !number.is_finite()) {
            return Err(Error::failure(format!(
                "{}: epoch and best_metric must be finite",
                path.display()
            )));
        }
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::failure(format!("{}: {error}", path.display())))?;
        write_atomic(&path, (text + "\n").as_bytes())
    }

    /// Reads the state of a checkpoint.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE_FILE);
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        serde_json::from_str(&text)
            .map_err(|error| Error::failure(format!("{}: {error}", path.display())))
    }

    /// Takes in an evaluation's value and says whether it is the best so far; equal is not better.
    /// A value that is not finite is never the best.
    pub fn is_best(&mut self, value: f64, greater_is_better: bool) -> bool {
        let better = match self.best_metric {
            _ if !value.is_finite() => false,
            None => true,
            Some(best) if greater_is_better => value > best,
            Some(best) => value < best,
        };
        if better {
            self.best_metric = Some(value);
            self.best_step = Some(self.global_step);
            self.evaluations_without_best = 0;
        } else {
            self.evaluations_without_best += 1;
        }
        better
    }
}

/// The folder of a checkpoint.
pub fn checkpoint_dir(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("{PREFIX}{step}"))
}

/// Saves a checkpoint: `fill` writes its files into the folder it is given, which becomes
/// `checkpoint-{step}` when it is complete and on disk. An existing one is never overwritten.
pub fn save(
    output_dir: &Path,
    step: u64,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let path = checkpoint_dir(output_dir, step);
    write_folder_atomic(&path, fill)?;
    Ok(path)
}

/// The checkpoints of a run by step, damaged ones included.
pub fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(output_dir).map_err(Error::io(output_dir))? {
        let path = entry.map_err(Error::io(output_dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let step = name.strip_prefix(PREFIX).and_then(|step| step.parse().ok());
        if let Some(step) = step.filter(|_| path.is_dir()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The newest undamaged checkpoint, and what is wrong with the newer ones.
#[derive(Debug, Default, PartialEq)]
pub struct Latest {
    /// Its step and folder.
    pub found: Option<(u64, PathBuf)>,
    /// Newer checkpoints that failed their check, newest first, with the reason.
    pub damaged: Vec<(PathBuf, String)>,
}

/// Finds the newest checkpoint whose files all have the hashes of its manifest.
pub fn latest_good(output_dir: &Path) -> Result<Latest> {
    let mut latest = Latest::default();
    for (step, path) in list(output_dir)?.into_iter().rev() {
        match verify(&path) {
            Ok(()) => {
                latest.found = Some((step, path));
                break;
            }
            Err(error) => latest.damaged.push((path, error.to_string())),
        }
    }
    Ok(latest)
}

/// Removes the oldest checkpoints beyond the `limit` newest (0 = keep all), never that of `best`.
pub fn prune(output_dir: &Path, limit: usize, best: Option<u64>) -> Result<()> {
    let checkpoints = list(output_dir)?;
    if limit == 0 || checkpoints.len() <= limit {
        return Ok(());
    }
    for (step, path) in &checkpoints[..checkpoints.len() - limit] {
        if Some(*step) != best {
            remove_folder_atomic(path)?;
        }
    }
    Ok(())
}

/// A run's hold on its folder: no other process can claim it while this lives.
#[derive(Debug)]
pub struct Claim {
    /// The folder.
    pub output_dir: PathBuf,
    /// Step and folder of the checkpoint to go on from; `None` = from the start.
    pub checkpoint: Option<(u64, PathBuf)>,
    /// What the user should know, a sentence each.
    pub warnings: Vec<String>,
    /// Locked until the process ends, however it ends.
    _lock: File,
}

/// Claims `output_dir` for a run, making it if needed, and writes its [`CONFIG_FILE`]. A folder
/// with another run's files is refused unless this run resumes it, and so is one in use by a living
/// process. When resuming, damaged checkpoints are renamed to `….damaged` with a warning, remains
/// of a killed process are removed, and changed keys are reported.
pub fn claim_output_dir(output_dir: &Path, config: &str, resume: &Resume) -> Result<Claim> {
    fs::create_dir_all(output_dir).map_err(disk_error(output_dir))?;
    let lock = lock(output_dir)?;
    let held = run_files(output_dir)?;
    if *resume == Resume::No && !held.is_empty() {
        return Err(Error::usage(format!(
            "{} already holds a run ({}); give another --output_dir, continue it with \
             --resume_from_checkpoint latest, or remove the folder",
            output_dir.display(),
            held.join(", ")
        )));
    }
    remove_temporaries(output_dir)?;
    let mut claim = Claim {
        output_dir: output_dir.to_path_buf(),
        checkpoint: None,
        warnings: Vec::new(),
        _lock: lock,
    };
    match resume {
        Resume::No => {}
        Resume::Latest => claim.take_latest()?,
        Resume::From(path) => claim.take(path)?,
    }
    claim.write_config(config)?;
    Ok(claim)
}

/// Locks the folder itself, where the file system can.
fn lock(output_dir: &Path) -> Result<File> {
    let folder = File::open(output_dir).map_err(Error::io(output_dir))?;
    match folder.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::usage(format!(
            "{} is in use by another process; wait for it or give another --output_dir",
            output_dir.display()
        ))),
        _ => Ok(folder),
    }
}

/// Names in a folder that show that a run was here.
fn run_files(output_dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(output_dir).map_err(Error::io(output_dir))? {
        let name = entry.map_err(Error::io(output_dir))?.file_name().to_string_lossy().into_owned();
        let ours = name == CONFIG_FILE
            || name == crate::report::METRICS_FILE
            || name.starts_with(PREFIX)
            || name.ends_with(".safetensors");
        if ours {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

impl Claim {
    fn take_latest(&mut self) -> Result<()> {
        let latest = latest_good(&self.output_dir)?;
        for (path, reason) in latest.damaged {
            let aside = set_aside(&path)?;
            self.warnings.push(format!(
                "{reason}; the damaged checkpoint is now {}, an earlier one is used",
                aside.display()
            ));
        }
        if latest.found.is_none() {
            let folder = self.output_dir.display();
            self.warnings.push(format!("{folder} has no checkpoint: starting from the beginning"));
        }
        self.checkpoint = latest.found;
        Ok(())
    }

    fn take(&mut self, path: &Path) -> Result<()> {
        let canonical = |path: &Path| path.canonicalize().map_err(Error::io(path));
        let wanted = canonical(path)?;
        let checkpoints = list(&canonical(&self.output_dir)?)?;
        let Some((step, _)) = checkpoints.iter().find(|(_, dir)| *dir == wanted) else {
            return Err(Error::usage(format!(
                "{} is no checkpoint of {}; resume in the checkpoint's own output_dir, or start \
                 a new run from its adapter with --adapter_name_or_path",
                path.display(),
                self.output_dir.display()
            )));
        };
        if let Some((later, _)) = checkpoints.last().filter(|(last, _)| last > step) {
            return Err(Error::usage(format!(
                "{} also holds {PREFIX}{later}, which resuming from step {step} would overwrite; \
                 move it away first",
                self.output_dir.display()
            )));
        }
        verify(&wanted)?;
        self.checkpoint = Some((*step, checkpoint_dir(&self.output_dir, *step)));
        Ok(())
    }

    /// Writes the configuration, with a warning for each key that differs from the earlier one.
    fn write_config(&mut self, config: &str) -> Result<()> {
        let path = self.output_dir.join(CONFIG_FILE);
        if self.checkpoint.is_some() && path.exists() {
            let before = fs::read_to_string(&path).map_err(Error::io(&path))?;
            self.warnings.extend(changed_keys(&before, config));
        }
        write_atomic(&path, config.as_bytes())
    }
}

/// Renames a damaged checkpoint to a free name beside it.
fn set_aside(path: &Path) -> Result<PathBuf> {
    let numbered = |number: u32| match number {
        0 => path.with_extension("damaged"),
        number => path.with_extension(format!("damaged-{number}")),
    };
    let free = (0..).map(numbered).find(|name| !name.exists());
    let aside = free.unwrap_or_else(|| path.with_extension("damaged"));
    fs::rename(path, &aside).map_err(Error::io(path))?;
    Ok(aside)
}

/// Keys that may change when a run goes on without changing what it computes.
const FREE_KEYS: [&str; 8] = [
    "resume_from_checkpoint",
    "dry_run",
    "output_dir",
    "run_name",
    "report_to",
    "save_total_limit",
    "micro_batch_tokens",
    "gradient_checkpointing",
];

/// A sentence for each key whose value differs, [`FREE_KEYS`] aside.
fn changed_keys(before: &str, after: &str) -> Vec<String> {
    let (Ok(before), Ok(after)) = (before.parse::<toml::Table>(), after.parse::<toml::Table>())
    else {
        return vec![format!("the earlier {CONFIG_FILE} cannot be read and is replaced")];
    };
    let show = |value: Option<&toml::Value>| match value {
        Some(value) => value.to_string(),
        None => "unset".to_string(),
    };
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    keys.into_iter()
        .filter(|key| !FREE_KEYS.contains(&key.as_str()) && before.get(*key) != after.get(*key))
        .map(|key| {
            let (old, new) = (show(before.get(key)), show(after.get(key)));
            format!("{key} was {old} and is now {new}: the result is not that of an unbroken run")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{METRICS_FILE, Metrics};

    fn checkpoint(output_dir: &Path, step: u64) -> PathBuf {
        save(output_dir, step, |dir| {
            write_atomic(&dir.join("adapter_model.safetensors"), &[1; 100])?;
            TrainerState { global_step: step, ..Default::default() }.save(dir)
        })
        .unwrap()
    }

    fn steps(output_dir: &Path) -> Vec<u64> {
        list(output_dir).unwrap().into_iter().map(|(step, _)| step).collect()
    }

    fn refused(claim: Result<Claim>) -> String {
        let error = claim.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn the_state_reads_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Metrics::new().with("loss", 0.1 + 0.2).with("num_tokens", 12.0);
        let state = TrainerState {
            global_step: 7,
            epoch: 1.0 / 3.0,
            num_tokens: 12,
            cursor: DataCursor { epoch: 1, row: 5 },
            seed: u64::MAX,
            best_metric: Some(5e-324),
            best_step: Some(3),
            evaluations_without_best: 2,
            log_history: vec![MetricLine::new(7, metrics)],
        };
        state.save(dir.path()).unwrap();
        assert_eq!(TrainerState::load(dir.path()).unwrap(), state);
        let bad = TrainerState { epoch: f64::NAN, ..state };
        assert!(bad.save(dir.path()).unwrap_err().to_string().contains("must be finite"));
        fs::write(dir.path().join(STATE_FILE), "{").unwrap();
        let error = TrainerState::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(STATE_FILE), "{error}");
    }

    #[test]
    fn the_best_value_resets_the_patience() {
        let mut state = TrainerState { global_step: 1, ..Default::default() };
        assert!(!state.is_best(f64::NAN, false));
        assert!(state.is_best(2.0, false));
        state.global_step = 2;
        assert!(!state.is_best(2.0, false));
        assert_eq!((state.best_step, state.evaluations_without_best), (Some(1), 1));
        assert!(state.is_best(1.0, false));
        assert_eq!((state.best_step, state.evaluations_without_best), (Some(2), 0));
        assert!(state.is_best(3.0, true));
    }

    #[test]
    fn the_newest_undamaged_checkpoint_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(latest_good(dir.path()).unwrap(), Latest::default());
        for step in [5, 100, 20] {
            checkpoint(dir.path(), step);
        }
        fs::create_dir(dir.path().join("checkpoint-x")).unwrap();
        assert_eq!(latest_good(dir.path()).unwrap().found.unwrap().0, 100);
        fs::write(checkpoint_dir(dir.path(), 100).join(STATE_FILE), "half").unwrap();
        let latest = latest_good(dir.path()).unwrap();
        assert_eq!(latest.found, Some((20, checkpoint_dir(dir.path(), 20))));
        assert_eq!(latest.damaged.len(), 1);
        assert!(latest.damaged[0].1.contains("bytes instead of"), "{latest:?}");
    }

    #[test]
    fn old_checkpoints_go_and_the_best_stays() {
        let dir = tempfile::tempdir().unwrap();
        (1..=5).for_each(|step| drop(checkpoint(dir.path(), step)));
        prune(dir.path(), 0, None).unwrap();
        assert_eq!(steps(dir.path()), [1, 2, 3, 4, 5]);
        prune(dir.path(), 2, Some(2)).unwrap();
        assert_eq!(steps(dir.path()), [2, 4, 5]);
        prune(dir.path(), 2, Some(5)).unwrap();
        assert_eq!(steps(dir.path()), [4, 5]);
    }

    #[test]
    fn another_runs_folder_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let output_dir = dir.path().join("runs/sft");
        drop(claim_output_dir(&output_dir, "seed = 1\n", &Resume::No).unwrap());
        let message = refused(claim_output_dir(&output_dir, "seed = 2\n", &Resume::No));
        assert!(message.contains("already holds a run (config.toml)"), "{message}");
        assert!(message.contains("--resume_from_checkpoint latest"), "{message}");
        assert_eq!(fs::read_to_string(output_dir.join(CONFIG_FILE)).unwrap(), "seed = 1\n");
        for name in [METRICS_FILE, "adapter_model.safetensors", "checkpoint-3"] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(name), "").unwrap();
            refused(claim_output_dir(dir.path(), "", &Resume::No));
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("train.log"), "").unwrap();
        claim_output_dir(dir.path(), "", &Resume::No).unwrap();
    }

    #[test]
    fn a_folder_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let held = claim_output_dir(dir.path(), "", &Resume::No).unwrap();
        let message = refused(claim_output_dir(dir.path(), "", &Resume::Latest));
        assert!(message.contains("in use by another process"), "{message}");
        drop(held);
        claim_output_dir(dir.path(), "", &Resume::Latest).unwrap();
    }

    #[test]
    fn resuming_sets_damaged_checkpoints_aside_and_reports_changed_keys() {
        let dir = tempfile::tempdir().unwrap();
        drop(claim_output_dir(dir.path(), "seed = 1\ndry_run = false\n", &Resume::No).unwrap());
        checkpoint(dir.path(), 10);
        fs::remove_file(checkpoint(dir.path(), 20).join(STATE_FILE)).unwrap();
        fs::create_dir(dir.path().join(".checkpoint-30.tmp")).unwrap();
        let claim = claim_output_dir(dir.path(), "seed = 2\n", &Resume::Latest).unwrap();
        assert_eq!(claim.checkpoint, Some((10, checkpoint_dir(dir.path(), 10))));
        assert!(dir.path().join("checkpoint-20.damaged").is_dir());
        assert!(!dir.path().join(".checkpoint-30.tmp").exists());
        assert_eq!(claim.warnings.len(), 2, "{:?}", claim.warnings);
        assert!(claim.warnings[1].starts_with("seed was 1 and is now 2"));
        checkpoint(dir.path(), 20);
    }

    #[test]
    fn resuming_before_the_first_checkpoint_starts_over() {
        let dir = tempfile::tempdir().unwrap();
        drop(claim_output_dir(dir.path(), "seed = 1\n", &Resume::No).unwrap());
        let claim = claim_output_dir(dir.path(), "seed = 1\n", &Resume::Latest).unwrap();
        assert_eq!(claim.checkpoint, None);
        assert!(claim.warnings[0].contains("starting from the beginning"));
    }

    #[test]
    fn a_named_checkpoint_must_be_the_runs_newest() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (dir.path().join("a"), dir.path().join("b"));
        let (first, foreign) = (checkpoint(&ours, 1), checkpoint(&other, 1));
        let from = |path: &Path| claim_output_dir(&ours, "", &Resume::From(path.to_path_buf()));
        assert_eq!(from(&first).unwrap().checkpoint, Some((1, first.clone())));
        assert!(refused(from(&foreign)).contains("--adapter_name_or_path"));
        checkpoint(&ours, 2);
        assert!(refused(from(&first)).contains("also holds checkpoint-2"));
        let missing = from(&dir.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("none: no such file"), "{missing}");
    }
}
