//! The sixteen-lane vector on AVX2 (two registers) and AVX-512 (one register).
#![allow(unsafe_op_in_unsafe_fn)] // each method is one step under the trait's own contract

use std::arch::x86_64::*;

use super::simd::{LANES, Simd};

/// AVX2 with FMA.
pub(crate) struct Avx2;

/// AVX-512 F, BW, DQ, VL.
pub(crate) struct Avx512;

/// Lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

/// A two-operand method of [`Avx2`] out of the eight-lane intrinsic.
macro_rules! pairwise {
    ($($name:ident = $f:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name(a: Pair, b: Pair) -> Pair {
            Pair($f(a.0, b.0), $f(a.1, b.1))
        }
    )*};
}

/// Folds eight lanes with a four-lane intrinsic: 4, 2, 1.
macro_rules! fold8 {
    ($v:expr, $f:ident) => {{
        let v: __m256 = $v;
        let v = $f(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = $f(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32($f(v, _mm_movehdup_ps(v)))
    }};
}

#[inline(always)]
unsafe fn widen8(p: *const u16) -> __m256 {
    let half = _mm_loadu_si128(p.cast());
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
}

#[inline(always)]
unsafe fn pow2_8(n: __m256) -> __m256 {
    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}

/// `dst[j][i] = src[i][j]` of an 8 x 8 tile with 16 floats a row.
#[inline(always)]
unsafe fn transpose8(src: *const f32, dst: *mut f32) {
    let mut r = [_mm256_setzero_ps(); 8];
    for (i, row) in r.iter_mut().enumerate() {
        *row = _mm256_loadu_ps(src.add(i * LANES));
    }
    let mut t = r;
    for i in (0..8).step_by(2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for i in (0..8).step_by(4) {
        r[i] = _mm256_shuffle_ps::<0x44>(t[i], t[i + 2]);
        r[i + 1] = _mm256_shuffle_ps::<0xee>(t[i], t[i + 2]);
        r[i + 2] = _mm256_shuffle_ps::<0x44>(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_shuffle_ps::<0xee>(t[i + 1], t[i + 3]);
    }
    for i in 0..4 {
        let (low, high) = (r[i], r[i + 4]);
        _mm256_storeu_ps(dst.add(i * LANES), _mm256_permute2f128_ps::<0x20>(low, high));
        _mm256_storeu_ps(dst.add((i + 4) * LANES), _mm256_permute2f128_ps::<0x31>(low, high));
    }
}

#[inline(always)]
unsafe fn transpose16(src: *const f32, dst: *mut f32) {
    transpose8(src, dst);
    transpose8(src.add(8), dst.add(8 * LANES));
    transpose8(src.add(8 * LANES), dst.add(8));
    transpose8(src.add(8 * LANES + 8), dst.add(8 * LANES + 8));
}

impl Simd for Avx2 {
    type V = Pair;
    const ROWS: usize = 6;
    const WIDE: bool = false;

    pairwise! {
        add = _mm256_add_ps;
        sub = _mm256_sub_ps;
        mul = _mm256_mul_ps;
        div = _mm256_div_ps;
        max = _mm256_max_ps;
        min = _mm256_min_ps;
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Pair {
        let v = _mm256_set1_ps(x);
        Pair(v, v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Pair {
        Pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Pair {
        Pair(widen8(p), widen8(p.add(8)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Pair) {
        _mm256_storeu_ps(p, v.0);
        _mm256_storeu_ps(p.add(8), v.1);
    }
    #[inline(always)]
    unsafe fn mul_add(a: Pair, b: Pair, c: Pair) -> Pair {
        Pair(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1))
    }
    #[inline(always)]
    unsafe fn round(a: Pair) -> Pair {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        Pair(_mm256_round_ps::<MODE>(a.0), _mm256_round_ps::<MODE>(a.1))
    }
    #[inline(always)]
    unsafe fn pow2(n: Pair) -> Pair {
        Pair(pow2_8(n.0), pow2_8(n.1))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Pair) -> f32 {
        fold8!(_mm256_add_ps(a.0, a.1), _mm_add_ps)
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Pair) -> f32 {
        fold8!(_mm256_max_ps(a.0, a.1), _mm_max_ps)
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, dst: *mut f32) {
        transpose16(src, dst);
    }
}

/// A two-operand method of [`Avx512`].
macro_rules! direct {
    ($($name:ident = $f:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name(a: __m512, b: __m512) -> __m512 {
            $f(a, b)
        }
    )*};
}

/// Lanes 8..16.
#[inline(always)]
unsafe fn upper(v: __m512) -> __m256 {
    _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)))
}

impl Simd for Avx512 {
    type V = __m512;
    const ROWS: usize = 12;
    const WIDE: bool = true;

    direct! {
        add = _mm512_add_ps;
        sub = _mm512_sub_ps;
        mul = _mm512_mul_ps;
        div = _mm512_div_ps;
        max = _mm512_max_ps;
        min = _mm512_min_ps;
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        let half = _mm256_loadu_si256(p.cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
    }
    #[inline(always)]
    unsafe fn pow2(n: __m512) -> __m512 {
        let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: __m512) -> f32 {
        fold8!(_mm256_add_ps(_mm512_castps512_ps256(a), upper(a)), _mm_add_ps)
    }
    #[inline(always)]
    unsafe fn reduce_max(a: __m512) -> f32 {
        fold8!(_mm256_max_ps(_mm512_castps512_ps256(a), upper(a)), _mm_max_ps)
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, dst: *mut f32) {
        transpose16(src, dst);
    }
}
