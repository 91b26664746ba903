//! The inner loop of products of sixteen-bit integers on AVX-512 VNNI: each instruction adds the products
//! of two neighbouring links to sixteen sums, as many instructions a second as of `f32`.
//!
//! Sums of integers are exact, whatever their order, so rows do not depend on the batch. A finished sum is
//! multiplied by the units of its column and its row and added to the old number. Weights above 1e32 may make it
//! infinite on the way.

use std::arch::x86_64::*;

use super::lanes::LANES;
use super::matmul_block_float::Integers;
use super::matmul_tall;
use super::matmul_tile::{Strip, tile_of_rows};
use super::pack::PairRow;

/// Rows of the tallest tile: with two panels, 24 sums stay in registers. Tall tiles fetch what is filled next.
pub(super) const ROWS: usize = matmul_tall::ROWS;

/// Computes a strip; behind its links each row of `a` has its unit and each panel those of its columns.
///
/// # Safety
/// As [`multiply`](super::matmul_tile::multiply); the machine has AVX-512 F and VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) unsafe fn multiply(strip: &mut Strip<Integers, PairRow>) {
    strip.k = strip.k.div_ceil(2);
    let tall = strip.panels == matmul_tall::PANELS && strip.k.is_multiple_of(matmul_tall::LINKS);
    while strip.rows > 0 {
        let tall_rows = if tall { matmul_tall::tile_rows(strip.rows) } else { 0 };
        // SAFETY: the tile is some rows of a valid strip.
        unsafe {
            match strip.panels {
                _ if tall_rows > 0 => {
                    let near = strip.b.cast();
                    let lines = strip.k / matmul_tall::LINKS;
                    let mut place = || strip.fetch.take(lines).unwrap_or(near);
                    let places = [place(), place()];
                    matmul_tall::multiply_integers(strip, places);
                }
                2 => by_rows::<2>(strip),
                _ => by_rows::<1>(strip),
            }
        }
        let rows = if tall_rows > 0 { tall_rows } else { strip.rows.min(ROWS) };
        strip.advance(rows);
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn by_rows<const PANELS: usize>(strip: &Strip<Integers, PairRow>) {
    // SAFETY: the tile has no more rows than the strip.
    unsafe { tile_of_rows!(tile, PANELS, strip) }
}

#[target_feature(enable = "avx512f,avx512vnni")]
#[allow(clippy::needless_range_loop)] // the indices are also offsets of the pointers
unsafe fn tile<const R: usize, const PANELS: usize>(strip: &Strip<Integers, PairRow>) {
    // SAFETY: all offsets are inside the shapes stated by the fields; `k` counts pairs.
    unsafe {
        let mut acc = [[_mm512_setzero_si512(); PANELS]; R];
        for k in 0..strip.k {
            let mut b = [_mm512_setzero_si512(); PANELS];
            for p in 0..PANELS {
                b[p] = _mm512_load_si512(strip.b.add(p * strip.panel_stride + k).cast());
            }
            for i in 0..R {
                let a = _mm512_set1_epi32((*strip.a.add(i * strip.lda + k)).0 as i32);
                for p in 0..PANELS {
                    acc[i][p] = _mm512_dpwssd_epi32(acc[i][p], a, b[p]);
                }
            }
        }
        for i in 0..R {
            for p in 0..PANELS {
                strip.add_scaled(i, p, acc[i][p]);
            }
        }
    }
}

impl Strip<Integers, PairRow> {
    /// Adds the old number of a row and a panel to their sum, multiplied by its units, and writes it.
    ///
    /// # Safety
    /// The strip is valid and has them.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn add_scaled(&self, row: usize, panel: usize, sum: __m512i) {
        // SAFETY: all offsets are inside the shapes stated by the fields; `k` counts pairs.
        unsafe {
            let row_unit = _mm512_set1_ps((*self.a.add(row * self.lda + self.k)).unit());
            let units = _mm512_load_ps(self.b.add(panel * self.panel_stride + self.k).cast());
            let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), units);
            let old = _mm512_loadu_ps(self.init.add(row * self.ldi + panel * LANES));
            let y = self.y.add(row * self.ldy + panel * LANES);
            _mm512_storeu_ps(y, _mm512_fmadd_ps(sum, row_unit, old));
        }
    }
}
