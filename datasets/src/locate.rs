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
    find_below(named().as_deref(), folder, file)
}

/// The error for a file that [`find`] does not find. `besides` is put behind where was looked, for
/// what else was tried; empty if nothing was.
pub fn missing(folder: &str, file: &str, besides: &str) -> Error {
    missing_below(named().as_deref(), folder, file, besides)
}

/// The folder that the environment names.
fn named() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).filter(|root| !root.is_empty()).map(PathBuf::from)
}

fn find_below(named: Option<&Path>, folder: &str, file: &str) -> Result<PathBuf> {
    let found = candidates(named, folder, file).into_iter().find(|path| path.exists());
    found.ok_or_else(|| missing_below(named, folder, file, ""))
}

fn missing_below(named: Option<&Path>, folder: &str, file: &str, besides: &str) -> Error {
    let paths = candidates(named, folder, file);
    let looked = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
    let unset = if named.is_none() { format!("; {VARIABLE} is not set") } else { String::new() };
    Error::usage(format!(
        "{folder}/{file} was not found (looked for {}{unset}){besides}; set {VARIABLE} to a folder \
         that holds {folder}/{file} as published",
        looked.join(" and ")
    ))
}

/// Where the file may be, in the order in which is looked.
fn candidates(named: Option<&Path>, folder: &str, file: &str) -> Vec<PathBuf> {
    let roots = named.into_iter().chain([Path::new(SHARED)]);
    roots.map(|root| root.join(folder).join(file)).collect()
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
        assert!(text.contains("../shared/data/set/test.jsonl); set STEERSMAN_DATA"), "{text}");
        assert_eq!(error.exit_code(), 2);
        let text = find_below(None, "set", "x").unwrap_err().to_string();
        assert!(text.contains("STEERSMAN_DATA is not set"), "{text}");
    }

    #[test]
    fn what_else_was_tried_comes_before_what_to_do() {
        let text = missing_below(None, "set", "x", ", and the hub has none").to_string();
        assert_eq!(
            text,
            "set/x was not found (looked for ../shared/data/set/x; STEERSMAN_DATA is not set), and \
             the hub has none; set STEERSMAN_DATA to a folder that holds set/x as published"
        );
    }
}
