//! Products with a frozen packed weight: the layer's output and the gradient of its input.
//!
//! **Batch-invariant**: the bits of a row of the result depend only on that row of the input and
//! on the weight, never on the number of rows, the row's place, the threads or (at `highest`) the
//! machine.
//! Every element is the bias (or zero) plus, in order, the sums over 256 k at a time, each of them
//! one chain of fused multiply-adds in ascending k. Low-rank terms follow, each one chain over its rank
//! that is added when it is finished, in `f32` at every precision.
//! `medium` is a chain of pairs where the machine multiplies pairs faster than f32 (`matmul_dot`), or of
//! exact sums of integers over up to 288 k where it multiplies those (`matmul_block_float`); where it multiplies
//! tiles, `medium` and `high` are made of the sums of its instruction (`matmul_amx`). They then have bits of
//! their own.

use std::ops::Range;
#[cfg(target_arch = "x86_64")]
use std::sync::Arc;

use super::dispatch::CpuLevel;
use super::lanes::LANES;
use super::low_rank_term::LowRankTerm;
#[cfg(any(target_arch = "x86_64", test))]
use super::matmul_amx::Chunk;
#[cfg(target_arch = "x86_64")]
use super::matmul_block_float::Integers;
use super::matmul_cut::cut;
use super::matmul_fetch::Fetch;
use super::matmul_form::{Form, Panels, Step};
#[cfg(target_arch = "x86_64")]
use super::matmul_tile::Pair;
use super::matmul_tile::{Strip, best_panels, multiply_f32};
pub(crate) use super::pack::Axis;
#[cfg(target_arch = "x86_64")]
use super::pack::PairRow;
use super::pack::{PackedMatrix, RowF32};
use super::parallel::{SharedMut, for_each, for_each_index, task_count};
use super::slices::room_of;

/// How products are computed; the names are PyTorch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatmulPrecision {
    /// `f32` products, `f32` sums.
    #[default]
    Highest,
    /// `f32` sums of products whose operands keep sixteen bits: on machines with AMX each operand
    /// that bf16 does not hold is cut into two bf16 halves (error about 3e-6 of the largest result
    /// with bf16 weights, up to 6e-6 with `f32` weights); on others the same as `Highest`.
    High,
    /// `f32` sums of products of operands that are rounded to bf16, where the machine multiplies bf16
    /// faster than f32, or to integers in a unit that up to 288 links share, where it multiplies only integers
    /// faster: finer than bf16 for normal numbers (a tenth of its error by the norm), coarser for numbers far
    /// below the largest of their block, and a NaN or an infinity makes its row NaN; on others the same as
    /// `High`, as in PyTorch.
    Medium,
}

impl MatmulPrecision {
    /// Whether this machine's processor has nothing faster than `Highest` for its products, and so computes those.
    pub fn is_highest_here(self) -> bool {
        Way::of(CpuLevel::detect(), self) == Way::Plain
    }
}

/// How operands are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// As `f32`.
    Plain,
    /// Rounded, as pairs of bf16.
    Pairs,
    /// Rounded, as pairs of integers in a common unit.
    BlockFloat,
    /// Rounded, as tiles of bf16.
    Tiles,
    /// Cut into halves, as tiles of bf16.
    HalfTiles,
}

impl Way {
    pub(crate) fn of(level: CpuLevel, precision: MatmulPrecision) -> Self {
        match precision {
            MatmulPrecision::High if level.multiplies_tiles() => Way::HalfTiles,
            MatmulPrecision::Medium if level.multiplies_tiles() => Way::Tiles,
            MatmulPrecision::Medium if level.multiplies_pairs_fast() => Way::Pairs,
            MatmulPrecision::Medium if level.multiplies_integers() => Way::BlockFloat,
            _ => Way::Plain,
        }
    }

    /// Whether a level has its instructions.
    pub(crate) fn is_there(self, level: CpuLevel) -> bool {
        match self {
            Way::Plain => true,
            Way::Pairs => level.multiplies_pairs(),
            Way::BlockFloat => level.multiplies_integers(),
            Way::Tiles | Way::HalfTiles => level.multiplies_tiles(),
        }
    }
}

/// Links of a chain, part of the definition of the result (short chains round less). A panel of
/// them lies in the first-level cache.
pub(crate) const K_BLOCK: usize = 256;
/// Length of k whose inputs are copied at a time.
pub(crate) const K_SPAN: usize = 8 * K_BLOCK;
/// Outputs that stay in the second-level cache while k advances.
const NEAR_OUTPUTS: usize = 1 << 15;
/// Tasks for each thread: the fewer, the less is read twice; the more, the less a thread waits.
const TASKS: usize = 4;
/// Rows that are a multiple of so many numbers apart begin in the same sets of a first-level cache and
/// drive each other out of it, so that copies are read instead.
const SAME_SETS: usize = 1024;
/// Rows of a task that copies the input.
const COPY_ROWS: usize = 32;
/// Panels that an inner loop takes at once, at most.
pub(crate) const MAX_PANELS: usize = 2;
/// Rows up to which `f32` products read a bf16 weight straight from its storage (unless tall strips widen it),
/// and the input where it lies whatever the distance of its rows.
pub(crate) const STREAM_ROWS: usize = 64;
/// Rows up to which the weight is read panel by panel, each from its beginning to its end, because
/// memory is slower than the products.
const FEW_ROWS: usize = 6;

/// What is added to a product.
#[derive(Clone, Copy, Default)]
pub struct Terms<'a> {
    /// Added to every row, `[columns]`.
    pub bias: Option<&'a [f32]>,
    /// What low-rank updates of the weight add.
    pub low_rank: &'a [LowRankTerm<'a>],
}

/// `y = x W^T + bias`: `x [M, in]`, `y [M, out]`, `bias [out]`. Panics if the lengths disagree.
pub fn matmul(
    x: &[f32],
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    precision: MatmulPrecision,
    y: &mut [f32],
) {
    matmul_add(x, w, Terms { bias, ..Terms::default() }, precision, y);
}

/// One of several products of the same input `[M, in]`.
pub struct Output<'a> {
    /// The weight `[out, in]`.
    pub w: &'a PackedMatrix,
    /// Further terms.
    pub terms: Terms<'a>,
    /// The result, `[M, out]`.
    pub y: &'a mut [f32],
}

/// [`matmul`] with further terms. Panics if the lengths disagree.
pub fn matmul_add(
    x: &[f32],
    w: &PackedMatrix,
    terms: Terms,
    precision: MatmulPrecision,
    y: &mut [f32],
) {
    matmul_all(x, vec![Output { w, terms, y }], precision);
}

/// [`matmul_add`] of one input with several weights at once: the input is brought into the form of the
/// inner loop once, and threads wait for each other once. Panics if the lengths disagree or the weights
/// want different inputs.
pub fn matmul_all(x: &[f32], outputs: Vec<Output>, precision: MatmulPrecision) {
    let level = CpuLevel::detect();
    product_by(Way::of(level, precision), (level, Axis::Output), x, outputs);
}

/// `dx = dy W`: `dy [M, out]`, `dx [M, in]`. Panics if the lengths disagree.
pub fn matmul_input_grad(dy: &[f32], w: &PackedMatrix, precision: MatmulPrecision, dx: &mut [f32]) {
    matmul_input_grad_add(dy, w, Terms::default(), precision, dx);
}

/// [`matmul_input_grad`] with further terms. Panics if the lengths disagree.
pub fn matmul_input_grad_add(
    dy: &[f32],
    w: &PackedMatrix,
    terms: Terms,
    precision: MatmulPrecision,
    dx: &mut [f32],
) {
    let level = CpuLevel::detect();
    let output = Output { w, terms, y: dx };
    product_by(Way::of(level, precision), (level, Axis::Input), dy, vec![output]);
}

/// Either kind of products, on the threads of the pool, in a given way. Panics if the level does not
/// have it.
pub(crate) fn product_by(
    way: Way,
    (level, axis): (CpuLevel, Axis),
    x: &[f32],
    outputs: Vec<Output>,
) {
    let jobs: Vec<_> =
        outputs.into_iter().filter_map(|output| Product::new(level, axis, x, output)).collect();
    assert!(jobs.windows(2).all(|w| w[0].k == w[1].k), "the weights want different inputs");
    assert!(way.is_there(level), "the level has no {way:?}");
    match way {
        #[cfg(any(target_arch = "x86_64", test))]
        Way::Tiles => compute::<Chunk<1>>(&jobs),
        #[cfg(any(target_arch = "x86_64", test))]
        Way::HalfTiles => compute::<Chunk<2>>(&jobs),
        #[cfg(target_arch = "x86_64")]
        Way::Pairs => compute::<Pair>(&jobs),
        #[cfg(target_arch = "x86_64")]
        Way::BlockFloat => compute::<Integers>(&jobs),
        _ => compute::<f32>(&jobs),
    }
}

/// Computes products of the same input: it is brought in the form that the inner loop reads, then all
/// their panels are cut into tasks.
fn compute<A: Form>(jobs: &[Product]) {
    let Some(&Product { rows, k, .. }) = jobs.first() else { return };
    let panels: usize = jobs.iter().map(Product::panels).sum();
    let tasks = task_count(rows * k * panels * LANES, TASKS);
    let tasks = cut((rows, A::ROW_UNIT), panels, tasks);
    jobs.iter().for_each(A::prepare);
    let mut input = Vec::new();
    for k0 in (0..k).step_by(K_SPAN) {
        let k = k0..(k0 + K_SPAN).min(k);
        jobs[0].copy_input(&k, &mut input);
        for_each_index(tasks.len(), Scratch::new, |scratch, i| {
            let (rows, panels) = &tasks[i];
            let mut before = 0;
            for job in jobs {
                let own = |panel: usize| panel.clamp(before, before + job.panels()) - before;
                let panels = own(panels.start)..own(panels.end);
                job.block::<A>(rows, &k, &panels, &input, scratch);
                before += job.panels();
            }
        });
    }
}

/// What a thread packs panels into.
struct Scratch<R> {
    /// Those of the weight.
    panels: Vec<R>,
    /// Those of low-rank terms.
    low_rank: Vec<RowF32>,
}

impl<R> Scratch<R> {
    fn new() -> Self {
        Scratch { panels: Vec::new(), low_rank: Vec::new() }
    }
}

/// A checked product.
pub(crate) struct Product<'a> {
    pub(crate) level: CpuLevel,
    pub(crate) axis: Axis,
    rows: usize,
    pub(crate) k: usize,
    columns: usize,
    x: &'a [f32],
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
    /// Checks the lengths; `None` where there is no row.
    fn new(
        level: CpuLevel,
        axis: Axis,
        x: &'a [f32],
        Output { w, terms, y }: Output<'a>,
    ) -> Option<Self> {
        let (k, columns) = (axis.links(w), axis.columns(w));
        let rows = x.len() / k;
        assert!(x.len() == rows * k, "input is not [M, {k}]");
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
            k,
            columns,
            x,
            w,
            start,
            terms,
            y,
            #[cfg(target_arch = "x86_64")]
            rounded: w.rounded().filter(|_| axis == Axis::Output),
        })
    }

    /// Panels of the result.
    fn panels(&self) -> usize {
        self.columns.div_ceil(LANES)
    }

    /// Copies a span of k of the input, one block of k after the other, unless it can be read where it lies:
    /// the rows are few, or do not begin in the same sets.
    fn copy_input<A: Form>(&self, k: &Range<usize>, copied: &mut Vec<A>) {
        let apart = !self.k.is_multiple_of(SAME_SETS);
        if A::in_place(self.x).is_some() && (self.rows <= STREAM_ROWS || apart) {
            return;
        }
        let links = A::block_links(self.k);
        let (whole, rest) = (k.len() / links, A::row_elements(k.len() % links));
        let elements = self.rows * (whole * A::row_elements(links) + rest);
        if copied.len() != elements {
            // SAFETY: every bit pattern is an element, and `A::copy` writes all that is read.
            *copied = unsafe { room_of(elements) };
        }
        let blocks = copied.chunks_mut(self.rows * A::row_elements(links));
        let parts = k.clone().step_by(links).zip(blocks).flat_map(|(k0, block)| {
            let width = links.min(k.end - k0);
            let parts = block.chunks_mut(COPY_ROWS * A::row_elements(width)).enumerate();
            parts.map(move |(i, into)| (i * COPY_ROWS * self.k + k0, width, into))
        });
        let copy = |(start, width, into): (usize, usize, &mut [A])| {
            A::copy(self.level, &self.x[start..], self.k, width, into);
        };
        match self.rows <= COPY_ROWS {
            true => parts.for_each(copy),
            false => for_each(parts, copy),
        }
    }

    /// Computes the columns of `panels` of `rows` over a span of k.
    fn block<A: Form>(
        &self,
        rows: &Range<usize>,
        k: &Range<usize>,
        panels: &Range<usize>,
        input: &[A],
        scratch: &mut Scratch<A::Row>,
    ) {
        if rows.is_empty() {
            return;
        }
        let group = best_panels(self.level, rows.len());
        let near = match rows.len() <= FEW_ROWS {
            true => group,
            false => (NEAR_OUTPUTS / (rows.len() * LANES)).next_multiple_of(group),
        };
        for first in panels.clone().step_by(near) {
            let panels = first..(first + near).min(panels.end);
            self.near_block::<A>(rows, k, &panels, input, scratch);
        }
    }

    /// Adds the products of a span of k to a block of outputs that stays in cache meanwhile.
    fn near_block<A: Form>(
        &self,
        rows: &Range<usize>,
        k: &Range<usize>,
        panels: &Range<usize>,
        input: &[A],
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
            let (a, lda) = match A::in_place(self.x) {
                Some(x) if input.is_empty() => (&x[rows.start * self.k + k0..], self.k),
                _ => {
                    let lda = A::row_elements(kc);
                    let block = (k0 - k.start) / links * A::row_elements(links);
                    let start = block * self.rows + rows.start * lda;
                    (&input[start..], lda)
                }
            };
            let a = a.as_ptr();
            for panel in panels.clone().step_by(group) {
                let panels = group.min(panels.end - panel);
                let (next, fetch, all) = (next(panel, k0), Fetch::NONE, rows);
                let (rows, scratch, packed) =
                    (rows.clone(), &mut scratch.panels, &mut scratch.low_rank);
                A::step(self, Step { rows, a, lda, panel, panels, k0, kc, next, fetch, scratch });
                if k0 + kc == self.k {
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
        let (rows, column) = (step.rows.len(), step.panel * LANES);
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
