//! What can go wrong with data, as one lower-case sentence each.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a task, loader or generator.
#[derive(Debug)]
pub enum Error {
    /// The request itself is wrong: an unknown task, column or split. Exit code 2.
    Usage(String),
    /// A file is missing or unreadable.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is there, but is not what it should be.
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// A line of a text file is malformed.
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it and what to do.
        message: String,
    },
}

impl Error {
    /// A mistake in the request itself.
    pub fn usage(message: impl Into<String>) -> Self {
        Error::Usage(message.into())
    }

    /// Turns an operating system's error about `path` into this crate's.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Error::Io { path: path.to_path_buf(), source }
    }

    /// A file that is not what it should be.
    pub fn file(path: &Path, message: impl Into<String>) -> Self {
        Error::File { path: path.to_path_buf(), message: message.into() }
    }

    /// A malformed line of a text file, by its number from 1: shown as `file:line`.
    pub fn line(path: &Path, line: usize, message: impl Into<String>) -> Self {
        Error::Line { path: path.to_path_buf(), line, message: message.into() }
    }

    /// A row that was read, but is not what it should be, by its number from 1: shown as `file: row n`.
    pub fn row(path: &Path, number: usize, message: impl std::fmt::Display) -> Self {
        Error::file(path, format!("row {number}: {message}"))
    }

    /// The process exit code: 2 for usage, 1 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(message) => f.write_str(message),
            Error::Io { path, source } => write!(f, "{}: {}", path.display(), lower(source)),
            Error::File { path, message } => write!(f, "{}: {message}", path.display()),
            Error::Line { path, line, message } => {
                write!(f, "{}:{line}: {message}", path.display())
            }
        }
    }
}

/// The operating system's sentence, first letter in lower case and without its number.
fn lower(source: &std::io::Error) -> String {
    let text = source.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operating_system_sentences_are_lower_case_without_their_number() {
        let error = std::fs::File::open("no/such").map_err(Error::io(Path::new("no/such")));
        assert_eq!(error.unwrap_err().to_string(), "no/such: no such file or directory");
    }
}
