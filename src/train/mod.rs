//! x
pub mod batching;
pub mod example;
pub mod memory;
pub mod objective;
pub mod tokenize;
/// x
pub mod files {
    use crate::*;
    /// x
    pub fn write_atomic(path: &std::path::Path, bytes: &[u8]) -> Result<()> {
        std::fs::write(path, bytes).map_err(Error::io(path))
    }
}
