//! The sixteen-lane vector that every kernel is written over, and its plain-Rust form.
#![allow(unsafe_op_in_unsafe_fn)] // each method is one step under the trait's own contract

/// Lanes of a vector, and output rows of a packed panel.
pub(crate) const LANES: usize = 16;

/// Sixteen `f32` lanes. All methods round as IEEE says, `mul_add` once; `max` and `min` return the
/// second operand where either is NaN; reductions add lane `i` to lane `i + 8`, then 4, 2, 1. So
/// every implementation gives the same bits.
///
/// # Safety
/// All methods: the CPU has the implementation's features, and pointers are valid for sixteen
/// elements (any alignment).
pub(crate) trait Simd {
    /// The vector.
    type V: Copy;
    /// Rows of the widest tile of accumulators that stays in registers.
    const ROWS: usize;
    /// Whether that tile is two panels wide.
    const WIDE: bool;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    /// Sixteen bf16 numbers, widened.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^n` of integers `n` in `-126..=127`; anything else is unspecified but no fault.
    unsafe fn pow2(n: Self::V) -> Self::V;
    unsafe fn reduce_add(a: Self::V) -> f32;
    unsafe fn reduce_max(a: Self::V) -> f32;

    /// `dst[j][i] = src[i][j]` of a 16 x 16 tile, both dense.
    #[inline(always)]
    unsafe fn transpose(src: *const f32, dst: *mut f32) {
        for i in 0..LANES {
            for j in 0..LANES {
                *dst.add(j * LANES + i) = *src.add(i * LANES + j);
            }
        }
    }
}

/// Plain Rust; `f32::mul_add` is one instruction on aarch64 and a (slow) library call on x86
/// machines without FMA.
pub(crate) struct Portable;

/// Lane-wise `[f32; 16]` of an expression over the index.
macro_rules! lanes {
    ($i:ident => $e:expr) => {{
        let mut out = [0.0f32; LANES];
        for $i in 0..LANES {
            out[$i] = $e;
        }
        out
    }};
}

/// Folds lanes in the fixed order of [`Simd`].
macro_rules! fold {
    ($a:ident, $f:expr) => {{
        let mut a = $a;
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] = $f(a[i], a[i + half]);
            }
            half /= 2;
        }
        a[0]
    }};
}

#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

impl Simd for Portable {
    type V = [f32; LANES];
    const ROWS: usize = 4;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        p.cast::<Self::V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        let p = p.cast::<[u16; LANES]>().read_unaligned();
        lanes!(i => f32::from_bits(u32::from(p[i]) << 16))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        p.cast::<Self::V>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes!(i => a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => max(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => min(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        lanes!(i => a[i].round_ties_even())
    }
    #[inline(always)]
    unsafe fn pow2(n: Self::V) -> Self::V {
        lanes!(i => f32::from_bits(((n[i] as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        fold!(a, |x: f32, y: f32| x + y)
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        fold!(a, max)
    }
}
