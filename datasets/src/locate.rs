//! Where data files are looked for.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Environment variable that names the folder of the data folders.
pub const VARIABLE: &str = "STEERSMAN_DATA";

/// The folder of the data folders that is looked in last, relative to the current directory.
const SHARED: &str = "../shared/data";

/// Finds `<folder>/<file>` below `$STEERSMAN_DATA`, or else below `../shared/data`.
///
/// # Errors
/// If it is in neither: says where was looked and what to do.
pub fn find(folder: &str, file: &str) -> Result<PathBuf> {
    let named = std::env::var_os(VARIABLE).filter(|root| !root.is_empty()).map(PathBuf::from);
    find_below(named.as_deref(), folder, file)
}

fn find_below(named: Option<&Path>, folder: &str, file: &str) -> Result<PathBuf> {
    let roots = named.into_iter().chain([Path::new(SHARED)]);
    let paths: Vec<_> = roots.map(|root| root.join(folder).join(file)).collect();
    if let Some(path) = paths.iter().find(|path| path.exists()) {
        return Ok(path.clone());
    }
    let looked = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
    let unset = if named.is_none() { format!(" ({VARIABLE} is not set)") } else { String::new() };
    Err(Error::usage(format!(
        "{folder}/{file} was not found, looked for {}{unset}; set {VARIABLE} to a folder that \
         holds {folder}/{file} as published",
        looked.join(" and ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_folder_comes_first() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("set")).unwrap();
        let file = root.path().join("set/test.jsonl");
        std::fs::write(&file, "").unwrap();
        assert_eq!(find_below(Some(root.path()), "set", "test.jsonl").unwrap(), file);
    }

    #[test]
    fn a_missing_file_says_where_was_looked_and_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let error = find_below(Some(root.path()), "set", "test.jsonl").unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&root.path().join("set/test.jsonl").display().to_string()), "{text}");
        assert!(text.contains("../shared/data/set/test.jsonl; set STEERSMAN_DATA"), "{text}");
        assert_eq!(error.exit_code(), 2);
        let text = find_below(None, "set", "x").unwrap_err().to_string();
        assert!(text.contains("STEERSMAN_DATA is not set"), "{text}");
    }
}
