//! Splits of a data set: a file, or a folder with one file (or several shards) a split.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::rows::ACCEPTED;
use crate::{Error, Result, Row, read_rows};

/// Reads the rows of `split` at `path`.
///
/// A file is read whole, whatever the split is called. In a folder (a user's, or a data set fetched
/// from the hub) a split `s` is `s.jsonl`, `s.json`, `s.parquet` or the shards
/// `s-00000-of-00002.parquet` … (also JSONL or JSON, and with a hash behind the number), in the
/// folder itself or in its subfolder `data`, or the parquet files of a subfolder `s`; the first of
/// these that exists counts.
///
/// # Errors
/// If the path is missing, a row is malformed, a shard is missing, the split holds no row, or the
/// folder has no such split; the last lists those that it has.
pub fn read_split(path: &Path, split: &str) -> Result<Vec<Row>> {
    if !path.is_dir() {
        return read_rows(path);
    }
    let mut splits = find_splits(path)?;
    let Some(files) = splits.remove(split) else {
        return Err(Error::usage(missing(path, split, splits.keys())));
    };
    let mut rows = Vec::new();
    for file in &files {
        rows.extend(read_rows(file)?);
    }
    if rows.is_empty() {
        return Err(Error::file(path, format!("split {split} holds no row")));
    }
    Ok(rows)
}

/// Whether the folder `path` has the split; a file is every split.
///
/// # Errors
/// If the folder cannot be read, or a shard is missing.
pub fn has_split(path: &Path, split: &str) -> Result<bool> {
    Ok(!path.is_dir() || find_splits(path)?.contains_key(split))
}

/// Parts `rows` into those to train on and `n` held-out ones, both in their old order.
///
/// Which rows are held out depends on their number, `n` and `seed` only.
///
/// # Errors
/// If nothing would be left to train on.
pub fn split_off<T>(rows: Vec<T>, n: usize, seed: u64) -> Result<(Vec<T>, Vec<T>)> {
    if n >= rows.len() {
        return Err(Error::usage(format!(
            "{n} of {} rows are to be held out, which leaves none to train on",
            rows.len()
        )));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<(u64, usize)> = (0..rows.len()).map(|i| (rng.next_u64(), i)).collect();
    order.sort_unstable();
    let mut held = vec![false; rows.len()];
    order[..n].iter().for_each(|(_, i)| held[*i] = true);
    let (held, kept): (Vec<_>, Vec<_>) = rows.into_iter().zip(held).partition(|(_, held)| *held);
    let plain = |rows: Vec<(T, bool)>| rows.into_iter().map(|(row, _)| row).collect();
    Ok((plain(kept), plain(held)))
}

fn missing<'a>(path: &Path, split: &str, found: impl Iterator<Item = &'a String>) -> String {
    let found: Vec<_> = found.map(String::as_str).collect();
    let path = path.display();
    match found.is_empty() {
        true => format!("{path}: holds no data files; give {ACCEPTED}"),
        false => format!("{path}: no split {split}; found {}", found.join(", ")),
    }
}

/// The files of every split in a folder.
fn find_splits(folder: &Path) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut splits = BTreeMap::new();
    let data = folder.join("data");
    for folder in [folder, &data].into_iter().filter(|folder| folder.is_dir()) {
        for extension in ["jsonl", "json", "parquet"] {
            for path in files(folder, extension)? {
                splits.entry(stem(&path)).or_insert_with(|| vec![path]);
            }
        }
        for (split, shards) in sharded(folder)? {
            splits.entry(split).or_insert(shards);
        }
    }
    for subfolder in entries(folder)?.into_iter().filter(|path| path.is_dir()) {
        let found = files(&subfolder, "parquet")?;
        if !found.is_empty() && subfolder != data {
            splits.entry(name(&subfolder)).or_insert(found);
        }
    }
    splits.retain(|split, _| shard(split).is_none());
    Ok(splits)
}

/// The splits of a folder that lie in shards, each complete and in order.
fn sharded(folder: &Path) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut found: BTreeMap<(String, usize), Vec<PathBuf>> = BTreeMap::new();
    for extension in ["jsonl", "json", "parquet"] {
        for path in files(folder, extension)? {
            if let Some((split, of)) = shard(&stem(&path)) {
                found.entry((split.to_string(), of)).or_default().push(path);
            }
        }
    }
    let complete = |((split, of), shards): ((String, usize), Vec<PathBuf>)| {
        if shards.len() != of {
            let message = format!("has {} of the {of} shards of split {split}", shards.len());
            return Err(Error::file(folder, message));
        }
        Ok((split, shards))
    };
    found.into_iter().map(complete).collect()
}

/// Split and number of shards of a file stem such as `train-00000-of-00002`, which older data sets
/// of the hub end with a hash: `train-00000-of-00002-6ef3991c06080e14`.
fn shard(stem: &str) -> Option<(&str, usize)> {
    let (rest, of) = stem.rsplit_once("-of-")?;
    let (split, index) = rest.rsplit_once('-')?;
    index.parse::<usize>().ok()?;
    let of = of.split_once('-').map_or(of, |(of, _)| of);
    Some((split, of.parse().ok()?))
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let wanted =
        |path: &PathBuf| path.is_file() && path.extension().is_some_and(|e| e == extension);
    Ok(entries(folder)?.into_iter().filter(wanted).collect())
}

/// What a folder holds, sorted by name, without hidden files.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if !name(&path).starts_with('.') {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The file's name without its extension.
fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::parquet_rows::tests::numbers;

    /// A folder with these files, each a JSONL or parquet file of one row per number.
    fn folder(files: &[(&str, &[i64])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, rows) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match name.ends_with(".parquet") {
                true => std::fs::write(path, numbers(rows)).unwrap(),
                false => {
                    let lines: Vec<_> = rows.iter().map(|n| json!({"n": n}).to_string()).collect();
                    std::fs::write(path, lines.join("\n")).unwrap();
                }
            }
        }
        folder
    }

    fn read(folder: &tempfile::TempDir, split: &str) -> Vec<i64> {
        let rows = read_split(folder.path(), split).unwrap();
        rows.iter().map(|row| row["n"].as_i64().unwrap()).collect()
    }

    #[test]
    fn each_layout_of_a_folder_is_read() {
        let folder = folder(&[
            ("train.jsonl", &[1, 2]),
            ("data/validation.parquet", &[3]),
            ("data/test-00001-of-00002.parquet", &[5]),
            ("data/test-00000-of-00002.parquet", &[4]),
            ("old-00001-of-00002-b7e0.parquet", &[9]),
            ("old-00000-of-00002-ffa1.parquet", &[8]),
            ("lines-00000-of-00001.jsonl", &[10]),
            ("v1.0/b.parquet", &[7]),
            ("v1.0/a.parquet", &[6]),
        ]);
        assert_eq!(read(&folder, "train"), [1, 2]);
        assert_eq!(read(&folder, "validation"), [3]);
        assert_eq!(read(&folder, "test"), [4, 5]);
        assert_eq!(read(&folder, "v1.0"), [6, 7]);
        assert_eq!(read(&folder, "old"), [8, 9]);
        assert_eq!(read(&folder, "lines"), [10]);
        let file = folder.path().join("train.jsonl");
        assert_eq!(read_split(&file, "any").unwrap().len(), 2);
    }

    #[test]
    fn a_missing_split_lists_those_found() {
        let files = folder(&[("train.jsonl", &[1]), ("test-00000-of-00001.parquet", &[2])]);
        let error = read_split(files.path(), "dev").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().ends_with(": no split dev; found test, train"), "{error}");
        let rowless = folder(&[("train.jsonl", &[])]);
        let error = read_split(rowless.path(), "train").unwrap_err().to_string();
        assert!(error.ends_with(": split train holds no row"), "{error}");
        let empty = folder(&[]);
        let error = read_split(empty.path(), "train").unwrap_err().to_string();
        assert!(error.contains("holds no data files; give a .jsonl"), "{error}");
    }

    #[test]
    fn a_missing_shard_is_an_error() {
        let folder = folder(&[("data/train-00000-of-00002.parquet", &[1])]);
        let error = read_split(folder.path(), "train").unwrap_err().to_string();
        assert!(error.contains("has 1 of the 2 shards of split train"), "{error}");
    }

    #[test]
    fn held_out_rows_are_the_same_each_time_and_no_row_is_lost() {
        let rows: Vec<_> = (0..100).collect();
        let (kept, held) = split_off(rows.clone(), 30, 5).unwrap();
        assert_eq!((kept.len(), held.len()), (70, 30));
        assert!(kept.is_sorted() && held.is_sorted());
        let mut all = [kept.clone(), held].concat();
        all.sort_unstable();
        assert_eq!(all, rows);
        assert_eq!(split_off(rows.clone(), 30, 5).unwrap().0, kept);
        assert_ne!(split_off(rows.clone(), 30, 6).unwrap().0, kept);
        assert_eq!(split_off(rows.clone(), 0, 5).unwrap().0, rows);
        assert!(split_off(rows, 100, 5).is_err());
    }
}
