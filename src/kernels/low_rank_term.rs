//! What a low-rank update adds to a product with a frozen weight, and to its input gradient.
//!
//! A product adds it to each block of its result while the block is in cache; a pass of its own would
//! read and write the whole result again.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::low_rank::{Activation, Transpose, scaled_code};
use super::pack::RowF32;

/// `code [M, R]` times a matrix `[R, columns]`, finished before it is added.
pub struct LowRankTerm<'a> {
    pub(super) code: Vec<f32>,
    pub(super) r: usize,
    pub(super) columns: usize,
    factor: Factor<'a>,
}

/// The matrix, row-major.
#[derive(Clone, Copy)]
enum Factor<'a> {
    /// `[R, columns]`.
    Down(&'a [f32]),
    /// `[columns, R]`.
    Up(&'a [f32]),
}

impl<'a> LowRankTerm<'a> {
    /// `alpha phi(z) Wup^T` for `z [M, R]` and `wup [columns, R]` row-major. Panics if the lengths
    /// disagree.
    pub fn of_output((z, r): (&[f32], usize), wup: &'a [f32], phi: (f32, Activation)) -> Self {
        let (code, columns) = (scaled_code(z, phi.0, phi.1), wup.len() / r);
        assert!(z.len().is_multiple_of(r) && wup.len() == columns * r, "low-rank shapes disagree");
        LowRankTerm { code, r, columns, factor: Factor::Up(wup) }
    }

    /// `dz Wdown` for `dz [M, R]` and `wdown [R, columns]` row-major. Panics if the lengths disagree.
    pub fn of_input((dz, r): (Vec<f32>, usize), wdown: &'a [f32]) -> Self {
        let columns = wdown.len() / r;
        assert!(
            dz.len().is_multiple_of(r) && wdown.len() == r * columns,
            "low-rank shapes disagree"
        );
        LowRankTerm { code: dz, r, columns, factor: Factor::Down(wdown) }
    }

    /// FLOPs of its product.
    pub fn flops(&self) -> usize {
        2 * self.code.len() * self.columns
    }

    /// Writes some panels of the matrix, `[panels, R, 16]`, the last panel of all padded with zeros.
    pub(super) fn pack(
        &self,
        level: CpuLevel,
        first: usize,
        panels: usize,
        packed: &mut Vec<RowF32>,
    ) {
        packed.clear();
        packed.resize(panels * self.r, RowF32([0.0; LANES]));
        let panels = first * LANES..self.columns.min((first + panels) * LANES);
        match self.factor {
            Factor::Down(rows) => {
                for (i, row) in rows.chunks_exact(self.columns).enumerate() {
                    let links = packed.iter_mut().skip(i).step_by(self.r);
                    for (link, from) in links.zip(row[panels.clone()].chunks(LANES)) {
                        link.0[..from.len()].copy_from_slice(from);
                    }
                }
            }
            Factor::Up(rows) => {
                let rows = &rows[panels.start * self.r..panels.end * self.r];
                let panels = RowF32::elements_mut(packed);
                level.run(PackTransposed { rows, r: self.r, panels });
            }
        }
    }
}

/// Sixteen rows become a panel.
struct PackTransposed<'a> {
    rows: &'a [f32],
    r: usize,
    panels: &'a mut [f32],
}

impl Kernel for PackTransposed<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let size = self.r * LANES;
        for (panel, rows) in self.panels.chunks_exact_mut(size).zip(self.rows.chunks(size)) {
            if rows.len() == size {
                Transpose { w: rows, rows: LANES, columns: self.r, to: panel }.run(s);
                continue;
            }
            for (i, row) in rows.chunks_exact(self.r).enumerate() {
                row.iter().enumerate().for_each(|(j, x)| panel[j * LANES + i] = *x);
            }
        }
    }
}
