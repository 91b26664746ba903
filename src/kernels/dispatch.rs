//! Which vector extension runs a kernel: found once, at run time.
//!
//! Every level computes the same fused multiply-adds in the same order, so the bits of a result
//! do not depend on the level.

use std::sync::OnceLock;

use super::simd::{Portable, Simd};
#[cfg(target_arch = "x86_64")]
use super::simd_x86::{Avx2, Avx512};

/// A vector extension that kernels are compiled for, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum CpuLevel {
    /// Plain Rust; the only level outside x86-64.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl CpuLevel {
    /// The best level of this machine; looked up once.
    pub fn detect() -> Self {
        static LEVEL: OnceLock<CpuLevel> = OnceLock::new();
        *LEVEL.get_or_init(detect_now)
    }
}

#[cfg(target_arch = "x86_64")]
fn detect_now() -> CpuLevel {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => CpuLevel::Avx512,
        (true, false) => CpuLevel::Avx2,
        (false, _) => CpuLevel::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect_now() -> CpuLevel {
    CpuLevel::Portable
}

/// A piece of work written once over [`Simd`] and compiled for every level.
pub(crate) trait SimdTask {
    /// What the work returns.
    type Output;

    /// Does the work; mark it `#[inline(always)]`, or it is compiled without the extension.
    ///
    /// # Safety
    /// The CPU has the features of `S`, and pointers in `self` are valid for what the task does.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs `task` at `level`, or at the machine's best level where that is lower.
///
/// # Safety
/// Pointers in `task` are valid for what the task does.
pub(crate) unsafe fn dispatch<T: SimdTask>(level: CpuLevel, task: T) -> T::Output {
    match level.min(CpuLevel::detect()) {
        // SAFETY: `detect` saw the features; the pointers are the caller's promise.
        #[cfg(target_arch = "x86_64")]
        CpuLevel::Avx512 => unsafe { run_avx512(task) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        CpuLevel::Avx2 => unsafe { run_avx2(task) },
        // SAFETY: no features are needed; the pointers are the caller's promise.
        _ => unsafe { task.run::<Portable>() },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<T: SimdTask>(task: T) -> T::Output {
    // SAFETY: this function is compiled for, and only called with, these features.
    unsafe { task.run::<Avx512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<T: SimdTask>(task: T) -> T::Output {
    // SAFETY: this function is compiled for, and only called with, these features.
    unsafe { task.run::<Avx2>() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_from_worst_to_best() {
        assert!(CpuLevel::Portable < CpuLevel::Avx2 && CpuLevel::Avx2 < CpuLevel::Avx512);
        assert_eq!(CpuLevel::detect(), CpuLevel::detect());
    }
}
