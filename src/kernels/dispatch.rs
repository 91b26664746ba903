//! Which vector extension runs a kernel: found once, at run time.
//!
//! Every level computes the same fused multiply-adds in the same order, so the bits of a result
//! do not depend on the level; products at `high` and `medium` are the exception, since some
//! machines have instructions of their own for them.

use std::sync::OnceLock;

use super::lanes::{Kernel, Portable, Simd};
#[cfg(target_arch = "x86_64")]
use super::lanes_x86::{Avx2, Avx512};

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
    /// AVX-512 and the bf16 tiles of AMX, with the system's leave to use them.
    Amx,
    /// As `Amx`, with tiles in software.
    #[cfg(test)]
    Emulated,
}

impl CpuLevel {
    /// The best level of this machine; looked up once.
    pub fn detect() -> Self {
        static LEVEL: OnceLock<CpuLevel> = OnceLock::new();
        *LEVEL.get_or_init(detect_now)
    }

    /// Whether the level has AVX-512 and this machine too.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_avx512(self) -> bool {
        self.min(Self::detect()) >= Self::Avx512
    }

    /// Whether bf16 pairs are multiplied by one instruction at this level (AVX-512 BF16).
    pub(crate) fn multiplies_pairs(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self.has_avx512() {
            return is_x86_feature_detected!("avx512bf16");
        }
        false
    }

    /// Whether that is faster than f32. AMD's processors multiply twice as many numbers a second in
    /// pairs; one of Intel's (Emerald Rapids) half as many, and oneDNN's products are as slow there.
    pub(crate) fn multiplies_pairs_fast(self) -> bool {
        static FAST: OnceLock<bool> = OnceLock::new();
        self.multiplies_pairs() && *FAST.get_or_init(|| has_fast_pairs(&vendor()))
    }

    /// Whether pairs of sixteen-bit integers are multiplied by one instruction at this level (AVX-512 VNNI).
    pub(crate) fn multiplies_integers(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self.has_avx512() {
            return is_x86_feature_detected!("avx512vnni");
        }
        false
    }

    /// Whether tiles of bf16 are multiplied by one instruction at this level (AMX).
    pub(crate) fn multiplies_tiles(self) -> bool {
        #[cfg(test)]
        if self == Self::Emulated {
            return true;
        }
        self.min(Self::detect()) == Self::Amx
    }

    /// Runs `kernel` at this level, or at the machine's best level where that is lower.
    #[inline]
    pub(crate) fn run<R, K: Kernel<R>>(self, kernel: K) -> R {
        match self.min(Self::detect()) {
            // SAFETY: `detect` saw the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Amx => unsafe { Avx512::new() }.run(kernel),
            // SAFETY: `detect` saw the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { Avx2::new() }.run(kernel),
            _ => Portable.run(kernel),
        }
    }
}

/// Whether a vendor's processors multiply pairs of bf16 faster than f32.
fn has_fast_pairs(vendor: &[u8]) -> bool {
    vendor != b"GenuineIntel"
}

/// The vendor's name in CPUID; asking takes microseconds in a virtual machine.
fn vendor() -> Vec<u8> {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = std::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn detect_now() -> CpuLevel {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) if may_use_tiles() => CpuLevel::Amx,
        (true, true) => CpuLevel::Avx512,
        (true, false) => CpuLevel::Avx2,
        (false, _) => CpuLevel::Portable,
    }
}

/// Whether the processor has AMX with bf16, the system keeps the tiles of each thread, and this
/// process has been allowed to use them, for which Linux wants to be asked.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    /// AMX-BF16 and AMX-TILE in EDX of leaf 7.
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    /// Configuration and data of the tiles in XCR0, and the number of the latter.
    const STATES: u64 = 1 << 17 | 1 << TILE_DATA;
    const TILE_DATA: libc::c_long = 18;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;

    #[target_feature(enable = "xsave")]
    fn enabled() -> u64 {
        // SAFETY: the register zero exists.
        unsafe { _xgetbv(0) }
    }

    let has_tiles = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & FEATURES == FEATURES;
    // SAFETY: the feature was found; the call changes nothing but this process's permissions.
    has_tiles
        && is_x86_feature_detected!("xsave")
        && unsafe { enabled() } & STATES == STATES
        && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) } == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn may_use_tiles() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn detect_now() -> CpuLevel {
    CpuLevel::Portable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_left_to_the_vendor_whose_are_fast() {
        assert!(has_fast_pairs(b"AuthenticAMD") && !has_fast_pairs(b"GenuineIntel"));
        let known = !cfg!(target_arch = "x86_64") || vendor().len() == 12;
        assert!(known && (!CpuLevel::Avx2.multiplies_pairs_fast()));
    }

    #[test]
    fn levels_are_ordered_from_worst_to_best() {
        assert!(CpuLevel::Portable < CpuLevel::Avx2 && CpuLevel::Avx2 < CpuLevel::Avx512);
        assert_eq!(CpuLevel::detect(), CpuLevel::detect());
    }
}
