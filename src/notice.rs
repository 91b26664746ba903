//! What a program tells on the standard error besides a run's events. Writing to a closed one is no error.

use std::io::Write;

/// Something that the user should know and that does not stop the program.
pub fn warn(text: &str) {
    say("warning", text);
}

/// Something that explains what comes.
pub fn note(text: &str) {
    say("note", text);
}

fn say(kind: &str, text: &str) {
    let _ = writeln!(std::io::stderr(), "{kind}: {text}");
}
