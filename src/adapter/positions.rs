//! Which tokens a steering adapter shifts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::Batch;
use crate::{Error, Result};

/// The positions that are steered; all but `All` count within the prompt, as in pyreft.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Positions {
    /// Every token, generated ones included.
    #[default]
    All,
    /// The last token of the prompt.
    Last,
    /// The first and the last tokens of the prompt.
    Ends {
        /// Number of tokens from the start.
        first: usize,
        /// Number of tokens before the prompt's end.
        last: usize,
    },
}

impl Positions {
    /// The rows of `batch` that are steered, or `None` for all.
    pub fn rows(self, batch: &Batch) -> Option<Vec<u32>> {
        let (first, last) = match self {
            Positions::All => return None,
            Positions::Last => (0, 1),
            Positions::Ends { first, last } => (first as u32, last as u32),
        };
        let chosen = |row: &usize| {
            let (position, prompt) = (batch.positions[*row], batch.prompt_lengths[*row]);
            position < prompt && (position < first || position + last >= prompt)
        };
        Some((0..batch.len()).filter(chosen).map(|row| row as u32).collect())
    }
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Positions::All => f.write_str("all"),
            Positions::Last => f.write_str("last"),
            Positions::Ends { first, last } => write!(f, "first {first} + last {last}"),
        }
    }
}

impl FromStr for Positions {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let part = |part: &str, word: &str| -> Option<usize> {
            part.trim().strip_prefix(word)?.trim_start_matches(['=', ' ']).parse().ok()
        };
        let ends = |text: &str| -> Option<Positions> {
            let (first, last) = text.split_once(['+', ','])?;
            Some(Positions::Ends { first: part(first, "first")?, last: part(last, "last")? })
        };
        match text.trim() {
            "all" => Ok(Positions::All),
            "last" => Ok(Positions::Last),
            text => ends(text).ok_or_else(|| {
                let wanted = "'all', 'last' or 'first N + last M'";
                Error::usage(format!("steering_positions '{text}' is none of {wanted}"))
            }),
        }
    }
}

impl TryFrom<String> for Positions {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Positions> for String {
    fn from(positions: Positions) -> Self {
        positions.to_string()
    }
}
