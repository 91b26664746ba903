//! A size of memory as a key's value: `auto`, or such as `4GiB`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How much memory a run may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MemoryBudget {
    /// What is free on the machine.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(usize),
}

/// Units by their size, the largest first; the binary ones are those that sizes are printed in.
const UNITS: [(&str, usize); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

impl FromStr for MemoryBudget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unreadable = || "expects auto, or a size such as 4GiB or 900MiB".to_string();
        if text.trim() == "auto" {
            return Ok(MemoryBudget::Auto);
        }
        let with_unit = |(unit, size): &(&str, usize)| {
            Some((text.trim().strip_suffix(unit)?.trim_end().parse::<f64>().ok()?, *size))
        };
        let (number, unit) = UNITS.iter().find_map(with_unit).ok_or_else(unreadable)?;
        let bytes = number * unit as f64;
        match (1.0..2f64.powi(53)).contains(&bytes) {
            true => Ok(MemoryBudget::Bytes(bytes as usize)),
            false => Err(unreadable()),
        }
    }
}

impl fmt::Display for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemoryBudget::Bytes(bytes) = self else { return f.write_str("auto") };
        let exact = UNITS.iter().find(|(_, size)| bytes.is_multiple_of(*size));
        let (unit, size) = exact.copied().unwrap_or(("B", 1));
        write!(f, "{}{unit}", bytes / size)
    }
}

impl TryFrom<String> for MemoryBudget {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MemoryBudget> for String {
    fn from(budget: MemoryBudget) -> Self {
        budget.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_in_every_unit() {
        for (text, bytes) in [
            ("4GiB", 4 << 30),
            ("1.5 GiB", 3 << 29),
            ("900MiB", 900 << 20),
            ("2GB", 2_000_000_000),
            ("12B", 12),
        ] {
            assert_eq!(text.parse(), Ok(MemoryBudget::Bytes(bytes)), "{text}");
        }
        assert_eq!("auto".parse(), Ok(MemoryBudget::Auto));
        for bad in ["", "4", "GiB", "-1GiB", "0B", "1e30GiB", "NaNB", "4GiB2"] {
            assert!(bad.parse::<MemoryBudget>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_size_prints_as_it_is_read(bytes in 1usize..1 << 50) {
            let budget = MemoryBudget::Bytes(bytes);
            prop_assert_eq!(budget.to_string().parse::<MemoryBudget>(), Ok(budget));
        }
    }
}
