//! The inner loops of every product: a strip of rows times one or two packed panels.
//!
//! Each output element is one chain of fused multiply-adds in the order of k. Rows never meet, so
//! a row's bits do not depend on how rows are cut.

use super::dispatch::{CpuLevel, SimdTask, dispatch};
use super::simd::{LANES, Simd};

/// An element of a panel, widened to `f32` when loaded.
pub(crate) trait Element: Copy {
    /// # Safety
    /// As the loads of [`Simd`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(p) }
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(p) }
    }
}

/// Where the old value of an element enters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Join {
    /// The chain starts from it: cutting k in several strips changes no bit.
    Chain,
    /// It is added to the finished chain.
    Sum,
}

/// `y[i][16 p + j] = init[i][16 p + j] + sum over k of a[i][k] b[p][k][j]`.
#[derive(Clone, Copy)]
pub(crate) struct Strip<B> {
    /// Rows of `a` and `y`.
    pub rows: usize,
    /// Length of the chain.
    pub k: usize,
    /// `[rows, k]` with `lda` elements from row to row.
    pub a: *const f32,
    pub lda: usize,
    /// Panels `[k, 16]` with `ldb` elements from one k to the next.
    pub b: *const B,
    pub ldb: usize,
    /// 1 or 2, and the elements from panel to panel.
    pub panels: usize,
    pub panel_stride: usize,
    /// The old values: `[rows, 16 panels]`, `ldi` from row to row (0 for a bias).
    pub init: *const f32,
    pub ldi: usize,
    pub join: Join,
    /// `[rows, 16 panels]`, `ldy` from row to row; may be `init`.
    pub y: *mut f32,
    pub ldy: usize,
}

/// Computes a strip.
///
/// # Safety
/// The pointers are valid for the shapes that the fields state, and nobody else uses `y`.
pub(crate) unsafe fn multiply<B: Element>(level: CpuLevel, strip: Strip<B>) {
    // SAFETY: the caller's promise.
    unsafe { dispatch(level, strip) }
}

/// Panels that a strip of `rows` should take at once: two where the registers hold them, or where
/// few rows would leave the multipliers waiting for each other.
pub(crate) fn best_panels(level: CpuLevel, rows: usize) -> usize {
    struct Wide;
    impl SimdTask for Wide {
        type Output = bool;
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> bool {
            S::WIDE
        }
    }
    // SAFETY: the task holds no pointer.
    let wide = unsafe { dispatch(level, Wide) };
    if wide || rows <= NARROW_ROWS { 2 } else { 1 }
}

/// Rows up to which every implementation holds two panels of accumulators.
const NARROW_ROWS: usize = 3;

impl<B: Element> SimdTask for Strip<B> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut i = 0;
        while i < self.rows {
            let rows = S::ROWS.min(self.rows - i);
            // SAFETY: the tile is rows i..i + rows of the strip.
            unsafe {
                let tile = Strip {
                    rows,
                    a: self.a.add(i * self.lda),
                    init: self.init.add(i * self.ldi),
                    y: self.y.add(i * self.ldy),
                    ..self
                };
                tile.compute::<S>();
            }
            i += rows;
        }
    }
}

/// Whether a tile's accumulators stay in registers.
const fn fits<S: Simd>(rows: usize, panels: usize) -> bool {
    rows <= S::ROWS && (panels == 1 || S::WIDE || rows <= NARROW_ROWS)
}

/// Calls the tile of the right size, leaving out those that no register file holds.
macro_rules! select {
    ($self:ident, $panels:literal, $($rows:literal)*) => {
        match $self.rows {
            $($rows if const { fits::<S>($rows, $panels) } =>
                $self.tile::<S, $rows, $panels>(),)*
            _ => unreachable!("no tile of this size"),
        }
    };
}

impl<B: Element> Strip<B> {
    /// # Safety
    /// As [`multiply`], with `rows` at most `S::ROWS`.
    #[inline(always)]
    unsafe fn compute<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.panels == 2 {
                select!(self, 2, 1 2 3 4 5 6 7 8 9 10 11 12)
            } else {
                select!(self, 1, 1 2 3 4 5 6 7 8 9 10 11 12)
            }
        }
    }

    /// # Safety
    /// As [`multiply`].
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // the indices are also offsets of the pointers
    unsafe fn tile<S: Simd, const ROWS: usize, const PANELS: usize>(self) {
        // SAFETY: all offsets are inside the shapes stated by the fields.
        unsafe {
            let mut acc = [[S::splat(0.0); PANELS]; ROWS];
            if self.join == Join::Chain {
                for i in 0..ROWS {
                    for p in 0..PANELS {
                        acc[i][p] = S::load(self.init.add(i * self.ldi + p * LANES));
                    }
                }
            }
            for k in 0..self.k {
                let mut b = [S::splat(0.0); PANELS];
                for p in 0..PANELS {
                    b[p] = B::load::<S>(self.b.add(p * self.panel_stride + k * self.ldb));
                }
                for i in 0..ROWS {
                    let a = S::splat(*self.a.add(i * self.lda + k));
                    for p in 0..PANELS {
                        acc[i][p] = S::mul_add(a, b[p], acc[i][p]);
                    }
                }
            }
            for i in 0..ROWS {
                for p in 0..PANELS {
                    if self.join == Join::Sum {
                        let old = S::load(self.init.add(i * self.ldi + p * LANES));
                        acc[i][p] = S::add(old, acc[i][p]);
                    }
                    S::store(self.y.add(i * self.ldy + p * LANES), acc[i][p]);
                }
            }
        }
    }
}
