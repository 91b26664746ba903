//! A run's claim on its folder: nobody else's files in it, nobody else writing to it.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::checkpoint::{PREFIX, checkpoint_dir, latest_good, list};
use crate::config::{Resume, TrainArgs};
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
    /// The folders that were made for this claim.
    _made: Made,
    /// Locked until the process ends, however it ends.
    _lock: File,
}

/// Folders that were made for a run, the innermost first; if it never began they are removed again.
#[derive(Debug)]
struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        for folder in &self.0 {
            // fails, as it should, where anything was written
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Claims `output_dir` for a run, making it if needed. A folder with another run's files is refused
/// unless this run resumes it, and so are one in use by a living process and one whose run has
/// other adapter keys than `config`, the text of this run's [`CONFIG_FILE`]. When resuming, damaged
/// checkpoints are renamed to `….damaged` with a warning and remains of a killed process removed.
pub fn claim_output_dir(run: &TrainArgs, config: &str) -> Result<Claim> {
    let output_dir = run.output_dir.as_path();
    let (made, lock) = open(output_dir)?;
    refuse_other_run(run, config)?;
    remove_temporaries(output_dir)?;
    let mut claim = Claim {
        output_dir: output_dir.to_path_buf(),
        checkpoint: None,
        warnings: Vec::new(),
        _made: made,
        _lock: lock,
    };
    match &run.resume_from_checkpoint {
        Resume::No => {}
        Resume::Latest => claim.take_latest()?,
        Resume::From(path) => claim.checkpoint = Some(named_checkpoint(output_dir, path)?),
    }
    Ok(claim)
}

/// Refuses what [`claim_output_dir`] would refuse, and a folder in which no file can be written;
/// leaves everything as it is.
///
/// # Errors
/// As [`claim_output_dir`].
pub fn check_output_dir(run: &TrainArgs, config: &str) -> Result<()> {
    let output_dir = run.output_dir.as_path();
    let (_made, _lock) = open(output_dir)?;
    refuse_other_run(run, config)?;
    if let Resume::From(path) = &run.resume_from_checkpoint {
        named_checkpoint(output_dir, path)?;
    }
    let probe = output_dir.join(".dry_run.tmp");
    File::create(&probe).map_err(disk_error(&probe))?;
    fs::remove_file(&probe).map_err(Error::io(&probe))
}

/// Makes the folder if needed, and locks it.
fn open(output_dir: &Path) -> Result<(Made, File)> {
    let missing = output_dir.ancestors().filter(|folder| !folder.as_os_str().is_empty());
    let missing = missing.take_while(|folder| !folder.exists()).map(Path::to_path_buf);
    let made = Made(missing.collect());
    fs::create_dir_all(output_dir).map_err(|error| {
        let (folder, said) = (output_dir.display(), disk_error(output_dir)(error).to_string());
        let reason = said.strip_prefix(&format!("{folder}: ")).unwrap_or(&said);
        Error::failure(format!("output_dir {folder}: cannot be created: {reason}"))
    })?;
    let lock = lock(output_dir)?;
    Ok((made, lock))
}

/// Refuses a folder with a run that this one neither resumes nor could.
fn refuse_other_run(run: &TrainArgs, config: &str) -> Result<()> {
    let output_dir = run.output_dir.as_path();
    let held = run_files(output_dir)?;
    if run.resume_from_checkpoint == Resume::No {
        return match held.is_empty() {
            true => Ok(()),
            false => Err(Error::usage(format!(
                "{} already holds a run ({}); give another --output_dir, continue it with \
                 --resume_from_checkpoint latest, or remove the folder",
                output_dir.display(),
                held.join(", ")
            ))),
        };
    }
    let path = output_dir.join(CONFIG_FILE);
    if list(output_dir)?.is_empty() || !path.exists() {
        return Ok(());
    }
    let before = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let changes = changes(&before, config).unwrap_or_default();
    match changes.iter().find(|change| FIXED_KEYS.contains(&change.key.as_str())) {
        None => Ok(()),
        Some(Change { key, was, now }) => Err(Error::usage(format!(
            "{key} was {was} and is now {now}: resume the run with what it began with, or start \
             another in a new output_dir"
        ))),
    }
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

/// The run's newest checkpoint, given by its path, with its step.
fn named_checkpoint(output_dir: &Path, path: &Path) -> Result<(u64, PathBuf)> {
    let canonical = |path: &Path| path.canonicalize().map_err(Error::io(path));
    let wanted = canonical(path)?;
    let checkpoints = list(&canonical(output_dir)?)?;
    let Some((step, _)) = checkpoints.iter().find(|(_, dir)| *dir == wanted) else {
        return Err(Error::usage(format!(
            "{} is no checkpoint of {}; resume in the checkpoint's own output_dir, or start \
             a new run from its adapter with --adapter_name_or_path",
            path.display(),
            output_dir.display()
        )));
    };
    if let Some((later, _)) = checkpoints.last().filter(|(last, _)| last > step) {
        return Err(Error::usage(format!(
            "{} also holds {PREFIX}{later}, which resuming from step {step} would overwrite; \
             move it away first",
            output_dir.display()
        )));
    }
    verify(&wanted)?;
    Ok((*step, checkpoint_dir(output_dir, *step)))
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
const FREE_KEYS: [&str; 12] = [
    "resume_from_checkpoint",
    "dry_run",
    "output_dir",
    "run_name",
    "report_to",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "memory_budget",
    "reuse_activations",
];

/// Keys that say what the parameters of a checkpoint mean.
const FIXED_KEYS: [&str; 11] = [
    "adapter",
    "steering_kind",
    "steering_site",
    "steering_rank",
    "steering_alpha",
    "steering_layers",
    "steering_positions",
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_target_modules",
];

/// A key with another value than before.
struct Change {
    key: String,
    was: String,
    now: String,
}

/// A sentence for each key whose value differs, [`FREE_KEYS`] aside.
fn changed_keys(before: &str, after: &str) -> Vec<String> {
    let Some(changes) = changes(before, after) else {
        return vec![format!("the earlier {CONFIG_FILE} cannot be read and is replaced")];
    };
    let sentence = |Change { key, was, now }| {
        format!("{key} was {was} and is now {now}: the result is not that of an unbroken run")
    };
    let free = |change: &Change| FREE_KEYS.contains(&change.key.as_str());
    changes.into_iter().filter(|change| !free(change)).map(sentence).collect()
}

/// The keys whose values differ; nothing if a text is no TOML.
fn changes(before: &str, after: &str) -> Option<Vec<Change>> {
    let (before, after) = (before.parse::<toml::Table>().ok()?, after.parse::<toml::Table>().ok()?);
    let show = |value: Option<&toml::Value>| match value {
        Some(value) => value.to_string(),
        None => "unset".to_string(),
    };
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let changed = keys.into_iter().filter(|key| before.get(*key) != after.get(*key));
    let change = |key: &String| Change {
        key: key.clone(),
        was: show(before.get(key)),
        now: show(after.get(key)),
    };
    Some(changed.map(change).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::checkpoint::{STATE_FILE, TrainerState, save};

    fn checkpoint(output_dir: &Path, step: u64) -> PathBuf {
        let state = TrainerState { global_step: step, ..Default::default() };
        save(output_dir, step, |dir| state.save(dir)).unwrap()
    }

    fn run(output_dir: &Path, resume: &Resume) -> TrainArgs {
        let (output_dir, resume_from_checkpoint) = (output_dir.to_path_buf(), resume.clone());
        TrainArgs { output_dir, resume_from_checkpoint, ..Default::default() }
    }

    fn claimed(output_dir: &Path, config: &str, resume: &Resume) -> Result<Claim> {
        let mut claim = claim_output_dir(&run(output_dir, resume), config)?;
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
    fn other_adapter_keys_are_refused_before_anything_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        drop(claimed(dir.path(), "steering_rank = 8\n", &Resume::No).unwrap());
        claimed(dir.path(), "steering_rank = 4\n", &Resume::Latest).unwrap();
        checkpoint(dir.path(), 10);
        fs::create_dir(dir.path().join(".checkpoint-20.tmp")).unwrap();
        let message = refused(claimed(dir.path(), "steering_rank = 8\n", &Resume::Latest));
        let wanted = "steering_rank was 4 and is now 8: resume the run with what it began with";
        assert!(message.starts_with(wanted), "{message}");
        let dry = run(dir.path(), &Resume::Latest);
        assert_eq!(check_output_dir(&dry, "steering_rank = 8\n").unwrap_err().exit_code(), 2);
        assert!(dir.path().join(".checkpoint-20.tmp").exists());
        let config = fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
        assert_eq!(config, "steering_rank = 4\n");
        let more = "steering_rank = 4\nsave_steps = 3\nlogging_steps = 7\n";
        let claim = claimed(dir.path(), more, &Resume::Latest).unwrap();
        assert_eq!(claim.warnings, [""; 0]);
    }

    #[test]
    fn a_check_and_a_claim_that_came_to_nothing_leave_no_folder() {
        let dir = tempfile::tempdir().unwrap();
        let none = |output_dir: &Path| {
            check_output_dir(&run(output_dir, &Resume::No), "").unwrap();
            drop(claim_output_dir(&run(output_dir, &Resume::No), "").unwrap());
        };
        none(&dir.path().join("a/b/c"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::create_dir(dir.path().join("mine")).unwrap();
        none(&dir.path().join("mine"));
        assert_eq!(fs::read_dir(dir.path().join("mine")).unwrap().count(), 0);
        fs::write(dir.path().join("file"), "").unwrap();
        for below in ["file", "file/a"] {
            let path = dir.path().join(below);
            let error = check_output_dir(&run(&path, &Resume::No), "").unwrap_err();
            let wanted = format!("output_dir {}: cannot be created: ", path.display());
            assert!(error.to_string().starts_with(&wanted), "{error}");
        }
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
