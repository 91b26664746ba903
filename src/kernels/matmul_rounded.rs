//! Weights that stay rounded: the integers that block floating point multiplies, made once instead of by
//! every product.
//!
//! Panels of sixteen outputs, each its blocks of links one after the other, behind the links of a block
//! their units, as `matmul_block_float` reads them.

use std::sync::Arc;

#[cfg(target_arch = "x86_64")]
use super::dispatch::CpuLevel;
#[cfg(target_arch = "x86_64")]
use super::lanes::LANES;
use super::matmul::MatmulPrecision;
#[cfg(target_arch = "x86_64")]
use super::matmul::{Axis, Way};
#[cfg(target_arch = "x86_64")]
use super::matmul_block_float::{block_links, fill, units};
#[cfg(target_arch = "x86_64")]
use super::pack::uninit_rows;
use super::pack::{PackedMatrix, PairRow};
#[cfg(target_arch = "x86_64")]
use super::parallel::for_each;

/// The integers of a weight. Products `x W^T` with the weight read them for as long as this lives; their bits are
/// the same with and without.
#[derive(Clone)]
pub struct Rounded(
    /// Held, not read: the weight finds it by itself.
    #[allow(dead_code)]
    Arc<Vec<PairRow>>,
);

/// Where the integers of a weight lie.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    links: usize,
    /// Links of a block, the last one of a panel excepted.
    pub block: usize,
    /// Rows from panel to panel.
    pub panel: usize,
}

#[cfg(target_arch = "x86_64")]
impl Layout {
    pub(crate) fn new(w: &PackedMatrix) -> Self {
        let links = w.in_features();
        let block = block_links(links);
        let rows = |links: usize| links.div_ceil(2) + 1;
        let last = (links - 1) % block + 1;
        Self { links, block, panel: (links - last) / block * rows(block) + rows(last) }
    }

    /// The first row of the block of a panel that begins with link `k0`.
    pub(crate) fn place(&self, panel: usize, k0: usize) -> usize {
        panel * self.panel + k0 / self.block * (self.block / 2 + 1)
    }
}

/// Bytes that [`keep_rounded`] takes: 0 where products of this precision round no weight here.
pub fn rounded_bytes(w: &PackedMatrix, precision: MatmulPrecision) -> usize {
    #[cfg(target_arch = "x86_64")]
    if Way::of(CpuLevel::detect(), precision) == Way::BlockFloat {
        return w.out_features().div_ceil(LANES) * Layout::new(w).panel * size_of::<PairRow>();
    }
    let _ = (w, precision);
    0
}

/// The integers of a weight, where products of this precision multiply integers here.
pub fn keep_rounded(w: &PackedMatrix, precision: MatmulPrecision) -> Option<Rounded> {
    #[cfg(target_arch = "x86_64")]
    if Way::of(CpuLevel::detect(), precision) == Way::BlockFloat {
        return Some(Rounded(w.rounded_or(|| round(CpuLevel::detect(), w))));
    }
    let _ = (w, precision);
    None
}

#[cfg(target_arch = "x86_64")]
fn round(level: CpuLevel, w: &PackedMatrix) -> Vec<PairRow> {
    let layout = Layout::new(w);
    let panels = w.out_features().div_ceil(LANES);
    units(level, w, Axis::Output);
    // SAFETY: every row of every panel is written.
    let mut rows = unsafe { uninit_rows(panels * layout.panel) };
    for_each(rows.chunks_mut(layout.panel).enumerate(), |(panel, rows)| {
        for k0 in (0..layout.links).step_by(layout.block) {
            let k = k0..layout.links.min(k0 + layout.block);
            fill((level, Axis::Output), w, panel, k, &mut rows[layout.place(0, k0)..]);
        }
    });
    rows
}
