//! The key `device`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::values::{Words, serde_as_text};

/// The device the model runs on: `cpu`, `cuda` for the first NVIDIA GPU, or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The NVIDIA GPU of this number, from 0.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let gpu = |number: &str| number.parse().ok().map(Device::Cuda);
        match text {
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(gpu),
        }
        .ok_or_else(|| "expects cpu, cuda or cuda:N".to_string())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(0) => f.write_str("cuda"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

serde_as_text!(Device);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_print_as_they_are_read() {
        for text in ["cpu", "cuda", "cuda:1"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        assert_eq!("cuda:0".parse(), Ok(Device::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda0", "cpu:0"] {
            assert!(bad.parse::<Device>().is_err(), "{bad}");
        }
    }
}
