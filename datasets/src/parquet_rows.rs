//! Rows of a parquet file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use crate::{Error, Result, Row};

/// Reads every row group; lists and structs become arrays and objects.
///
/// # Errors
/// If the file cannot be opened, is cut short, damaged, or holds no rows of columns.
pub(crate) fn read(path: &Path) -> Result<Vec<Row>> {
    let file = File::open(path).map_err(Error::io(path))?;
    // parquet's record reader asserts what a sound file guarantees, so that damage may panic
    catch_unwind(AssertUnwindSafe(|| read_open(file)))
        .unwrap_or_else(|_| Err("damaged".to_string()))
        .map_err(|message| Error::file(path, format!("not a readable parquet file: {message}")))
}

fn read_open(file: File) -> std::result::Result<Vec<Row>, String> {
    let reader = SerializedFileReader::new(file).map_err(|error| error.to_string())?;
    let rows = reader.get_row_iter(None).map_err(|error| error.to_string())?;
    rows.map(|row| match row.map_err(|error| error.to_string())?.to_json_value() {
        Value::Object(row) => Ok(row),
        _ => Err("a row is not made of columns".to_string()),
    })
    .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;

    use super::*;
    use crate::testing::file;

    /// A parquet file with the column `n`, two rows a row group.
    pub(crate) fn numbers(rows: &[i64]) -> Vec<u8> {
        let schema = Arc::new(parse_message_type("message m { required int64 n; }").unwrap());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
        for rows in rows.chunks(2) {
            let mut group = writer.next_row_group().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(rows, None, None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
        bytes
    }

    /// A parquet file with the column `messages`, laid out as the hub's are.
    fn conversations() -> Vec<u8> {
        let schema = "message m { optional group messages (LIST) { repeated group list {
            optional group element {
                optional binary role (UTF8); optional binary content (UTF8); } } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        // rows: [user a, assistant b], null, [user null]; levels as in the Dremel paper
        let columns =
            [(vec!["user", "assistant", "user"], [4, 4, 0, 4]), (vec!["a", "b"], [4, 4, 0, 3])];
        for (values, definition) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let values: Vec<_> = values.into_iter().map(ByteArray::from).collect();
            let levels = (Some(&definition[..]), Some(&[0, 1, 0, 0][..]));
            column.typed::<ByteArrayType>().write_batch(&values, levels.0, levels.1).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn every_row_group_is_read() {
        let (_folder, path) = file("a.parquet", numbers(&[3, 1, 4, 1, 5]));
        let rows: Vec<_> = read(&path).unwrap().iter().map(|row| row["n"].clone()).collect();
        assert_eq!(rows, [3, 1, 4, 1, 5]);
    }

    #[test]
    fn lists_of_structs_become_messages() {
        let (_folder, path) = file("a.parquet", conversations());
        let messages = json!([
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        ]);
        let wanted = json!([
            {"messages": messages},
            {"messages": null},
            {"messages": [{"role": "user", "content": null}]},
        ]);
        assert_eq!(json!(read(&path).unwrap()), wanted);
    }

    #[test]
    fn a_truncated_file_is_an_error_and_damage_never_panics() {
        let whole = conversations();
        for length in [0, 3, 8, whole.len() / 2, whole.len() - 1] {
            let (_folder, path) = file("a.parquet", &whole[..length]);
            let error = read(&path).unwrap_err();
            assert_eq!(error.exit_code(), 1);
            assert!(error.to_string().contains("a.parquet: not a readable parquet file: "));
        }
        for i in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[i] ^= 0x55;
            let (_folder, path) = file("a.parquet", damaged);
            let _ = read(&path);
        }
    }
}
