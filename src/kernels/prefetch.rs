//! Brings cache lines closer before they are read; nothing where no instruction for it is known.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

/// Brings the line at an address, valid or not, into the first-level cache.
#[inline(always)]
pub(crate) fn to_first(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: any address may be prefetched.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Brings the line at an address, valid or not, into the second-level cache.
#[inline(always)]
pub(crate) fn to_second(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: any address may be prefetched.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Lines that lie together and are to come into the second-level cache, bit by bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lines {
    at: usize,
    end: usize,
}

impl Lines {
    /// No lines.
    pub(crate) fn none() -> Self {
        Self { at: 0, end: 0 }
    }

    /// `count` lines from an address on, valid or not.
    pub(crate) fn new(at: usize, count: usize) -> Self {
        Self { at, end: at + count * LINE }
    }

    /// Whether some are left.
    pub(crate) fn are_left(&self) -> bool {
        self.at < self.end
    }

    /// Fetches the next `N` if some are left, beyond the last of them if these are fewer.
    #[inline(always)]
    pub(crate) fn some<const N: usize>(&mut self) {
        if self.are_left() {
            (0..N).for_each(|i| to_second(std::ptr::without_provenance(self.at + i * LINE)));
            self.at += N * LINE;
        }
    }
}
