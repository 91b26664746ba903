//! Which tokens a steering adapter shifts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::Batch;

/// Which tokens are steered: `all`, `last` (the last token of the prompt), or `first=n,last=m`,
/// counted within the prompt as in pyreft.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Positions {
    /// Every token of prompt and completion.
    #[default]
    All,
    /// The first and the last tokens of the prompt.
    Ends {
        /// How many tokens from the start of the prompt.
        first: usize,
        /// How many tokens up to the end of the prompt.
        last: usize,
    },
}

impl Positions {
    /// The rows of `batch` that are steered, or `None` for all.
    pub fn rows(self, batch: &Batch) -> Option<Vec<u32>> {
        let (first, last) = match self {
            Positions::All => return None,
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
            Positions::Ends { first: 0, last: 1 } => f.write_str("last"),
            Positions::Ends { first: 0, last } => write!(f, "last={last}"),
            Positions::Ends { first, last: 0 } => write!(f, "first={first}"),
            Positions::Ends { first, last } => write!(f, "first={first},last={last}"),
        }
    }
}

impl FromStr for Positions {
    type Err = String;

    /// Also reads `first 2 + last 3` and pyreft's `f2+l3`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "all" => return Ok(Positions::All),
            "last" => return Ok(Positions::Ends { first: 0, last: 1 }),
            _ => {}
        }
        let (mut first, mut last) = (None, None);
        for part in text.split([',', '+']) {
            let (end, count) = end_and_count(part).ok_or_else(unreadable)?;
            let slot = if end { &mut last } else { &mut first };
            if slot.replace(count).is_some() {
                return Err(unreadable());
            }
        }
        match (first.unwrap_or(0), last.unwrap_or(0)) {
            (0, 0) => Err(unreadable()),
            (first, last) => Ok(Positions::Ends { first, last }),
        }
    }
}

/// `first=2` as (false, 2), `last 3` as (true, 3).
fn end_and_count(part: &str) -> Option<(bool, usize)> {
    let part = part.trim();
    let split = part.find(|c: char| !c.is_ascii_alphabetic())?;
    let (word, count) = part.split_at(split);
    let end = match word {
        "first" | "f" => false,
        "last" | "l" => true,
        _ => return None,
    };
    Some((end, count.trim_start_matches(['=', ' ']).parse().ok()?))
}

fn unreadable() -> String {
    "expects all, last, or counts such as first=2,last=3".to_string()
}

impl TryFrom<String> for Positions {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Positions> for String {
    fn from(positions: Positions) -> Self {
        positions.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_spelling_reads_back_to_the_same_positions() {
        let ends = |first, last| Positions::Ends { first, last };
        for (text, positions) in [
            ("all", Positions::All),
            ("last", ends(0, 1)),
            ("first=2,last=3", ends(2, 3)),
            ("first 2 + last 3", ends(2, 3)),
            ("f2+l3", ends(2, 3)),
            ("last=4", ends(0, 4)),
        ] {
            assert_eq!(text.parse(), Ok(positions), "{text}");
            assert_eq!(positions.to_string().parse(), Ok(positions));
        }
        for bad in ["", "first", "first=0", "first=1,first=2", "middle=1", "last=-1"] {
            assert!(bad.parse::<Positions>().is_err(), "{bad}");
        }
    }

    #[test]
    fn positions_count_within_the_prompt() {
        let mut batch = Batch::new();
        let prompt = batch.push(&[0; 5], 5, None);
        batch.push(&[0; 3], 5, Some(prompt));
        batch.push(&[0; 4], 2, None);
        let rows = |text: &str| text.parse::<Positions>().unwrap().rows(&batch);
        assert_eq!(rows("all"), None);
        assert_eq!(rows("last"), Some(vec![4, 9]));
        assert_eq!(rows("first=1,last=2"), Some(vec![0, 3, 4, 8, 9]));
    }

    proptest! {
        #[test]
        fn positions_print_as_they_are_read(first in 0..9usize, last in 1..9usize) {
            let positions = Positions::Ends { first, last };
            prop_assert_eq!(positions.to_string().parse::<Positions>(), Ok(positions));
        }

        #[test]
        fn no_text_panics(text in ".{0,20}") {
            let _ = text.parse::<Positions>().is_ok();
        }
    }
}
