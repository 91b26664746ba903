//! Files for tests.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::Row;

/// A file of this name and content in a fresh folder, which lives as long as the first part.
pub fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    (folder, path)
}

/// A row written as JSON.
pub fn row(json: serde_json::Value) -> Row {
    json.as_object().unwrap().clone()
}

/// A file of the shared data, or nothing and a line that says so.
pub fn shared(file: &str) -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("../../shared/data").join(file);
    if !path.exists() {
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}
