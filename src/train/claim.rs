//! A run's claim on its folder: nobody else's files in it, nobody else writing to it.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::checkpoint::{PREFIX, checkpoint_dir, latest_good, list};
use crate::config::Resume;
use crate::files::{disk_error, remove_temporaries, verify, write_atomic};
use crate::report::METRICS_FILE;
use crate::{Error, Result};

/// The resolved configuration in a run's folder and in its checkpoints.
pub const CONFIG_FILE: &str = "config.toml";

/// A run's hold on its folder: no other process can claim it while this lives.
#[derive(Debug)]
pub struct Claim {
    /// The folder.
    pub output_dir: PathBuf,
    /// Step and folder of the checkpoint to go on from; `None` = from the start.
    pub checkpoint: Option<(u64, PathBuf)>,
    /// What the user should know, a sentence each.
    pub warnings: Vec<String>,
    /// Whether the folder was made for this claim.
    made: bool,
    /// Locked until the process ends, however it ends.
    _lock: File,
}

impl Drop for Claim {
    /// A folder that was made for a run that never began is removed again.
    fn drop(&mut self) {
        if self.made {
            // fails, as it should, where anything was written
            let _ = fs::remove_dir(&self.output_dir);
        }
    }
}

/// Claims `output_dir` for a run, making it if needed. A folder with another run's files is refused
/// unless this run resumes it, and so is one in use by a living process. When resuming, damaged
/// checkpoints are renamed to `….damaged` with a warning and remains of a killed process are removed.
pub fn claim_output_dir(output_dir: &Path, resume: &Resume) -> Result<Claim> {
    let made = !output_dir.exists();
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
        made,
        _lock: lock,
    };
    match resume {
        Resume::No => {}
        Resume::Latest => claim.take_latest()?,
        Resume::From(path) => claim.take(path)?,
    }
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
            || name == METRICS_FILE
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

    /// Writes [`CONFIG_FILE`], with a warning for each key that differs from the earlier one.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn write_config(&mut self, config: &str) -> Result<()> {
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
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
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
    use crate::train::checkpoint::{STATE_FILE, TrainerState, save};

    fn checkpoint(output_dir: &Path, step: u64) -> PathBuf {
        let state = TrainerState { global_step: step, ..Default::default() };
        save(output_dir, step, |dir| state.save(dir)).unwrap()
    }

    fn claimed(output_dir: &Path, config: &str, resume: &Resume) -> Result<Claim> {
        let mut claim = claim_output_dir(output_dir, resume)?;
        claim.write_config(config)?;
        Ok(claim)
    }

    fn refused(claim: Result<Claim>) -> String {
        let error = claim.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn another_runs_folder_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let output_dir = dir.path().join("runs/sft");
        drop(claimed(&output_dir, "seed = 1\n", &Resume::No).unwrap());
        let message = refused(claimed(&output_dir, "seed = 2\n", &Resume::No));
        assert!(message.contains("already holds a run (config.toml)"), "{message}");
        assert!(message.contains("--resume_from_checkpoint latest"), "{message}");
        assert_eq!(fs::read_to_string(output_dir.join(CONFIG_FILE)).unwrap(), "seed = 1\n");
        for name in [METRICS_FILE, "adapter_model.safetensors", "checkpoint-3"] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(name), "").unwrap();
            refused(claimed(dir.path(), "", &Resume::No));
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("train.log"), "").unwrap();
        claimed(dir.path(), "", &Resume::No).unwrap();
    }

    #[test]
    fn a_folder_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let held = claimed(dir.path(), "", &Resume::No).unwrap();
        let message = refused(claimed(dir.path(), "", &Resume::Latest));
        assert!(message.contains("in use by another process"), "{message}");
        drop(held);
        claimed(dir.path(), "", &Resume::Latest).unwrap();
    }

    #[test]
    fn resuming_sets_damaged_checkpoints_aside_and_reports_changed_keys() {
        let dir = tempfile::tempdir().unwrap();
        drop(claimed(dir.path(), "seed = 1\ndry_run = false\n", &Resume::No).unwrap());
        checkpoint(dir.path(), 10);
        fs::remove_file(checkpoint(dir.path(), 20).join(STATE_FILE)).unwrap();
        fs::create_dir(dir.path().join(".checkpoint-30.tmp")).unwrap();
        let claim = claimed(dir.path(), "seed = 2\n", &Resume::Latest).unwrap();
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
        drop(claimed(dir.path(), "seed = 1\n", &Resume::No).unwrap());
        let claim = claimed(dir.path(), "seed = 1\n", &Resume::Latest).unwrap();
        assert_eq!(claim.checkpoint, None);
        assert!(claim.warnings[0].contains("starting from the beginning"));
    }

    #[test]
    fn a_named_checkpoint_must_be_the_runs_newest() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (dir.path().join("a"), dir.path().join("b"));
        let (first, foreign) = (checkpoint(&ours, 1), checkpoint(&other, 1));
        let from = |path: &Path| claimed(&ours, "", &Resume::From(path.to_path_buf()));
        assert_eq!(from(&first).unwrap().checkpoint, Some((1, first.clone())));
        assert!(refused(from(&foreign)).contains("--adapter_name_or_path"));
        checkpoint(&ours, 2);
        assert!(refused(from(&first)).contains("also holds checkpoint-2"));
        let missing = from(&dir.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("none: no such file"), "{missing}");
    }
}
