//! Files that are whole or absent: temporary name, fsync, rename, fsync of the folder; and folders
//! of files with a manifest of their hashes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Name of the list of hashes in a folder.
pub const MANIFEST: &str = "manifest.json";

/// Turns an I/O error at a path into a sentence; a full disk says what to do.
pub fn disk_error(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.as_ref().to_path_buf();
    move |error| match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Error::failure(format!(
                "{}: no space left on the disk; free some and continue with \
                 --resume_from_checkpoint latest",
                path.display()
            ))
        }
        _ => Error::io(path)(error),
    }
}

/// Writes a file so that a reader, also after a crash, sees the old content or the new, never a
/// part. On error the old file is untouched and nothing else is left behind.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_name(path);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    if let Err(error) = write() {
        let _ = fs::remove_file(&temporary);
        return Err(disk_error(path)(error));
    }
    sync_folder(parent(path))
}

/// Makes a folder that is complete or absent: `fill` writes plain files into a temporary folder,
/// which gets a [`MANIFEST`] and is renamed to `path`. An existing `path` is an error. On error
/// nothing is left behind.
pub fn write_folder_atomic(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.exists() {
        return Err(Error::failure(format!(
            "{} exists already and is never overwritten; move it away",
            path.display()
        )));
    }
    let temporary = temporary_name(path);
    let write = || {
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(Error::io(&temporary))?;
        }
        fs::create_dir_all(&temporary).map_err(disk_error(path))?;
        fill(&temporary)?;
        seal(&temporary)?;
        fs::rename(&temporary, path).map_err(disk_error(path))
    };
    if let Err(error) = write() {
        let _ = fs::remove_dir_all(&temporary);
        return Err(error);
    }
    sync_folder(parent(path))
}

/// Removes a folder so that after a crash it is there whole or not at all.
pub fn remove_folder_atomic(path: &Path) -> Result<()> {
    let temporary = temporary_name(path);
    fs::rename(path, &temporary).map_err(Error::io(path))?;
    fs::remove_dir_all(&temporary).map_err(Error::io(path))
}

/// Removes what a killed process left half-written in a folder: entries with a temporary name.
pub fn remove_temporaries(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !(name.starts_with('.') && name.ends_with(".tmp")) {
            continue;
        }
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::io(&path))?;
    }
    Ok(())
}

/// `folder/.name.tmp` for `folder/name`: on the same file system, and hidden.
fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    parent(path).join(format!(".{name}.tmp"))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a folder's entries durable.
fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(disk_error(path))
}

/// Size and hash of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    size: u64,
    sha256: String,
}

/// The files of a folder, by name.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    files: BTreeMap<String, FileRecord>,
}

/// Makes the files of a folder durable and writes their hashes to its manifest.
fn seal(folder: &Path) -> Result<()> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::open(&path).map_err(Error::io(&path))?;
        file.sync_all().map_err(disk_error(&path))?;
        files.insert(name, record(&path)?);
    }
    let text = serde_json::to_string_pretty(&Manifest { files })
        .map_err(|error| Error::failure(format!("{}: {error}", folder.display())))?;
    write_atomic(&folder.join(MANIFEST), (text + "\n").as_bytes())
}

/// Checks that every file of a folder's manifest is there with its size and hash. The error names
/// the first damaged file.
pub fn verify(folder: &Path) -> Result<()> {
    let path = folder.join(MANIFEST);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let manifest: Manifest = serde_json::from_str(&text)
        .map_err(|error| Error::failure(format!("{}: not a manifest: {error}", path.display())))?;
    for (name, expected) in &manifest.files {
        let path = folder.join(name);
        let found = record(&path)?;
        if found.size != expected.size {
            return Err(Error::failure(format!(
                "{} has {} bytes instead of {}",
                path.display(),
                found.size,
                expected.size
            )));
        }
        if found.sha256 != expected.sha256 {
            return Err(Error::failure(format!(
                "{} is damaged: its sha256 is not that of the manifest",
                path.display()
            )));
        }
    }
    Ok(())
}

fn record(path: &Path) -> Result<FileRecord> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut size = 0;
    loop {
        let count = file.read(&mut buffer).map_err(Error::io(path))?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        size += count as u64;
    }
    Ok(FileRecord { size, sha256: format!("{:x}", hash.finalize()) })
}

/// Mounts a tiny tmpfs for tests of a full disk.
#[cfg(test)]
pub(crate) mod tiny_disk {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// A disk of a few KiB, unmounted when dropped.
    pub(crate) struct TinyDisk(tempfile::TempDir);

    impl TinyDisk {
        /// Mounts one, or says why the test is skipped.
        pub(crate) fn mount(kib: usize) -> Option<Self> {
            let folder = tempfile::tempdir().unwrap();
            let size = format!("size={kib}k");
            let mounted = Command::new("mount")
                .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
                .arg(folder.path())
                .output();
            match mounted {
                Ok(output) if output.status.success() => Some(Self(folder)),
                _ => {
                    eprintln!("SKIPPED: mounting a tmpfs needs root and a kernel that allows it");
                    None
                }
            }
        }

        pub(crate) fn path(&self) -> &Path {
            self.0.path()
        }

        /// Names in the disk's root, to show that nothing is left behind.
        pub(crate) fn names(&self) -> Vec<PathBuf> {
            std::fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
        }
    }

    impl Drop for TinyDisk {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0.path()).status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::tiny_disk::TinyDisk;
    use super::*;

    fn put(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
        write_atomic(&folder.join(name), bytes)
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "a", b"one").unwrap();
        put(dir.path(), "a", b"two").unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_folder_is_complete_or_absent_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint-1");
        let failed = write_folder_atomic(&path, |tmp| {
            put(tmp, "a", b"one")?;
            Err(Error::failure("no second file"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no second file");
        assert!(names(dir.path()).is_empty());

        write_folder_atomic(&path, |tmp| put(tmp, "a", b"one")).unwrap();
        assert_eq!(names(&path), ["a", MANIFEST]);
        verify(&path).unwrap();
        let again = write_folder_atomic(&path, |_| Ok(())).unwrap_err().to_string();
        assert!(again.contains("never overwritten"), "{again}");
        assert_eq!(fs::read(path.join("a")).unwrap(), b"one");

        remove_folder_atomic(&path).unwrap();
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".checkpoint-2.tmp")).unwrap();
        fs::write(dir.path().join(".checkpoint-2.tmp/a"), "half").unwrap();
        fs::write(dir.path().join(".config.toml.tmp"), "half").unwrap();
        fs::write(dir.path().join(".keep"), "mine").unwrap();
        remove_temporaries(dir.path()).unwrap();
        assert_eq!(names(dir.path()), [".keep"]);
    }

    #[test]
    fn every_kind_of_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder");
        write_folder_atomic(&path, |tmp| put(tmp, "a", &[7; 100_000])).unwrap();
        let damage = |bytes: &[u8]| {
            fs::write(path.join("a"), bytes).unwrap();
            verify(&path).unwrap_err().to_string()
        };
        let mut flipped = vec![7; 100_000];
        flipped[99_999] = 6;
        assert!(damage(&flipped).ends_with("its sha256 is not that of the manifest"));
        assert!(damage(&[7; 99_999]).ends_with("has 99999 bytes instead of 100000"));
        fs::remove_file(path.join("a")).unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("no such file"));
        fs::write(path.join(MANIFEST), "{").unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("not a manifest"));
        fs::remove_file(path.join(MANIFEST)).unwrap();
        assert!(verify(&path).is_err());
    }

    #[test]
    fn a_full_disk_is_one_sentence_and_leaves_nothing_half_written() {
        let Some(disk) = TinyDisk::mount(64) else { return };
        let path = disk.path().join("file");
        write_atomic(&path, b"old").unwrap();
        let full = |result: Result<()>| {
            let error = result.unwrap_err();
            assert_eq!(error.exit_code(), 1);
            let message = error.to_string();
            assert!(message.contains("no space left on the disk"), "{message}");
        };
        full(write_atomic(&path, &vec![1; 1 << 20]));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        full(write_folder_atomic(&disk.path().join("checkpoint-1"), |tmp| {
            put(tmp, "small", b"fits")?;
            put(tmp, "large", &vec![1; 1 << 20])
        }));
        assert_eq!(disk.names(), [path]);
    }
}
