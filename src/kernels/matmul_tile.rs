//! The inner loops of products of `f32`: a strip of rows times one or two packed panels (tall strips on
//! AVX-512 have `matmul_tall`).
//!
//! Each output element is one chain of fused multiply-adds in the order of k. Rows never meet, so
//! a row's bits do not depend on how rows are cut.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::matmul_fetch::Fetch;
use super::prefetch;
#[cfg(target_arch = "x86_64")]
use super::{matmul_dot, matmul_tall};

/// Two neighbouring links in bf16 bits, the first in the lower half.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Pair(pub u32);

/// An element of a panel, widened to `f32` when loaded: `f32` in panels `[k][16]`, or bf16 bits in
/// panels `[k / 2][16][2]`.
pub(crate) trait Element: Copy {
    /// Sixteen elements of link `k` of a panel as lanes.
    ///
    /// # Safety
    /// The panel has so many links.
    unsafe fn load<S: Simd>(s: S, panel: *const Self, k: usize) -> S::V;

    /// Where link `k` of a panel lies.
    fn place(panel: *const Self, k: usize) -> *const Self;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, panel: *const f32, k: usize) -> S::V {
        // SAFETY: the caller's promise.
        s.load(unsafe { &*panel.add(k * LANES).cast() })
    }

    #[inline(always)]
    fn place(panel: *const f32, k: usize) -> *const f32 {
        panel.wrapping_add(k * LANES)
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, panel: *const u16, k: usize) -> S::V {
        // SAFETY: the caller's promise.
        s.load_link(unsafe { &*panel.add(k / 2 * 2 * LANES).cast() }, k)
    }

    #[inline(always)]
    fn place(panel: *const u16, k: usize) -> *const u16 {
        panel.wrapping_add(k / 2 * 2 * LANES)
    }
}

/// `y[i][16 p + j] = init[i][16 p + j] + sum over k of a[i][k] b[p][k][j]`.
#[derive(Clone, Copy)]
pub(crate) struct Strip<A, B> {
    /// Rows of `a` and `y`.
    pub rows: usize,
    /// Length of the chain.
    pub k: usize,
    /// `[rows, k]` with `lda` elements from row to row.
    pub a: *const A,
    pub lda: usize,
    /// Panels of `k` links.
    pub b: *const B,
    /// 1 or 2, and the elements from panel to panel.
    pub panels: usize,
    pub panel_stride: usize,
    /// How many elements further on the next strip's panels lie, which the first rows fetch, or those after
    /// them where bf16 panels have many rows; 0 = nowhere.
    pub ahead: usize,
    /// What the next strip's panels are filled from, fetched bit by bit.
    pub fetch: Fetch,
    /// The old values: `[rows, 16 panels]`, `ldi` from row to row (0 for a bias).
    pub init: *const f32,
    pub ldi: usize,
    /// `[rows, 16 panels]`, `ldy` from row to row; may be `init`.
    pub y: *mut f32,
    pub ldy: usize,
}

/// Computes a strip. It comes by reference: a copy would wait for what was just written, the results of the
/// strip before among it.
///
/// # Safety
/// The pointers are valid for the shapes that the fields state, and nobody else uses `y`.
pub(crate) unsafe fn multiply<B: Element>(level: CpuLevel, strip: &mut Strip<f32, B>) {
    level.run(Multiply(strip));
}

/// [`multiply`] of `f32` panels, tall strips by code of their own.
///
/// # Safety
/// As [`multiply`].
pub(crate) unsafe fn multiply_f32(level: CpuLevel, strip: &mut Strip<f32, f32>) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        do_tall(level, strip);
        if strip.rows > 0 {
            multiply(level, strip);
        }
    }
}

/// [`multiply`] of bf16 panels, which the first rows widen into `kept` for the others.
///
/// # Safety
/// As [`multiply`] of a strip for which [`is_tall`] holds; `kept` has room for two `f32` panels.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn multiply_widened(
    level: CpuLevel,
    strip: &mut Strip<f32, u16>,
    kept: *mut f32,
) {
    let many = strip.rows >= FETCHING_ROWS;
    let places = (many && strip.ahead != 0).then(|| strip.places_ahead());
    if many {
        strip.ahead = 0;
    }
    // SAFETY: the caller's promise; the first rows have filled the panels, and many are four tiles more.
    unsafe {
        matmul_tall::multiply_bf16(strip, kept);
        strip.advance(matmul_tall::tile_rows(strip.rows));
        let mut rest = strip.with_panels(kept.cast_const(), strip.k * LANES);
        for fetch in places.into_iter().flatten() {
            matmul_tall::multiply_f32_fetching(&rest, fetch);
            rest.advance(matmul_tall::tile_rows(rest.rows));
        }
        multiply_f32(level, &mut rest);
    }
}

/// Rows of a strip of bf16 panels from which on four tiles of `f32` panels fetch what lies ahead bit by bit;
/// of fewer rows the first ones do, at once.
#[cfg(target_arch = "x86_64")]
const FETCHING_ROWS: usize = 5 * matmul_tall::ROWS;

/// Whether strips of this size have code of their own at this level.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_tall(level: CpuLevel, rows: usize, links: usize, panels: usize) -> bool {
    level.has_avx512()
        && matmul_tall::tile_rows(rows) > 0
        && links > 0
        && links.is_multiple_of(matmul_tall::LINKS)
        && panels == matmul_tall::PANELS
}

/// Computes the rows that have code of their own and leaves them out.
///
/// # Safety
/// As [`multiply`].
#[cfg(target_arch = "x86_64")]
unsafe fn do_tall(level: CpuLevel, strip: &mut Strip<f32, f32>) {
    let share = strip.fetch_share(matmul_tall::ROWS);
    while is_tall(level, strip.rows, strip.k, strip.panels) {
        strip.fetch.some(share);
        // SAFETY: the strip is valid, and so are its rows.
        unsafe { matmul_tall::multiply_f32(strip) };
        strip.advance(matmul_tall::tile_rows(strip.rows));
    }
}

/// Computes a strip of pairs, two links at once.
///
/// # Safety
/// As [`multiply`]; the level multiplies pairs.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn multiply_pairs(_: CpuLevel, strip: &mut Strip<Pair, u16>) {
    // SAFETY: the caller's promise.
    unsafe { matmul_dot::multiply(strip) }
}

/// A strip whose pointers are valid.
struct Multiply<'a, B>(&'a mut Strip<f32, B>);

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

impl<B: Element> Kernel for Multiply<'_, B> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let strip = self.0;
        let share = strip.fetch_share(S::ROWS);
        while strip.rows > 0 {
            strip.fetch.some(share);
            let rows = S::ROWS.min(strip.rows);
            // SAFETY: the tile is some rows of a strip that `multiply` was promised to be valid.
            unsafe { strip.compute(s, rows) };
            strip.advance(rows);
        }
    }
}

/// Whether a tile's accumulators stay in registers.
const fn fits<S: Simd>(rows: usize, panels: usize) -> bool {
    rows <= S::ROWS && (panels == 1 || S::WIDE || rows <= NARROW_ROWS)
}

/// Calls the function for as many rows as a strip has, or its first twelve, and so many panels.
#[cfg(target_arch = "x86_64")]
macro_rules! tile_of_rows {
    ($tile:ident, $panels:ident, $strip:expr) => {
        tile_of_rows!($tile, $panels, $strip, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    ($tile:ident, $panels:ident, $strip:expr, $($rows:literal)*) => {
        match $strip.rows.min(12) {
            $($rows => $tile::<$rows, $panels>($strip),)*
            _ => unreachable!("no tile of this size"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use tile_of_rows;

/// Calls the tile of the right size, leaving out those that no register file holds.
macro_rules! select {
    ($self:ident, $s:ident, $count:ident, $panels:literal, $($rows:literal)*) => {
        match $count {
            $($rows if const { fits::<S>($rows, $panels) } =>
                $self.tile::<S, $rows, $panels>($s),)*
            _ => unreachable!("no tile of this size"),
        }
    };
}

impl<A: Copy, B: Copy> Strip<A, B> {
    /// The same strip with other panels.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn with_panels<C>(&self, b: *const C, panel_stride: usize) -> Strip<A, C> {
        let Self { rows, k, a, lda, panels, ahead, fetch, init, ldi, y, ldy, .. } = *self;
        Strip { rows, k, a, lda, b, panels, panel_stride, ahead, fetch, init, ldi, y, ldy }
    }

    /// Lines that each tile of so many rows fetches.
    #[inline(always)]
    fn fetch_share(&self, rows: usize) -> usize {
        self.fetch.lines().div_ceil(self.rows.div_ceil(rows).max(1))
    }

    /// Leaves out the first `rows`; those that are left fetch nothing of what lies ahead. Nothing is left after the last, where
    /// the pointers may be outside of what they belong to.
    #[inline(always)]
    pub(crate) fn advance(&mut self, rows: usize) {
        self.rows -= rows;
        self.a = self.a.wrapping_add(rows * self.lda);
        self.init = self.init.wrapping_add(rows * self.ldi);
        self.y = self.y.wrapping_add(rows * self.ldy);
        self.ahead = 0;
    }
}

#[cfg(target_arch = "x86_64")]
impl<A> Strip<A, u16> {
    /// The places that lie ahead, each the start of as many lines as there are fours of links: the halves of
    /// both panels.
    fn places_ahead(&self) -> [*const u16; 4] {
        let (ahead, half) = (self.b.wrapping_add(self.ahead), self.k / 2 * LANES);
        let place = |at: usize| ahead.wrapping_add(at);
        [0, half, self.panel_stride, self.panel_stride + half].map(place)
    }
}

impl<B: Element> Strip<f32, B> {
    /// Computes the first rows.
    ///
    /// # Safety
    /// As [`multiply`], with `rows` at most `S::ROWS`.
    #[inline(always)]
    unsafe fn compute<S: Simd>(&self, s: S, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.panels == 2 {
                select!(self, s, rows, 2, 1 2 3 4 5 6 7 8 9 10 11 12)
            } else {
                select!(self, s, rows, 1, 1 2 3 4 5 6 7 8 9 10 11 12)
            }
        }
    }

    /// # Safety
    /// As [`multiply`].
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // the indices are also offsets of the pointers
    unsafe fn tile<S: Simd, const ROWS: usize, const PANELS: usize>(&self, s: S) {
        // SAFETY: all offsets are inside the shapes stated by the fields.
        unsafe {
            let mut acc = [[s.splat(0.0); PANELS]; ROWS];
            for k in 0..self.k {
                let mut b = [s.splat(0.0); PANELS];
                for p in 0..PANELS {
                    let panel = self.b.add(p * self.panel_stride);
                    b[p] = B::load(s, panel, k);
                    prefetch::to_first(B::place(panel, k).wrapping_add(self.ahead).cast());
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
