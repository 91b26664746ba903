//! Rows of a JSON, JSONL or parquet file.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result, parquet_rows};

/// One row: column names and values, in the file's order.
pub type Row = Map<String, Value>;

/// What a data file may be, for error messages.
pub(crate) const ACCEPTED: &str =
    "a .jsonl, .json or .parquet file, or a folder with one such file a split";

/// Reads every row of a file, whose format is told by its extension.
///
/// - `.jsonl`, `.ndjson`: one object a line; empty lines are skipped.
/// - `.json`: an array of objects, or an object with exactly one array (as `{"data": [...]}`), or
///   one object a line (as AQuA's files are).
/// - `.parquet`: nested columns become arrays and objects, bytes base64 text, dates ISO text.
///
/// # Errors
/// If the file is missing, has another extension, or holds something that is not a row: a line that cannot be
/// read is named as `file:line`, a row that could as `file: row n`, counted from 1.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    if !path.exists() {
        return Err(Error::usage(format!("{}: does not exist; give {ACCEPTED}", path.display())));
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl" | "ndjson") => read_jsonl(path),
        Some("json") => read_json(path),
        Some("parquet") => parquet_rows::read(path),
        _ => Err(Error::usage(format!("{}: not a data file; give {ACCEPTED}", path.display()))),
    }
}

/// Applies `f` to every row; an error names the row by its number from 1.
///
/// # Errors
/// The first error of `f`.
pub fn map_rows<T>(rows: &[Row], f: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    let numbered = |(i, row)| {
        f(row).map_err(|error| match error {
            Error::Usage(message) => Error::Usage(format!("row {}: {message}", i + 1)),
            other => other,
        })
    };
    rows.iter().enumerate().map(numbered).collect()
}

/// The text of column `name`, or a message that says what the row has instead.
pub(crate) fn text<'a>(row: &'a Row, name: &str) -> std::result::Result<&'a str, String> {
    match row.get(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("column {name} is {}, not text", kind(other))),
        None => Err(format!("no column {name}; the row has {}", columns(row))),
    }
}

/// The row's column names, for error messages.
pub(crate) fn columns(row: &Row) -> String {
    match row.is_empty() {
        true => "no columns".to_string(),
        false => row.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
    }
}

/// The kind of a value, for error messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn read_jsonl(path: &Path) -> Result<Vec<Row>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    lines(path, &bytes)
}

/// One object a line.
fn lines(path: &Path, bytes: &[u8]) -> Result<Vec<Row>> {
    let lines = without_mark(bytes).split(|byte| *byte == b'\n').enumerate();
    lines
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(i, line)| {
            let value = serde_json::from_slice(line).map_err(|error| {
                Error::line(path, i + 1, format!("not a JSON object: {}", sentence(&error)))
            })?;
            object(value).map_err(|message| Error::line(path, i + 1, message))
        })
        .collect()
}

fn read_json(path: &Path) -> Result<Vec<Row>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let value = match serde_json::from_slice(without_mark(&bytes)) {
        Ok(value) => value,
        Err(_) if begins_with_a_row(&bytes) => return lines(path, &bytes),
        Err(error) => return Err(Error::line(path, error.line(), sentence(&error))),
    };
    let rows = match value {
        Value::Array(rows) => rows,
        Value::Object(fields) => {
            only_array(fields).map_err(|message| Error::file(path, message))?
        }
        other => {
            let message = format!("holds {}; wanted an array of objects", kind(&other));
            return Err(Error::file(path, message));
        }
    };
    let numbered = |(i, row)| object(row).map_err(|message| Error::row(path, i + 1, message));
    rows.into_iter().enumerate().map(numbered).collect()
}

/// Whether the first line that is not empty is an object of its own.
fn begins_with_a_row(bytes: &[u8]) -> bool {
    let mut lines = without_mark(bytes).split(|byte| *byte == b'\n');
    let first = lines.find(|line| !line.trim_ascii().is_empty());
    first.is_some_and(|line| serde_json::from_slice::<Row>(line).is_ok())
}

/// The one array among an object's fields.
fn only_array(fields: Row) -> std::result::Result<Vec<Value>, String> {
    let names = columns(&fields);
    let mut arrays = fields.into_iter().filter_map(|(_, value)| match value {
        Value::Array(rows) => Some(rows),
        _ => None,
    });
    match (arrays.next(), arrays.next()) {
        (Some(rows), None) => Ok(rows),
        (None, _) => Err(format!("an object without an array of rows; it has {names}")),
        (Some(_), Some(_)) => Err(format!(
            "an object with several arrays, of which one must be \
             the rows; it has {names}"
        )),
    }
}

fn object(value: Value) -> std::result::Result<Row, String> {
    match value {
        Value::Object(row) => Ok(row),
        other => Err(format!("a row is an object, not {}", kind(&other))),
    }
}

/// Bytes behind a UTF-8 byte order mark, if there is one.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// What serde says, with the column only: the line is named by the caller.
fn sentence(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("{what} at column {}", error.column())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::file;

    #[test]
    fn json_and_jsonl_hold_the_same_rows() {
        let (_folder, lines) = file("a.jsonl", "\u{feff}{\"b\":1,\"a\":\"x\"}\r\n\n{\"b\":2}\n");
        let (_folder, array) = file("a.json", r#"[{"b":1,"a":"x"},{"b":2}]"#);
        let (_folder, object) = file("b.json", r#"{"n":2,"data":[{"b":1,"a":"x"},{"b":2}]}"#);
        let rows = read_rows(&lines).unwrap();
        assert_eq!(json!(rows), json!([{"b": 1, "a": "x"}, {"b": 2}]));
        assert_eq!(rows[0].keys().collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!(read_rows(&array).unwrap(), rows);
        assert_eq!(read_rows(&object).unwrap(), rows);
        let (_folder, named_json) = file("c.json", "{\"b\":1,\"a\":\"x\"}\n{\"b\":2}\n");
        assert_eq!(read_rows(&named_json).unwrap(), rows);
    }

    #[test]
    fn malformed_rows_are_named_by_file_and_line() {
        for (text, wanted) in [
            ("{\"a\":1}\n\n{\"a\":}\n", "a.jsonl:3: not a JSON object: expected value at column 6"),
            ("{\"a\":1}\n[1]\n", "a.jsonl:2: a row is an object, not a list"),
            ("{\"a\":\"\u{0}\"}", "a.jsonl:1: not a JSON object: control character"),
        ] {
            let (_folder, path) = file("a.jsonl", text);
            let error = read_rows(&path).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
            assert_eq!(error.exit_code(), 1);
        }
        let (_folder, path) = file("a.jsonl", b"{\"a\":\"\xff\"}");
        assert!(read_rows(&path).unwrap_err().to_string().contains("a.jsonl:1: "));
    }

    #[test]
    fn json_without_one_array_of_objects_is_refused() {
        for (text, wanted) in [
            ("3", "holds a number; wanted an array of objects"),
            ("{\"a\":1}", "without an array of rows; it has a"),
            ("{\"a\":[],\"b\":[]}", "several arrays"),
            ("[{},\n 4]", ".json: row 2: a row is an object, not a number"),
            ("[{},\n {]", ".json:2: key must be a string at column 3"),
            ("{\"a\":1}\n{\"a\":}", ".json:2: not a JSON object: expected value at column 6"),
        ] {
            let (_folder, path) = file("a.json", text);
            let error = read_rows(&path).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn what_is_no_data_file_is_refused_with_what_is_accepted() {
        let error = read_rows(Path::new("nowhere/rows.jsonl")).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().starts_with("nowhere/rows.jsonl: does not exist; give a .jsonl"));
        let (_folder, path) = file("a.csv", "a,b");
        assert!(read_rows(&path).unwrap_err().to_string().contains("not a data file"));
    }

    #[test]
    fn errors_of_rows_name_the_row() {
        let rows = [Row::new(), Row::new()];
        let error = map_rows(&rows, |_| Err::<(), _>(Error::usage("no column a"))).unwrap_err();
        assert_eq!(error.to_string(), "row 1: no column a");
        assert_eq!(map_rows(&rows, |_| Ok(7)).unwrap(), [7, 7]);
    }
}
