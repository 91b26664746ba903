//! What the machine can do at best: multiply-adds that wait for nothing, and reading memory.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;
#[cfg(target_arch = "x86_64")]
use steersman::kernels::dispatch::CpuLevel;

/// Peak rates of all threads of the pool together, in 1e9 a second.
pub struct Peak {
    /// f32 multiply-adds, each two FLOPs.
    pub gflops: f64,
    /// The same of what `medium` multiplies: tiles of bf16 where the machine has them, or the fastest of pairs
    /// of bf16, pairs of integers and f32.
    pub medium_gflops: f64,
    /// Bytes read from memory.
    pub gbytes: f64,
}

/// Sums that a thread keeps in registers: enough that none waits for its last addition.
const SUMS: usize = 16;
/// Additions to each sum in one measurement.
const ROUNDS: usize = 2_000_000;
/// Measurements, the best of which counts.
const TRIES: usize = 30;
/// Words that are read: far more than the caches hold.
const WORDS: usize = 1 << 25;

/// Measures all three; takes about a second.
pub fn measure() -> Peak {
    let gflops = multiply_adds();
    let medium_gflops = tiles().unwrap_or_else(|| gflops.max(pairs()));
    Peak { gflops, medium_gflops, gbytes: read() }
}

/// The best rate of `work`, which every thread does at once, each time `amount`.
fn best(amount: usize, work: impl Fn() + Sync) -> f64 {
    let rate = |_| {
        let start = Instant::now();
        let threads = rayon::broadcast(|_| work()).len();
        (threads * amount) as f64 / start.elapsed().as_nanos() as f64
    };
    (0..TRIES).map(rate).fold(0.0, f64::max)
}

#[cfg(target_arch = "x86_64")]
fn multiply_adds() -> f64 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has AVX-512 F.
        return best(2 * 16 * SUMS * ROUNDS, || unsafe { x86::avx512() });
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the machine has AVX2 and FMA.
        return best(2 * 8 * SUMS * ROUNDS, || unsafe { x86::avx2() });
    }
    portable()
}

#[cfg(not(target_arch = "x86_64"))]
fn multiply_adds() -> f64 {
    portable()
}

/// Pairs of bf16 and pairs of integers, whichever the machine multiplies faster; 0 where it has neither.
#[cfg(target_arch = "x86_64")]
fn pairs() -> f64 {
    let amount = 2 * 32 * SUMS * ROUNDS;
    let wide = is_x86_feature_detected!("avx512f");
    let mut rate = 0.0;
    if wide && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the machine has AVX-512 F and BF16.
        rate = best(amount, || unsafe { x86::pairs() });
    }
    if wide && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the machine has AVX-512 F and VNNI.
        rate = best(amount, || unsafe { x86::integers() }).max(rate);
    }
    rate
}

#[cfg(not(target_arch = "x86_64"))]
fn pairs() -> f64 {
    0.0
}

#[cfg(target_arch = "x86_64")]
fn tiles() -> Option<f64> {
    let there = CpuLevel::detect() == CpuLevel::Amx;
    // SAFETY: the machine has tiles, and the system gave leave to use them.
    there.then(|| best(2 * 16 * 16 * 32 * 4 * (ROUNDS / 16), || unsafe { x86::tiles() }))
}

#[cfg(not(target_arch = "x86_64"))]
fn tiles() -> Option<f64> {
    None
}

/// Products and sums in plain Rust, which the compiler vectorises for any machine.
fn portable() -> f64 {
    best(2 * 4 * SUMS * ROUNDS, || {
        let mut sums = [1f32; 4 * SUMS];
        let (factor, addend) = (black_box(0.5f32), black_box(1f32));
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = *sum * factor + addend);
        }
        black_box(sums);
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{ROUNDS, SUMS};

    #[target_feature(enable = "avx512f")]
    pub fn avx512() {
        let mut sums = [_mm512_set1_ps(1.0); SUMS];
        let (factor, addend) = (_mm512_set1_ps(0.5), _mm512_set1_ps(1.0));
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, factor, addend));
        }
        black_box(sums);
    }

    /// Four sums that take turns, of tiles of zeros.
    ///
    /// # Safety
    /// The machine has AMX with bf16, and this process may use it.
    pub unsafe fn tiles() {
        #[repr(C, align(64))]
        struct Shapes([u8; 64]);
        let mut shapes = Shapes([0; 64]);
        shapes.0[0] = 1;
        for tile in 0..6 {
            shapes.0[16 + 2 * tile] = 64;
            shapes.0[48 + tile] = 16;
        }
        // SAFETY: the shapes are valid, and no tile is in use.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "tilezero tmm4",
                "tilezero tmm5",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tdpbf16ps tmm1, tmm4, tmm5",
                "tdpbf16ps tmm2, tmm4, tmm5",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "dec {rounds}",
                "jnz 2b",
                "tilerelease",
                shapes = in(reg) &shapes,
                rounds = inout(reg) ROUNDS / 16 => _,
                options(nostack)
            );
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2() {
        let mut sums = [_mm256_set1_ps(1.0); SUMS];
        let (factor, addend) = (_mm256_set1_ps(0.5), _mm256_set1_ps(1.0));
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, factor, addend));
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn pairs() {
        let mut sums = [_mm512_set1_ps(1.0); SUMS];
        let pair = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5));
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, pair, pair));
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn integers() {
        let mut sums = [_mm512_set1_epi32(1); SUMS];
        let pair = black_box(_mm512_set1_epi16(1));
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpwssd_epi32(*sum, pair, pair));
        }
        black_box(sums);
    }
}

/// Reads an array that lies in memory.
fn read() -> f64 {
    let words: Vec<u64> = (0..WORDS as u64).into_par_iter().collect();
    let part = WORDS.div_ceil(rayon::current_num_threads());
    let rate = |_| {
        let start = Instant::now();
        let sum: u64 = words.par_chunks(part).map(|words| words.iter().sum::<u64>()).sum();
        black_box(sum);
        (8 * WORDS) as f64 / start.elapsed().as_nanos() as f64
    };
    (0..TRIES).map(rate).fold(0.0, f64::max)
}
