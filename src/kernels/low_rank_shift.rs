//! What a low-rank update adds to a product with a frozen weight, and to its input gradient.
//!
//! A product adds it to each block of its result while the block is in cache; a pass of its own would
//! read and write the whole result again.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::low_rank::{Activation, Transpose, scaled_code};

/// `code [M, R]` times a matrix `[R, columns]`, finished before it is added.
pub struct Shift {
    /// `[M, R]`.
    pub(super) code: Vec<f32>,
    /// `[panels, R, 16]`, the last panel padded with zeros.
    pub(super) panels: Vec<f32>,
    pub(super) r: usize,
    pub(super) columns: usize,
}

impl Shift {
    /// R, the rank.
    pub fn rank(&self) -> usize {
        self.r
    }

    /// `alpha phi(z) Wup^T` for `z [M, R]` and `wup [columns, R]` row-major.
    pub fn of_output((z, r): (&[f32], usize), wup: &[f32], phi: (f32, Activation)) -> Self {
        let (code, columns) = (scaled_code(z, phi.0, phi.1), wup.len() / r);
        let mut panels = vec![0.0; columns.next_multiple_of(LANES) * r];
        CpuLevel::detect().run(PackTransposed { wup, r, panels: &mut panels });
        Shift { code, panels, r, columns }
    }

    /// `dz Wdown` for `dz [M, R]` and `wdown [R, columns]` row-major.
    pub fn of_input(dz: Vec<f32>, wdown: &[f32], r: usize) -> Self {
        let columns = wdown.len() / r;
        let mut panels = vec![0.0; columns.next_multiple_of(LANES) * r];
        for (i, row) in wdown.chunks_exact(columns).enumerate() {
            for (panel, from) in panels.chunks_exact_mut(r * LANES).zip(row.chunks(LANES)) {
                panel[i * LANES..][..from.len()].copy_from_slice(from);
            }
        }
        Shift { code: dz, panels, r, columns }
    }
}

/// Sixteen rows of `wup` become a panel.
struct PackTransposed<'a> {
    wup: &'a [f32],
    r: usize,
    panels: &'a mut [f32],
}

impl Kernel for PackTransposed<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let size = self.r * LANES;
        for (panel, rows) in self.panels.chunks_exact_mut(size).zip(self.wup.chunks(size)) {
            if rows.len() == size {
                s.run(Transpose { w: rows, rows: LANES, columns: self.r, to: panel });
                continue;
            }
            for (i, row) in rows.chunks_exact(self.r).enumerate() {
                row.iter().enumerate().for_each(|(j, x)| panel[j * LANES + i] = *x);
            }
        }
    }
}
