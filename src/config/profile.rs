//! The key `profile`, which every program that computes has.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::values::{Words, serde_as_text};

/// Whether a program measures itself.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Run", rename_all = "snake_case")]
#[serde(default)]
pub struct ProfileArgs {
    /// Measure where the time goes: a table at the end, and in this file a trace that
    /// ui.perfetto.dev opens; without a value profile.json.
    #[arg(num_args = 0..=1)]
    pub profile: ProfileTo,
}

impl ProfileArgs {
    /// The file of the trace, if the program measures itself.
    pub fn path(&self) -> Option<&Path> {
        match &self.profile {
            ProfileTo::Nowhere => None,
            ProfileTo::File(path) => Some(path),
        }
    }
}

/// Where the trace of a measured run goes: `false`, `true` for `profile.json`, or a path.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum ProfileTo {
    /// The run is not measured.
    #[default]
    Nowhere,
    /// This file.
    File(PathBuf),
}

impl FromStr for ProfileTo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("expects true, false or the path of a trace file".to_string()),
            "false" | "False" => Ok(ProfileTo::Nowhere),
            "true" | "True" => Ok(ProfileTo::File(PathBuf::from("profile.json"))),
            path => Ok(ProfileTo::File(PathBuf::from(path))),
        }
    }
}

impl fmt::Display for ProfileTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProfileTo::Nowhere => f.write_str("false"),
            ProfileTo::File(path) => path.display().fmt(f),
        }
    }
}

serde_as_text!(ProfileTo);
