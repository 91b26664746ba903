//! Products with a frozen packed weight: the layer's output and the gradient of its input.
//!
//! **Batch-invariant**: the bits of a row of the result depend only on that row of the input and
//! on the weight, never on the number of rows, the row's place, the threads or (at `highest`) the
//! machine.
//! Every element is the bias (or zero) plus, in order, the sums over 256 k at a time, each of them
//! one chain of fused multiply-adds in ascending k. Low-rank terms follow, each one chain over its rank
//! that is added when it is finished, in `f32` at every precision.
//! `medium` is a chain of up to 768 k in pairs where the machine multiplies pairs faster than f32 (`matmul_dot`), or of
//! exact sums of integers over up to 288 k where it multiplies those (`matmul_block_float`); where it multiplies
//! tiles, `medium` and `high` are made of the sums of its instruction (`matmul_amx`). They then have bits of
//! their own.

use std::ops::Range;

use super::dispatch::CpuLevel;
use super::lanes::LANES;
use super::low_rank_term::LowRankTerm;
#[cfg(any(target_arch = "x86_64", test))]
use super::matmul_amx::Chunk;
#[cfg(target_arch = "x86_64")]
use super::matmul_block_float::Integers;
use super::matmul_cut::cut;
use super::matmul_form::Form;
use super::matmul_input::Input;
use super::matmul_product::Product;
#[cfg(target_arch = "x86_64")]
use super::matmul_tile::Pair;
pub(crate) use super::pack::Axis;
use super::pack::{PackedMatrix, PairRow, RowF32};
use super::parallel::{for_each_index, task_count};

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
/// Tasks for each thread: the fewer, the less is read twice; the more, the less a thread waits.
const TASKS: usize = 4;
/// Rows beyond which panels are made for all tasks: of fewer rows, two tasks make them sooner where they read
/// them.
const SHARED_ROWS: usize = 512;
/// Panels that an inner loop takes at once, at most.
pub(crate) const MAX_PANELS: usize = 2;

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

/// `y = x W^T` for some of the outputs, from a multiple of sixteen on: `y [M, outputs]`. Panics if the lengths
/// disagree.
pub(crate) fn matmul_of_outputs(
    x: &[f32],
    (w, outputs): (&PackedMatrix, Range<usize>),
    precision: MatmulPrecision,
    y: &mut [f32],
) {
    let level = CpuLevel::detect();
    let output = Output { w, terms: Terms::default(), y };
    let job = Product::new(level, Axis::Output, outputs, x, output);
    compute_by(Way::of(level, precision), level, job.into_iter().collect());
}

/// What some outputs, from a multiple of [`K_SPAN`] on, add to `dx = dy W`: `dy [M, outputs]`. The first ones
/// overwrite `dx`; after all in turn it has the bits of [`matmul_input_grad`]. Panics if the lengths disagree.
pub(crate) fn matmul_input_grad_of_outputs(
    dy: &[f32],
    (w, outputs): (&PackedMatrix, Range<usize>),
    precision: MatmulPrecision,
    dx: &mut [f32],
) {
    let level = CpuLevel::detect();
    let output = Output { w, terms: Terms::default(), y: dx };
    let job = Product::new(level, Axis::Input, outputs, dy, output);
    compute_by(Way::of(level, precision), level, job.into_iter().collect());
}

/// Either kind of products, on the threads of the pool, in a given way. Panics if the level does not
/// have it.
pub(crate) fn product_by(
    way: Way,
    (level, axis): (CpuLevel, Axis),
    x: &[f32],
    outputs: Vec<Output>,
) {
    let all = outputs.into_iter().map(|output| (0..output.w.out_features(), output));
    let jobs = all.filter_map(|(all, output)| Product::new(level, axis, all, x, output));
    compute_by(way, level, jobs.collect());
}

fn compute_by(way: Way, level: CpuLevel, jobs: Vec<Product>) {
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
    let Some(Product { rows, links, .. }) = jobs.first() else { return };
    let panels: usize = jobs.iter().map(Product::panels).sum();
    let tasks = task_count(rows * links.len() * panels * LANES, TASKS);
    let tasks = cut((*rows, A::ROW_UNIT), panels, tasks);
    jobs.iter().for_each(A::prepare);
    let copied = Input::<A>::is_copied(&jobs[0]);
    // a task that needs no other's rows copies its own, which then are near
    let alone = copied && tasks.len() > 1 && tasks.iter().all(|(_, all)| all.len() == panels);
    let mut input = Input::new();
    for k0 in links.clone().step_by(K_SPAN) {
        let k = k0..(k0 + K_SPAN).min(links.end);
        if copied && !alone {
            input.copy(&jobs[0], 0..*rows, &k, false);
        }
        let make = || (Scratch::new(), Input::new());
        let shared = |job| if *rows > SHARED_ROWS { A::share(job, &k) } else { Vec::new() };
        let shared: Vec<Vec<PairRow>> = jobs.iter().map(shared).collect();
        for_each_index(tasks.len(), make, |(scratch, near), i| {
            let (rows, panels) = &tasks[i];
            if alone && !rows.is_empty() {
                near.copy(&jobs[0], rows.clone(), &k, true);
            }
            let input = if alone { near } else { &input };
            let mut before = 0;
            for (job, shared) in jobs.iter().zip(&shared) {
                let own = |panel: usize| panel.clamp(before, before + job.panels()) - before;
                let panels = own(panels.start)..own(panels.end);
                job.block::<A>(rows, &k, &panels, (input, shared), scratch);
                before += job.panels();
            }
        });
    }
}

/// What a thread packs panels into.
pub(super) struct Scratch<R> {
    /// Those of the weight.
    pub panels: Vec<R>,
    /// Those of low-rank terms.
    pub low_rank: Vec<RowF32>,
}

impl<R> Scratch<R> {
    fn new() -> Self {
        Scratch { panels: Vec::new(), low_rank: Vec::new() }
    }
}
