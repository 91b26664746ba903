//! What the programs share: start-up, flag spelling, exit codes.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use crate::{Error, Result};

/// What errors call the standard output.
const STDOUT: &str = "standard output";

/// Runs a program: its arguments after the name go in, flags in snake_case or kebab-case, and an
/// exit code comes out.
///
/// An error is printed as one line on stderr; exit code 2 for usage, 1 for failure. A reader of the
/// standard output who goes away, as `head` does, ends the program without a word and with 0.
pub fn main(run: impl FnOnce(Vec<String>) -> Result<()>) -> ExitCode {
    let args = start_up().and_then(|()| crate::config::arguments());
    let result = args.and_then(|args| run(snake_flags(args)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if reader_is_gone(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error.to_string()));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Writes a text to the standard output, now. Programs print nothing in any other way.
///
/// # Errors
/// If it cannot be written; [`main`] takes a closed pipe for the end of the program.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io(STDOUT))
}

fn reader_is_gone(error: &Error) -> bool {
    match error {
        Error::Io { path, source } => {
            path == Path::new(STDOUT) && source.kind() == ErrorKind::BrokenPipe
        }
        _ => false,
    }
}

/// A message of a library, which may have several lines, as one.
fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Turns `--learning-rate=1e-3` into `--learning_rate=1e-3`; values stay as they are.
pub fn snake_flags(args: impl IntoIterator<Item = String>) -> Vec<String> {
    let snake = |arg: String| match arg.strip_prefix("--") {
        None | Some("") => arg,
        Some(flag) => {
            let (name, value) = flag.split_at(flag.find('=').unwrap_or(flag.len()));
            format!("--{}{value}", name.replace('-', "_"))
        }
    };
    args.into_iter().map(snake).collect()
}

/// Readies the process for kernels; every program calls it first.
///
/// Freed memory is kept for the next step: giving pages back and faulting them in again costs a fifth
/// of a training step. The calling thread is one of those that kernels run on: handing each kernel
/// over to other threads alone would cost a wake-up and a wait.
///
/// # Errors
/// If the threads cannot be started.
pub fn start_up() -> Result<()> {
    set_up_heap();
    let threads = rayon::ThreadPoolBuilder::new().use_current_thread();
    threads.build_global().map_err(|error| {
        Error::failure(format!(
            "the threads of the kernels cannot be started: {error}; set RAYON_NUM_THREADS lower"
        ))
    })
}

/// glibc's heap joins freed neighbours, so that what is in use and what is resident differ by
/// little, by what [`heap`](crate::heap) keeps besides. It grows by whole huge pages, so that weights can lie on them.
fn set_up_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets numbers inside the allocator, which may be done at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, 4 << 20);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_may_be_spelled_with_dashes_but_values_are_kept() {
        let args = ["--learning-rate=1e-3", "--output-dir", "my-run", "--", "-x", "a-b"];
        let snake = snake_flags(args.map(String::from));
        assert_eq!(snake, ["--learning_rate=1e-3", "--output_dir", "my-run", "--", "-x", "a-b"]);
    }
}
