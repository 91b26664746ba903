//! The forms of a product's operands: as they are, or rounded to pairs of bf16 (`matmul_amx` has
//! those of tiles, `matmul_block_float` that of integers).

use std::ops::Range;

use super::dispatch::CpuLevel;
use super::lanes::LANES;
use super::matmul::{Axis, K_BLOCK, MAX_PANELS};
use super::matmul_fetch::Fetch;
use super::matmul_fill::{copy_rows, fill_panel};
#[cfg(target_arch = "x86_64")]
use super::matmul_fill::{fill_pairs, round_rows};
use super::matmul_product::{Product, STREAM_ROWS};
#[cfg(target_arch = "x86_64")]
use super::matmul_tile::{Pair, is_tall, multiply_pairs, multiply_widened};
use super::matmul_tile::{multiply, multiply_f32};
use super::pack::{PairRow, RowF32, Storage};

/// The form in which the inner loop reads its operands; every bit pattern is an element.
pub(crate) trait Form: Copy + Send + Sync {
    /// A row of a panel in scratch.
    type Row: Copy;
    /// A row of zeros.
    const ZERO_ROW: Self::Row;
    /// Links of k in an element on the left, and in a row of a panel.
    const LINKS: usize;
    /// Rows that are multiplied together: tasks have multiples of them.
    const ROW_UNIT: usize = 12;
    /// Links of a block at most.
    const MOST_LINKS: usize = K_BLOCK;
    /// Links of a block of a product with `k` links.
    fn block_links(_k: usize) -> usize {
        K_BLOCK
    }
    /// Prepares the weight of a product, before threads share the work.
    fn prepare(_job: &Product) {}
    /// Links `k` of all panels, where many tasks would write them into their scratch.
    fn share(_job: &Product, _k: &Range<usize>) -> Vec<PairRow> {
        Vec::new()
    }
    /// Elements from row to row of a copied block of `links`.
    fn row_elements(links: usize) -> usize {
        links.div_ceil(Self::LINKS)
    }
    /// The input itself, if its elements are of this form.
    fn in_place(x: &[f32]) -> Option<&[Self]>;
    /// Copies the first `width` columns of rows of `x`, `stride` apart, to rows of
    /// [`Form::row_elements`], all of which is written that a step reads.
    fn copy(level: CpuLevel, x: &[f32], stride: usize, width: usize, into: &mut [Self]);
    /// Multiplies one block of k of a panel group, straight from the storage or out of scratch.
    fn step(job: &Product, step: Step<Self>);
}

impl Form for f32 {
    type Row = RowF32;
    const ZERO_ROW: RowF32 = RowF32([0.0; LANES]);
    const LINKS: usize = 1;

    fn in_place(x: &[f32]) -> Option<&[f32]> {
        Some(x)
    }

    fn copy(_: CpuLevel, x: &[f32], stride: usize, width: usize, into: &mut [f32]) {
        copy_rows(x, stride, width, into);
    }

    fn step(job: &Product, mut step: Step<f32>) {
        let few = step.rows.len() <= STREAM_ROWS;
        match &job.w.storage {
            Storage::F32(w) if job.axis == Axis::Output => {
                let rows = &w[step.panel * job.k + step.k0..];
                let b = rows.as_ptr().cast::<f32>();
                let panels = Panels { b, stride: job.k * LANES, stored: true };
                // SAFETY: columns_of gives valid strips.
                let direct = |level, strip: &mut _| unsafe { multiply_f32(level, strip) };
                // SAFETY: from link k0 of its first panel on, the storage holds all of the group.
                unsafe { job.columns_of(&step, panels, direct) }
            }
            #[cfg(target_arch = "x86_64")]
            Storage::Bf16(w)
                if job.axis == Axis::Output
                    && is_tall(job.level, step.rows.len(), step.kc, step.panels) =>
            {
                let kept = RowF32::elements_mut(step.room()).as_mut_ptr();
                // SAFETY: the strip is tall, and the scratch has room for a group.
                let widened =
                    |level, strip: &mut _| unsafe { multiply_widened(level, strip, kept) };
                // SAFETY: from link k0 of its first panel on, the storage holds all of the group.
                unsafe { job.columns_of(&step, step.stored_pairs(w, job.k), widened) }
            }
            Storage::Bf16(w) if job.axis == Axis::Output && few => {
                // SAFETY: columns_of gives valid strips.
                let direct = |level, strip: &mut _| unsafe { multiply(level, strip) };
                // SAFETY: from link k0 of its first panel on, the storage holds all of the group.
                unsafe { job.columns_of(&step, step.stored_pairs(w, job.k), direct) }
            }
            _ => {
                let (rows, links) = (step.kc.next_multiple_of(LANES), step.links());
                let (panel, panels) = (step.panel, step.panels);
                for (i, into) in step.room().chunks_mut(rows).take(panels).enumerate() {
                    fill_panel(job.level, job.w, job.axis, panel + i, links.clone(), into);
                }
                if let Some((panels, links)) = step.next.clone() {
                    step.fetch = Fetch::new(job.w, job.axis, panels, links);
                }
                let b = step.scratch.as_ptr().cast::<f32>();
                let panels = Panels { b, stride: rows * LANES, stored: false };
                // SAFETY: columns_of gives valid strips.
                let filled = |level, strip: &mut _| unsafe { multiply_f32(level, strip) };
                // SAFETY: the group's panels have just been filled.
                unsafe { job.columns_of(&step, panels, filled) }
            }
        }
    }
}

/// Links of a block of pairs at most: every block more reads and writes the results once more, which costs
/// more than what panels longer than the first-level cache do.
#[cfg(target_arch = "x86_64")]
const PAIR_LINKS: usize = 768;

#[cfg(target_arch = "x86_64")]
impl Form for Pair {
    type Row = PairRow;
    const ZERO_ROW: PairRow = PairRow::ZERO;
    const LINKS: usize = 2;
    const MOST_LINKS: usize = PAIR_LINKS;

    fn block_links(k: usize) -> usize {
        k.div_ceil(k.div_ceil(PAIR_LINKS)).next_multiple_of(LANES)
    }

    fn in_place(_: &[f32]) -> Option<&[Pair]> {
        None
    }

    fn copy(_: CpuLevel, x: &[f32], stride: usize, width: usize, into: &mut [Pair]) {
        // SAFETY: the level has been checked to multiply pairs.
        unsafe { round_rows(x, stride, width, into) }
    }

    fn step(job: &Product, mut step: Step<Pair>) {
        // SAFETY: columns_of gives valid strips; the level has been checked to multiply pairs.
        let pairs = |level, strip: &mut _| unsafe { multiply_pairs(level, strip) };
        match &job.w.storage {
            Storage::Bf16(w) if job.axis == Axis::Output => {
                // SAFETY: from link k0 of its first panel on, the storage holds all of the group.
                unsafe { job.columns_of(&step, step.stored_pairs(w, job.k), pairs) }
            }
            _ => {
                let (rows, links) = (step.kc.next_multiple_of(LANES) / 2, step.links());
                let (panel, panels) = (step.panel, step.panels);
                for (i, into) in step.room().chunks_mut(rows).take(panels).enumerate() {
                    fill_pairs(job.level, job.w, job.axis, panel + i, links.clone(), into);
                }
                let b = step.scratch.as_ptr().cast::<u16>();
                let panels = Panels { b, stride: rows * 2 * LANES, stored: false };
                // SAFETY: the group's panels have just been filled.
                unsafe { job.columns_of(&step, panels, pairs) }
            }
        }
    }
}

/// The panels of a group.
pub(crate) struct Panels<B> {
    /// The first one's first link.
    pub b: *const B,
    /// Elements from panel to panel.
    pub stride: usize,
    /// Whether the next group's lie behind them: in the weight's storage or among shared panels, not in scratch.
    pub stored: bool,
}

/// What [`Form::share`] made of links `k`.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // only tiles share panels
pub(crate) struct Shared<'a> {
    pub panels: &'a [PairRow],
    pub k: &'a Range<usize>,
}

/// One block of k of a panel group, ready to multiply.
pub(crate) struct Step<'a, A: Form> {
    /// Rows of the input and the result.
    pub rows: Range<usize>,
    /// The input's links from `k0` on, `lda` elements from row to row.
    pub a: *const A,
    pub lda: usize,
    /// The first panel of the group and their number, 1 or 2.
    pub panel: usize,
    pub panels: usize,
    /// The first link and their number.
    pub k0: usize,
    pub kc: usize,
    /// The panels and links of the next step, if there is one.
    pub next: Option<(Range<usize>, Range<usize>)>,
    /// The panels that are ready for all tasks, if there are any.
    pub shared: Shared<'a>,
    /// What is fetched for the next step meanwhile.
    pub fetch: Fetch,
    /// What [`Step::room`] gives.
    pub scratch: &'a mut Vec<A::Row>,
}

impl<A: Form> Step<'_, A> {
    /// The group in a bf16 storage of panels of `k` links, from link `k0` on.
    fn stored_pairs(&self, w: &[PairRow], k: usize) -> Panels<u16> {
        let panel = k.div_ceil(2);
        let rows = &w[self.panel * panel + self.k0 / 2..];
        Panels { b: rows.as_ptr().cast(), stride: panel * 2 * LANES, stored: true }
    }

    fn links(&self) -> Range<usize> {
        self.k0..self.k0 + self.kc
    }

    /// Room for the group's panels, made when a step first wants it: where panels are multiplied in the
    /// storage none does.
    pub fn room(&mut self) -> &mut [A::Row] {
        if self.scratch.is_empty() {
            self.scratch.resize(MAX_PANELS * A::MOST_LINKS.div_ceil(A::LINKS), A::ZERO_ROW);
        }
        self.scratch
    }
}
