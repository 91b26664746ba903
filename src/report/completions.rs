//! Sampled completions: a table in `completions/completions_00010.parquet` (TRL's name), and a few on
//! the terminal.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use datasets::Row;
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::Value;

use super::{Event, Sink};
use crate::files::write_atomic;
use crate::{Error, Result};

/// A completion of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRow {
    /// Optimizer step, from 1.
    pub step: u64,
    /// Number of its prompt among the training rows, from 1.
    pub row: u64,
    /// Its prompt as text.
    pub prompt: String,
    /// Its text.
    pub completion: String,
    /// Its reward; none if it is left out.
    pub reward: Option<f64>,
    /// The score of each reward function.
    pub scores: Vec<(String, Option<f64>)>,
    /// What it came to, if it was graded.
    pub outcome: Option<&'static str>,
    /// Why it ended.
    pub stop: &'static str,
    /// Its length.
    pub tokens: u64,
    /// The further columns of its prompt's row, so that rewards can be tried on the table.
    pub columns: Row,
}

/// The sink that writes tables of completions.
pub struct CompletionsFolder(PathBuf);

impl CompletionsFolder {
    /// Tables in `output_dir/completions`.
    pub fn new(output_dir: &Path) -> Self {
        CompletionsFolder(output_dir.join("completions"))
    }
}

impl Sink for CompletionsFolder {
    fn take(&mut self, event: &Event) -> Result<()> {
        let Event::Sampled { rows, .. } = event else { return Ok(()) };
        let Some(first) = rows.first() else { return Ok(()) };
        std::fs::create_dir_all(&self.0).map_err(Error::io(&self.0))?;
        let path = self.0.join(format!("completions_{:05}.parquet", first.step));
        let table =
            table(rows).map_err(|error| Error::failure(format!("{}: {error}", path.display())))?;
        write_atomic(&path, &table)
    }
}

/// The columns of a table besides the scores.
const SCHEMA: &str = "required int64 step; required int64 row; required binary prompt (UTF8); \
    required binary completion (UTF8); optional double reward; optional binary outcome (UTF8); \
    required binary stop (UTF8); required int64 tokens;";

/// The names in [`SCHEMA`].
const FIXED: [&str; 8] =
    ["step", "row", "prompt", "completion", "reward", "outcome", "stop", "tokens"];

/// What a column of the rows' own holds.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Integers,
    Numbers,
    /// Texts; what else there is stands as JSON.
    Texts,
}

impl Kind {
    fn of(values: impl Iterator<Item = Value> + Clone) -> Self {
        let known = || values.clone().filter(|value| !value.is_null());
        match () {
            _ if known().all(|value| value.is_i64()) => Kind::Integers,
            _ if known().all(|value| value.is_number()) => Kind::Numbers,
            _ => Kind::Texts,
        }
    }

    fn in_schema(self, name: &str) -> String {
        match self {
            Kind::Integers => format!("optional int64 {name};"),
            Kind::Numbers => format!("optional double {name};"),
            Kind::Texts => format!("optional binary {name} (UTF8);"),
        }
    }
}

/// The columns of the rows' own: name and kind. Names that a schema cannot hold are left out, and so
/// are those of the table's own columns.
fn own_columns(rows: &[CompletionRow]) -> Vec<(&String, Kind)> {
    let names: BTreeSet<&String> = rows.iter().flat_map(|row| row.columns.keys()).collect();
    let fits = |name: &&String| {
        !name.is_empty()
            && *name == name.trim_matches('_')
            && format!("reward_{name}") == column_name(name)
            && !name.starts_with("reward_")
            && !FIXED.contains(&name.as_str())
    };
    let kind =
        |name| (name, Kind::of(rows.iter().filter_map(move |row| row.columns.get(name).cloned())));
    names.into_iter().filter(fits).map(kind).collect()
}

/// The bytes of a parquet file.
fn table(rows: &[CompletionRow]) -> parquet::errors::Result<Vec<u8>> {
    let names = rows.first().map(|row| row.scores.iter().map(|(name, _)| name.clone()));
    let names: Vec<String> = names.into_iter().flatten().collect();
    let scores: String =
        names.iter().map(|name| format!("optional double {};", column_name(name))).collect();
    let own = own_columns(rows);
    let more: String = own.iter().map(|(name, kind)| kind.in_schema(name)).collect();
    let schema =
        parse_message_type(&format!("message completions {{ {SCHEMA} {scores} {more} }}"))?;
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let properties = WriterProperties::builder().set_compression(zstd).build();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, Arc::new(schema), Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let mut number = 0;
    while let Some(mut column) = group.next_column()? {
        let whole = |get: fn(&CompletionRow) -> u64| -> Vec<i64> {
            rows.iter().map(|row| get(row) as i64).collect()
        };
        match number {
            0 => integers(&mut column, &whole(|row| row.step))?,
            1 => integers(&mut column, &whole(|row| row.row))?,
            2 => texts(&mut column, rows.iter().map(|row| Some(row.prompt.as_str())), false)?,
            3 => texts(&mut column, rows.iter().map(|row| Some(row.completion.as_str())), false)?,
            4 => numbers(&mut column, rows.iter().map(|row| row.reward))?,
            5 => texts(&mut column, rows.iter().map(|row| row.outcome), true)?,
            6 => texts(&mut column, rows.iter().map(|row| Some(row.stop)), false)?,
            7 => integers(&mut column, &whole(|row| row.tokens))?,
            i if i < FIXED.len() + names.len() => {
                numbers(&mut column, rows.iter().map(|row| row.scores[i - FIXED.len()].1))?
            }
            i => own_column(&mut column, own[i - FIXED.len() - names.len()], rows)?,
        }
        column.close()?;
        number += 1;
    }
    group.close()?;
    writer.close()?;
    Ok(bytes)
}

fn own_column(
    column: &mut SerializedColumnWriter,
    (name, kind): (&String, Kind),
    rows: &[CompletionRow],
) -> parquet::errors::Result<()> {
    let values = || rows.iter().map(|row| row.columns.get(name).filter(|value| !value.is_null()));
    let written = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match kind {
        Kind::Integers => {
            let levels: Vec<i16> = values().map(|value| i16::from(value.is_some())).collect();
            let values: Vec<i64> = values().flatten().filter_map(Value::as_i64).collect();
            column.typed::<Int64Type>().write_batch(&values, Some(&levels), None).map(drop)
        }
        Kind::Numbers => numbers(column, values().map(|value| value.and_then(Value::as_f64))),
        Kind::Texts => {
            let written: Vec<Option<String>> = values().map(|value| value.map(written)).collect();
            texts(column, written.iter().map(Option::as_deref), true)
        }
    }
}

/// A reward's name as a column's: what a schema cannot hold becomes `_`.
fn column_name(name: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
    format!("reward_{}", name.chars().map(allowed).collect::<String>())
}

fn integers(column: &mut SerializedColumnWriter, values: &[i64]) -> parquet::errors::Result<()> {
    column.typed::<Int64Type>().write_batch(values, None, None).map(drop)
}

fn numbers(
    column: &mut SerializedColumnWriter,
    values: impl Iterator<Item = Option<f64>> + Clone,
) -> parquet::errors::Result<()> {
    let levels: Vec<i16> = values.clone().map(|value| i16::from(value.is_some())).collect();
    let values: Vec<f64> = values.flatten().collect();
    column.typed::<DoubleType>().write_batch(&values, Some(&levels), None).map(drop)
}

fn texts<'a>(
    column: &mut SerializedColumnWriter,
    values: impl Iterator<Item = Option<&'a str>> + Clone,
    optional: bool,
) -> parquet::errors::Result<()> {
    let levels: Vec<i16> = values.clone().map(|value| i16::from(value.is_some())).collect();
    let values: Vec<ByteArray> = values.flatten().map(ByteArray::from).collect();
    let levels = optional.then_some(&levels[..]);
    column.typed::<ByteArrayType>().write_batch(&values, levels, None).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(i: u64) -> CompletionRow {
        CompletionRow {
            step: 10,
            row: i,
            prompt: "1 + 1?".into(),
            completion: format!("é\n{i}"),
            reward: (i != 1).then_some(0.5 * i as f64),
            scores: vec![("a.py:f".into(), (i != 2).then_some(i as f64)), ("b".into(), None)],
            outcome: (i == 0).then_some("right"),
            stop: "eos",
            tokens: 7,
            columns: [
                ("answer".to_string(), json!(format!("é{i}"))),
                ("level".to_string(), if i == 1 { Value::Null } else { json!(i) }),
                ("weight".to_string(), json!(0.5 * i as f64)),
                ("mixed".to_string(), if i == 0 { json!([1, "a"]) } else { json!("b") }),
                ("tokens".to_string(), json!("the table's own column wins")),
                ("no name".to_string(), json!(1)),
                (String::new(), json!(1)),
            ]
            .into_iter()
            .collect(),
        }
    }

    #[test]
    fn tables_read_back_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = CompletionsFolder::new(dir.path());
        let rows: Vec<_> = (0..3).map(row).collect();
        sink.take(&Event::Sampled { rows: rows.clone(), shown: 0 }).unwrap();
        let path = dir.path().join("completions/completions_00010.parquet");
        let read = datasets::read_rows(&path).unwrap();
        assert_eq!(read.len(), 3);
        for (read, row) in read.iter().zip(&rows) {
            assert_eq!(read["completion"].as_str(), Some(row.completion.as_str()));
            assert_eq!(read["reward"].as_f64(), row.reward);
            assert_eq!(read["reward_a_py_f"].as_f64(), row.scores[0].1);
            assert_eq!(read["outcome"].as_str(), row.outcome);
            assert_eq!((read["row"].as_u64(), read["tokens"].as_u64()), (Some(row.row), Some(7)));
            assert_eq!(read["answer"], row.columns["answer"]);
            assert_eq!(read["level"], row.columns["level"]);
            assert_eq!(read["weight"], row.columns["weight"]);
            assert_eq!(read["mixed"], if row.row == 0 { json!("[1,\"a\"]") } else { json!("b") });
            assert!(!read.contains_key("no name"));
        }
    }
}
