//! One product with a packed weight: its operands checked, and its blocks computed.

use std::ops::Range;
#[cfg(target_arch = "x86_64")]
use std::sync::Arc;

use super::dispatch::CpuLevel;
use super::lanes::LANES;
use super::low_rank_term::LowRankTerm;
use super::matmul::{K_SPAN, Output, Scratch, Terms};
use super::matmul_fetch::Fetch;
use super::matmul_form::{Form, Panels, Shared, Step};
use super::matmul_input::Input;
use super::matmul_tile::{Strip, best_panels, multiply_f32};
use super::pack::{Axis, PackedMatrix, PairRow, RowF32};
use super::parallel::SharedMut;

/// Outputs that stay in the second-level cache while k advances.
const NEAR_OUTPUTS: usize = 1 << 15;
/// Rows up to which `f32` products read a bf16 weight straight from its storage (unless tall strips widen it),
/// and the input where it lies whatever the distance of its rows.
pub(crate) const STREAM_ROWS: usize = 64;
/// Rows up to which the weight is read panel by panel, each from its beginning to its end, because
/// memory is slower than the products.
const FEW_ROWS: usize = 6;

/// A checked product.
pub(crate) struct Product<'a> {
    pub(crate) level: CpuLevel,
    pub(crate) axis: Axis,
    pub(super) rows: usize,
    /// Links of a product with the whole weight.
    pub(crate) k: usize,
    /// Those that are multiplied; their products are added to `y` unless they are the first.
    pub(super) links: Range<usize>,
    /// The first panel of the result.
    first_panel: usize,
    columns: usize,
    /// `[rows, links]`.
    pub(super) x: &'a [f32],
    pub(crate) w: &'a PackedMatrix,
    /// The bias or zeros, padded to whole panels.
    start: Vec<f32>,
    terms: Terms<'a>,
    y: SharedMut<'a>,
    /// The weight's integers, if somebody holds them and the product reads them.
    #[cfg(target_arch = "x86_64")]
    pub(crate) rounded: Option<Arc<Vec<PairRow>>>,
}

impl<'a> Product<'a> {
    /// Checks the lengths; `None` where there is no row. Of the weight's outputs only `outputs` take part, which
    /// begin where a panel does or, as links, a span of them.
    pub(super) fn new(
        level: CpuLevel,
        axis: Axis,
        outputs: Range<usize>,
        x: &'a [f32],
        Output { w, terms, y }: Output<'a>,
    ) -> Option<Self> {
        assert!(outputs.end <= w.out_features(), "the weight has fewer outputs");
        let (unit, first_panel, links, columns) = match axis {
            Axis::Output => (LANES, outputs.start / LANES, 0..w.in_features(), outputs.len()),
            Axis::Input => (K_SPAN, 0, outputs.clone(), w.in_features()),
        };
        assert!(outputs.start.is_multiple_of(unit), "outputs from {} on", outputs.start);
        let rows = x.len() / links.len();
        assert!(x.len() == rows * links.len(), "input is not [M, {}]", links.len());
        assert!(y.len() == rows * columns, "output is not [{rows}, {columns}]");
        let fits = |term: &LowRankTerm| (term.columns, term.code.len()) == (columns, rows * term.r);
        assert!(terms.low_rank.iter().all(fits), "a low-rank term is not [{rows}, {columns}]");
        let mut start = vec![0.0; columns.next_multiple_of(LANES)];
        if let Some(bias) = terms.bias {
            start[..columns].copy_from_slice(bias);
        }
        let y = SharedMut::new(y);
        (rows > 0).then(|| Self {
            level,
            axis,
            rows,
            k: axis.links(w),
            links,
            first_panel,
            columns,
            x,
            w,
            start,
            terms,
            y,
            #[cfg(target_arch = "x86_64")]
            rounded: (axis == Axis::Output).then(|| w.rounded()).flatten(),
        })
    }

    /// Panels of the result.
    pub(super) fn panels(&self) -> usize {
        self.columns.div_ceil(LANES)
    }

    /// Computes the columns of `panels` of `rows` over a span of k.
    pub(super) fn block<A: Form>(
        &self,
        rows: &Range<usize>,
        k: &Range<usize>,
        panels: &Range<usize>,
        (input, shared): (&Input<A>, &[PairRow]),
        scratch: &mut Scratch<A::Row>,
    ) {
        if rows.is_empty() {
            return;
        }
        let panels = self.first_panel + panels.start..self.first_panel + panels.end;
        let group = best_panels(self.level, rows.len());
        let near = match rows.len() <= FEW_ROWS {
            true => group,
            false => (NEAR_OUTPUTS / (rows.len() * LANES)).next_multiple_of(group),
        };
        for first in panels.clone().step_by(near) {
            let panels = first..(first + near).min(panels.end);
            self.near_block::<A>(rows, k, &panels, (input, shared), scratch);
        }
    }

    /// Adds the products of a span of k to a block of outputs that stays in cache meanwhile.
    fn near_block<A: Form>(
        &self,
        rows: &Range<usize>,
        k: &Range<usize>,
        panels: &Range<usize>,
        (input, shared): (&Input<A>, &[PairRow]),
        scratch: &mut Scratch<A::Row>,
    ) {
        let group = best_panels(self.level, rows.len());
        let links = A::block_links(self.k);
        let step = |panel: usize, k0: usize| {
            (panel..panels.end.min(panel + group), k0..k.end.min(k0 + links))
        };
        let next = |panel: usize, k0: usize| match (panel + group, k0 + links) {
            (panel, _) if panel < panels.end => Some(step(panel, k0)),
            (_, k0) if k0 < k.end => Some(step(panels.start, k0)),
            _ => None,
        };
        for k0 in k.clone().step_by(links) {
            let kc = links.min(k.end - k0);
            let (a, lda) = input.at(self, rows, k, k0);
            for panel in panels.clone().step_by(group) {
                let panels = group.min(panels.end - panel);
                let shared = Shared { panels: shared, k };
                let (next, fetch, all) = (next(panel, k0), Fetch::NONE, rows);
                let (rows, scratch, packed) =
                    (rows.clone(), &mut scratch.panels, &mut scratch.low_rank);
                A::step(
                    self,
                    Step { rows, a, lda, panel, panels, k0, kc, next, shared, fetch, scratch },
                );
                if k0 + kc == self.links.end {
                    for term in self.terms.low_rank {
                        self.add_low_rank(all, (panel, panels), term, packed);
                    }
                }
            }
        }
    }

    /// Adds a low-rank term to a panel group.
    fn add_low_rank(
        &self,
        rows: &Range<usize>,
        (panel, panels): (usize, usize),
        term: &LowRankTerm,
        packed: &mut Vec<RowF32>,
    ) {
        term.pack(self.level, panel, panels, packed);
        let step = Step {
            rows: rows.clone(),
            a: term.code[rows.start * term.r..].as_ptr(),
            lda: term.r,
            panel,
            panels,
            // behind all links: the old results are added to
            k0: self.k,
            kc: term.r,
            next: None,
            shared: Shared { panels: &[], k: &(0..0) },
            fetch: Fetch::NONE,
            scratch: &mut Vec::new(),
        };
        let b = packed.as_ptr().cast::<f32>();
        let panels = Panels { b, stride: term.r * LANES, stored: false };
        // SAFETY: columns_of gives valid strips.
        let multiply = |level, strip: &mut _| unsafe { multiply_f32(level, strip) };
        // SAFETY: the term has been checked to have these rows, and so many panels are packed.
        unsafe { self.columns_of::<f32, f32>(&step, panels, multiply) }
    }

    /// Runs the strip of a panel group; a last, partial panel goes through a buffer.
    ///
    /// # Safety
    /// `step` has `kc` links of its rows at `a`, and as many of its panels are given; `multiply` computes a
    /// valid strip.
    pub(crate) unsafe fn columns_of<A: Form, B>(
        &self,
        step: &Step<A>,
        Panels { b, stride: panel_stride, stored }: Panels<B>,
        multiply: impl Fn(CpuLevel, &mut Strip<A, B>),
    ) {
        let (rows, column) = (step.rows.len(), (step.panel - self.first_panel) * LANES);
        let first = step.k0 == 0;
        let follows = step.next.as_ref().is_some_and(|(panels, _)| panels.start > step.panel);
        let mut strip = Strip {
            rows,
            k: step.kc,
            a: step.a,
            lda: step.lda,
            b,
            panels: step.panels,
            panel_stride,
            ahead: if stored && follows { step.panels * panel_stride } else { 0 },
            fetch: step.fetch,
            init: self.start[column..].as_ptr(),
            ldi: 0,
            y: std::ptr::null_mut(),
            ldy: self.columns,
        };
        let width = (self.columns - column).min(step.panels * LANES);
        // SAFETY: tasks own disjoint rows and panels; a and b are as the caller promises; the
        // buffer has whole panels.
        unsafe {
            let y = self.y.at(step.rows.start * self.columns + column);
            if width == step.panels * LANES {
                strip.y = y;
                if !first {
                    (strip.init, strip.ldi) = (y, self.columns);
                }
                multiply(self.level, &mut strip);
                return;
            }
            let padded = step.panels * LANES;
            let mut buffer = vec![0.0f32; rows * padded];
            (strip.y, strip.ldy) = (buffer.as_mut_ptr(), padded);
            if !first {
                for (i, row) in buffer.chunks_mut(padded).enumerate() {
                    y.add(i * self.columns).copy_to(row.as_mut_ptr(), width);
                }
                (strip.init, strip.ldi) = (strip.y, padded);
            }
            multiply(self.level, &mut strip);
            for (i, row) in buffer.chunks(padded).enumerate() {
                y.add(i * self.columns).copy_from(row.as_ptr(), width);
            }
        }
    }
}
