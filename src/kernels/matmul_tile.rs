//! The inner loops of every product: a strip of rows times one or two packed panels.
//!
//! Each output element is one chain of fused multiply-adds in the order of k. Rows never meet, so
//! a row's bits do not depend on how rows are cut.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};

/// An element of a panel, widened to `f32` when loaded.
pub(crate) trait Element: Copy {
    /// Sixteen elements as lanes.
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[f32; LANES]) -> S::V {
        s.load(x)
    }
}

impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[u16; LANES]) -> S::V {
        s.load_bf16(x)
    }
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
    /// Panels `[k, 16]`.
    pub b: *const B,
    /// 1 or 2, and the elements from panel to panel.
    pub panels: usize,
    pub panel_stride: usize,
    /// The old values: `[rows, 16 panels]`, `ldi` from row to row (0 for a bias).
    pub init: *const f32,
    pub ldi: usize,
    /// `[rows, 16 panels]`, `ldy` from row to row; may be `init`.
    pub y: *mut f32,
    pub ldy: usize,
}

/// Computes a strip.
///
/// # Safety
/// The pointers are valid for the shapes that the fields state, and nobody else uses `y`.
pub(crate) unsafe fn multiply<B: Element>(level: CpuLevel, strip: Strip<B>) {
    level.run(Multiply(strip));
}

/// A strip whose pointers are valid.
struct Multiply<B>(Strip<B>);

/// Panels that a strip of `rows` should take at once: two where the registers hold them, or where
/// few rows would leave the multipliers waiting for each other.
pub(crate) fn best_panels(level: CpuLevel, rows: usize) -> usize {
    struct Wide;
    impl Kernel<bool> for Wide {
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> bool {
            S::WIDE
        }
    }
    if level.run(Wide) || rows <= NARROW_ROWS { 2 } else { 1 }
}

/// Rows up to which every implementation holds two panels of accumulators.
const NARROW_ROWS: usize = 3;

impl<B: Element> Kernel for Multiply<B> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let strip = self.0;
        for i in (0..strip.rows).step_by(S::ROWS) {
            // SAFETY: the tile is some rows of a strip that `multiply` was promised to be valid.
            unsafe {
                let tile = Strip {
                    rows: S::ROWS.min(strip.rows - i),
                    a: strip.a.add(i * strip.lda),
                    init: strip.init.add(i * strip.ldi),
                    y: strip.y.add(i * strip.ldy),
                    ..strip
                };
                tile.compute(s);
            }
        }
    }
}

/// Whether a tile's accumulators stay in registers.
const fn fits<S: Simd>(rows: usize, panels: usize) -> bool {
    rows <= S::ROWS && (panels == 1 || S::WIDE || rows <= NARROW_ROWS)
}

/// Calls the tile of the right size, leaving out those that no register file holds.
macro_rules! select {
    ($self:ident, $s:ident, $panels:literal, $($rows:literal)*) => {
        match $self.rows {
            $($rows if const { fits::<S>($rows, $panels) } =>
                $self.tile::<S, $rows, $panels>($s),)*
            _ => unreachable!("no tile of this size"),
        }
    };
}

impl<B: Element> Strip<B> {
    /// # Safety
    /// As [`multiply`], with `rows` at most `S::ROWS`.
    #[inline(always)]
    unsafe fn compute<S: Simd>(self, s: S) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.panels == 2 {
                select!(self, s, 2, 1 2 3 4 5 6 7 8 9 10 11 12)
            } else {
                select!(self, s, 1, 1 2 3 4 5 6 7 8 9 10 11 12)
            }
        }
    }

    /// # Safety
    /// As [`multiply`].
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // the indices are also offsets of the pointers
    unsafe fn tile<S: Simd, const ROWS: usize, const PANELS: usize>(self, s: S) {
        // SAFETY: all offsets are inside the shapes stated by the fields.
        unsafe {
            let mut acc = [[s.splat(0.0); PANELS]; ROWS];
            for k in 0..self.k {
                let mut b = [s.splat(0.0); PANELS];
                for p in 0..PANELS {
                    let from = self.b.add(p * self.panel_stride + k * LANES);
                    b[p] = B::load(s, &*from.cast());
                }
                for i in 0..ROWS {
                    let a = s.splat(*self.a.add(i * self.lda + k));
                    for p in 0..PANELS {
                        acc[i][p] = s.fma(a, b[p], acc[i][p]);
                    }
                }
            }
            for i in 0..ROWS {
                for p in 0..PANELS {
                    let old = s.load(&*self.init.add(i * self.ldi + p * LANES).cast());
                    let sum = s.add(old, acc[i][p]);
                    s.store(&mut *self.y.add(i * self.ldy + p * LANES).cast(), sum);
                }
            }
        }
    }
}
