//! The one error type of the library and what a program does with it.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result with the library's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, as one lower-case sentence naming the thing, where, and what to do.
#[derive(Debug)]
pub enum Error {
    /// The user asked for something that cannot be: a config key, a flag, a value, a model family.
    /// Exit code 2.
    Usage(String),
    /// The request was well formed but the work failed: damaged file, bad row, NaN, full disk.
    /// Exit code 1.
    Failure(String),
    /// The work cannot go on as it is, and what was done so far is sound: a run saves a checkpoint
    /// and ends. Exit code 1.
    Interrupted(String),
    /// A file could not be read or written. Exit code 1.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The tensor library refused an operation. Exit code 1.
    Tensor(candle_core::Error),
    /// A task, loader or generator failed.
    Data(datasets::Error),
}

impl Error {
    /// A mistake in the request itself (exit code 2).
    pub fn usage(message: impl Into<String>) -> Self {
        Error::Usage(message.into())
    }

    /// A well-formed request that failed (exit code 1).
    pub fn failure(message: impl Into<String>) -> Self {
        Error::Failure(message.into())
    }

    /// Wraps an I/O error with the path it happened at, for use in `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// The process exit code: 2 for usage, 1 for failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Data(error) => error.exit_code(),
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(text) | Error::Failure(text) | Error::Interrupted(text) => {
                f.write_str(text)
            }
            Error::Io { path, source } => write!(f, "{}: {}", path.display(), lower(source)),
            Error::Tensor(source) => {
                let text = source.to_string();
                let first = text.lines().next().unwrap_or_default();
                write!(f, "tensor operation failed: {first}")
            }
            Error::Data(source) => source.fmt(f),
        }
    }
}

/// The operating system's sentence, first letter in lower case and without its number.
fn lower(source: &std::io::Error) -> String {
    let text = source.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Tensor(source) => Some(source),
            Error::Data(source) => Some(source),
            _ => None,
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Error::Tensor(source)
    }
}

impl From<datasets::Error> for Error {
    fn from(source: datasets::Error) -> Self {
        Error::Data(source)
    }
}
