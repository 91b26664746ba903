//! The inner loop of products of bf16 pairs on AVX-512 BF16: each instruction adds the products of
//! two neighbouring links to sixteen sums.
//!
//! An element is one chain in the order of pairs of k, so rows do not depend on the batch. The
//! instruction takes subnormal numbers for zero and rounds in its own way, so `medium` has other
//! bits here than on machines without it.

use std::arch::x86_64::*;

use super::lanes::LANES;
use super::matmul_tile::{Pair, Strip, tile_of_rows};
use super::prefetch;

/// Rows of the tallest tile: with two panels, 24 sums stay in registers.
const ROWS: usize = 12;

/// Computes a strip of pairs.
///
/// # Safety
/// As [`multiply`](super::matmul_tile::multiply); the machine has AVX-512 F and BF16.
pub(crate) unsafe fn multiply(strip: &Strip<Pair, u16>) {
    let mut strip = Strip {
        rows: strip.rows,
        k: strip.k.div_ceil(2),
        a: strip.a,
        lda: strip.lda,
        b: strip.b.cast::<Pair>(),
        panels: strip.panels,
        panel_stride: strip.panel_stride / 2,
        ahead: strip.ahead / 2,
        fetch: strip.fetch,
        init: strip.init,
        ldi: strip.ldi,
        y: strip.y,
        ldy: strip.ldy,
    };
    // SAFETY: the caller's promise.
    unsafe { rows(&mut strip) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn rows(strip: &mut Strip<Pair, Pair>) {
    while strip.rows > 0 {
        // SAFETY: the tile is some rows of a valid strip.
        unsafe { if strip.panels == 2 { by_rows::<2>(strip) } else { by_rows::<1>(strip) } }
        strip.advance(strip.rows.min(ROWS));
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn by_rows<const PANELS: usize>(strip: &Strip<Pair, Pair>) {
    // SAFETY: the tile has no more rows than the strip.
    unsafe { tile_of_rows!(tile, PANELS, strip) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(clippy::needless_range_loop)] // the indices are also offsets of the pointers
unsafe fn tile<const R: usize, const PANELS: usize>(strip: &Strip<Pair, Pair>) {
    // SAFETY: all offsets are inside the shapes stated by the fields; `k` counts pairs.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); PANELS]; R];
        for k in 0..strip.k {
            let mut b = [_mm512_setzero_si512(); PANELS];
            for p in 0..PANELS {
                let pairs = strip.b.add(p * strip.panel_stride + k * LANES);
                b[p] = _mm512_loadu_si512(pairs.cast());
                prefetch::to_first(pairs.wrapping_add(strip.ahead).cast());
            }
            for i in 0..R {
                let a = _mm512_set1_epi32((*strip.a.add(i * strip.lda + k)).0 as i32);
                for p in 0..PANELS {
                    acc[i][p] = _mm512_dpbf16_ps(acc[i][p], as_bf16(a), as_bf16(b[p]));
                }
            }
        }
        for i in 0..R {
            for p in 0..PANELS {
                let old = _mm512_loadu_ps(strip.init.add(i * strip.ldi + p * LANES));
                let y = strip.y.add(i * strip.ldy + p * LANES);
                _mm512_storeu_ps(y, _mm512_add_ps(old, acc[i][p]));
            }
        }
    }
}

/// The same bits as thirty-two bf16 numbers.
#[inline(always)]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes for which every bit pattern is valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}
