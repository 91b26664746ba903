//! Checkpoints of a run.
//!
//! `output_dir/checkpoint-{step}/` holds the files that the trainer names and a manifest of their
//! hashes; it appears whole or not at all. A run saves its checkpoint last in a step, after the
//! metrics of that step are written, so that the metrics up to a checkpoint's step are on disk.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::{remove_folder_atomic, verify, write_atomic, write_folder_atomic};
use crate::report::{MetricLine, Window};
use crate::{Error, Result};

/// The trainer's state in a checkpoint.
pub const STATE_FILE: &str = "trainer_state.json";
/// The optimizer's state in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// What a checkpoint folder's name begins with.
pub(super) const PREFIX: &str = "checkpoint-";

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
    /// What the steps are made from.
    pub data: DataIdentity,
    /// Best value of `metric_for_best_model` so far.
    pub best_metric: Option<f64>,
    /// Step of that value.
    pub best_step: Option<u64>,
    /// Evaluations since then, for early stopping.
    pub evaluations_without_best: u64,
    /// Every line of metrics so far.
    pub log_history: Vec<MetricLine>,
    /// The steps since the last line of metrics.
    #[serde(default)]
    pub window: Window,
}

/// What steps are made from: a run that goes on with anything else would not be the same run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataIdentity {
    /// Training examples.
    pub examples: u64,
    /// Optimizer steps of a pass over them.
    pub steps_per_epoch: u64,
    /// Hash of the tokenised examples.
    pub sha256: String,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Metrics;

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
            data: DataIdentity { examples: 3, steps_per_epoch: 2, sha256: "ab".into() },
            best_metric: Some(5e-324),
            best_step: Some(3),
            evaluations_without_best: 2,
            log_history: vec![MetricLine::new(7, metrics)],
            window: Window::default(),
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
}
