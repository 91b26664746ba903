//! The sixteen lanes as two registers of AVX2 with FMA, and as one register of AVX-512.

use super::lanes::{Kernel, LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the machine has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Proof that the machine has AVX2, FMA and AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx2 {
    /// # Safety
    /// The machine has AVX2 and FMA.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

impl Avx512 {
    /// # Safety
    /// The machine has AVX2, FMA and AVX-512 F, BW, DQ and VL.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma")]
fn run_avx2<R, K: Kernel<R>>(simd: Avx2, kernel: K) -> R {
    kernel.run(simd)
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<R, K: Kernel<R>>(simd: Avx512, kernel: K) -> R {
    kernel.run(simd)
}

/// Two-operand methods that apply one intrinsic to both halves.
macro_rules! pairwise {
    ($($name:ident = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        fn $name(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: holding `self` proves the features.
            unsafe { ($intrinsic(a.0, b.0), $intrinsic(a.1, b.1)) }
        }
    )*};
}

/// Two-operand methods that are one intrinsic.
macro_rules! direct {
    ($($name:ident = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        fn $name(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: holding `self` proves the features.
            unsafe { $intrinsic(a, b) }
        }
    )*};
}

/// Folds two halves of sixteen lanes to one number by halves.
macro_rules! fold {
    ($low:expr, $high:expr, $wide:ident, $half:ident, $single:ident) => {
        // SAFETY: the caller's `self` proves the features.
        unsafe {
            let eight = $wide($low, $high);
            let four = $half(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = $half(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32($single(two, _mm_shuffle_ps::<1>(two, two)))
        }
    };
}

impl Simd for Avx2 {
    type V = (__m256, __m256);
    const ROWS: usize = 6;
    const WIDE: bool = false;

    pairwise! {
        add = _mm256_add_ps;
        sub = _mm256_sub_ps;
        mul = _mm256_mul_ps;
        div = _mm256_div_ps;
        min = _mm256_min_ps;
        max = _mm256_max_ps;
    }

    #[inline(always)]
    fn run<R, K: Kernel<R>>(self, kernel: K) -> R {
        // SAFETY: holding `self` proves the features.
        unsafe { run_avx2(self, kernel) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: holding `self` proves the features.
        let v = unsafe { _mm256_set1_ps(x) };
        (v, v)
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        // SAFETY: both halves lie inside `x`.
        unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn load_even(self, x: &[u16; 2 * LANES]) -> Self::V {
        // SAFETY: both halves lie inside `x`.
        unsafe { (even8(x.as_ptr()), even8(x.as_ptr().add(LANES))) }
    }
    #[inline(always)]
    fn load_odd(self, x: &[u16; 2 * LANES]) -> Self::V {
        // SAFETY: both halves lie inside `x`.
        unsafe { (odd8(x.as_ptr()), odd8(x.as_ptr().add(LANES))) }
    }
    #[inline(always)]
    fn load_link(self, x: &[u16; 2 * LANES], k: usize) -> Self::V {
        // SAFETY: both halves lie inside `x`.
        unsafe { (link8(x.as_ptr(), k), link8(x.as_ptr().add(LANES), k)) }
    }
    #[inline(always)]
    fn store_pairs(self, y: &mut [u16; 2 * LANES], even: Self::V, odd: Self::V) {
        // SAFETY: both halves lie inside `y`.
        unsafe {
            pair8(y.as_mut_ptr(), even.0, odd.0);
            pair8(y.as_mut_ptr().add(LANES), even.1, odd.1);
        }
    }
    #[inline(always)]
    fn round_bf16(self, v: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe { (rounded8(v.0), rounded8(v.1)) }
    }
    #[inline(always)]
    fn store_upper(self, y: &mut [u16; LANES], v: Self::V) {
        // SAFETY: sixteen numbers lie inside `y`; packing goes by halves of registers, which the
        // permutation puts in order.
        unsafe {
            let upper = |v| _mm256_srli_epi32::<16>(_mm256_castps_si256(v));
            let both = _mm256_packus_epi32(upper(v.0), upper(v.1));
            let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(both);
            _mm256_storeu_si256(y.as_mut_ptr().cast(), both);
        }
    }
    #[inline(always)]
    fn transpose_pairs(self, x: &[[u16; 2 * LANES]; 8], y: &mut [[u16; 2 * LANES]; 8]) {
        let mut rows = [0.0f32; 8 * LANES];
        for (row, x) in rows.as_chunks_mut::<LANES>().0.iter_mut().zip(x) {
            let (first, second) = row.split_at_mut(8);
            // SAFETY: each half of `x` has eight pairs, and each half of a row has room for four.
            unsafe {
                split8(x.as_ptr(), first.as_mut_ptr(), second.as_mut_ptr());
                let (first, second) = (&mut first[4..], &mut second[4..]);
                split8(x.as_ptr().add(LANES), first.as_mut_ptr(), second.as_mut_ptr());
            }
        }
        turn(self, &rows, y);
    }
    #[inline(always)]
    fn store(self, y: &mut [f32; LANES], v: Self::V) {
        // SAFETY: both halves lie inside `y`.
        unsafe {
            _mm256_storeu_ps(y.as_mut_ptr(), v.0);
            _mm256_storeu_ps(y.as_mut_ptr().add(8), v.1);
        }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe {
            (
                _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
                _mm256_blendv_ps(y.1, x.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
            )
        }
    }
    #[inline(always)]
    fn add_exponent(self, x: Self::V, t: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe { (add_exponent8(x.0, t.0), add_exponent8(x.1, t.1)) }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        fold!(v.0, v.1, _mm256_add_ps, _mm_add_ps, _mm_add_ss)
    }
    #[inline(always)]
    fn top(self, v: Self::V) -> f32 {
        fold!(v.0, v.1, _mm256_max_ps, _mm_max_ps, _mm_max_ss)
    }
    #[inline(always)]
    fn transpose8(self, x: &[f32], x_stride: usize, y: &mut [f32], y_stride: usize) {
        assert!(7 * x_stride + 8 <= x.len() && 7 * y_stride + 8 <= y.len());
        // SAFETY: the last row of eight floats ends inside both slices.
        unsafe { transpose8(x.as_ptr(), x_stride, y.as_mut_ptr(), y_stride) }
    }
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
        min = _mm512_min_ps;
        max = _mm512_max_ps;
    }

    #[inline(always)]
    fn run<R, K: Kernel<R>>(self, kernel: K) -> R {
        // SAFETY: holding `self` proves the features.
        unsafe { run_avx512(self, kernel) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        // SAFETY: sixteen floats lie inside `x`.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn load_even(self, x: &[u16; 2 * LANES]) -> Self::V {
        // SAFETY: sixteen pairs lie inside `x`.
        unsafe {
            let pairs = _mm512_loadu_si512(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
        }
    }
    #[inline(always)]
    fn load_odd(self, x: &[u16; 2 * LANES]) -> Self::V {
        // SAFETY: sixteen pairs lie inside `x`.
        unsafe {
            let pairs = _mm512_loadu_si512(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(UPPER)))
        }
    }
    #[inline(always)]
    fn load_link(self, x: &[u16; 2 * LANES], k: usize) -> Self::V {
        // SAFETY: sixteen pairs lie inside `x`.
        unsafe {
            let pairs = _mm512_sll_epi32(_mm512_loadu_si512(x.as_ptr().cast()), shift(k));
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(UPPER)))
        }
    }
    #[inline(always)]
    fn store_pairs(self, y: &mut [u16; 2 * LANES], even: Self::V, odd: Self::V) {
        // SAFETY: sixteen pairs lie inside `y`.
        unsafe {
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
            let high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(UPPER));
            _mm512_storeu_si512(y.as_mut_ptr().cast(), _mm512_or_si512(low, high));
        }
    }
    #[inline(always)]
    fn round_bf16(self, v: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_or_si512(bits, _mm512_set1_epi32(QUIET));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let rounded = _mm512_mask_blend_epi32(is_nan, rounded, nan);
            _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(UPPER)))
        }
    }
    #[inline(always)]
    fn store_upper(self, y: &mut [u16; LANES], v: Self::V) {
        // SAFETY: sixteen numbers lie inside `y`.
        unsafe {
            let upper = _mm512_srli_epi32::<16>(_mm512_castps_si512(v));
            _mm256_storeu_si256(y.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(upper));
        }
    }
    #[inline(always)]
    fn transpose_pairs(self, x: &[[u16; 2 * LANES]; 8], y: &mut [[u16; 2 * LANES]; 8]) {
        let mut rows = [0.0f32; 8 * LANES];
        // SAFETY: 64 bytes lie inside each row of `x` and of `rows`.
        unsafe {
            let order = _mm512_loadu_si512(SPLIT.as_ptr().cast());
            for (row, x) in rows.as_chunks_mut::<LANES>().0.iter_mut().zip(x) {
                let pairs = _mm512_loadu_si512(x.as_ptr().cast());
                let split = _mm512_permutexvar_epi16(order, pairs);
                _mm512_storeu_si512(row.as_mut_ptr().cast(), split);
            }
        }
        turn(self, &rows, y);
    }
    #[inline(always)]
    fn store(self, y: &mut [f32; LANES], v: Self::V) {
        // SAFETY: sixteen floats lie inside `y`.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    fn add_exponent(self, x: Self::V, t: Self::V) -> Self::V {
        // SAFETY: holding `self` proves the features.
        unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n))
        }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        fold!(_mm512_castps512_ps256(v), upper(v), _mm256_add_ps, _mm_add_ps, _mm_add_ss)
    }
    #[inline(always)]
    fn top(self, v: Self::V) -> f32 {
        fold!(_mm512_castps512_ps256(v), upper(v), _mm256_max_ps, _mm_max_ps, _mm_max_ss)
    }
    #[inline(always)]
    fn transpose8(self, x: &[f32], x_stride: usize, y: &mut [f32], y_stride: usize) {
        assert!(7 * x_stride + 8 <= x.len() && 7 * y_stride + 8 <= y.len());
        // SAFETY: the last row of eight floats ends inside both slices.
        unsafe { transpose8(x.as_ptr(), x_stride, y.as_mut_ptr(), y_stride) }
    }
}

/// Lanes 8..16.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn upper(v: __m512) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v))) }
}

/// The bit that makes a NaN quiet.
const QUIET: i32 = 0x0040_0000;

/// Where the first input feature's weights to pairs of outputs lie in a row of pairs, then the
/// second's.
const SPLIT: [u16; 2 * LANES] = {
    let (mut order, mut i) = ([0; 2 * LANES], 0);
    while i < LANES {
        (order[i], order[LANES + i]) = (2 * i as u16, 2 * i as u16 + 1);
        i += 1;
    }
    order
};

/// Transposes `[16 input features][8 pairs of outputs]`.
#[inline(always)]
fn turn<S: Simd>(s: S, rows: &[f32; 8 * LANES], y: &mut [[u16; 2 * LANES]; 8]) {
    // SAFETY: a pair of bf16 numbers has the size of a float, and any bits are either.
    let y: &mut [f32; 8 * LANES] = unsafe { &mut *y.as_mut_ptr().cast() };
    s.transpose8(rows, 8, y, LANES);
    s.transpose8(&rows[64..], 8, &mut y[8..], LANES);
}

/// The second number of a pair of bf16 numbers.
const UPPER: i32 = 0xffff_0000_u32 as i32;

/// # Safety
/// The machine has AVX2, and eight pairs can be read.
#[inline(always)]
unsafe fn even8(x: *const u16) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(x.cast()))) }
}

/// # Safety
/// The machine has AVX2, and eight pairs can be read.
#[inline(always)]
unsafe fn odd8(x: *const u16) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let pairs = _mm256_loadu_si256(x.cast());
        _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(UPPER)))
    }
}

/// Bits by which a pair moves so that link `k` is in its upper half.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn shift(k: usize) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_cvtsi32_si128(16 - 16 * (k as i32 & 1)) }
}

/// # Safety
/// The machine has AVX2, and eight pairs can be read.
#[inline(always)]
unsafe fn link8(x: *const u16, k: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let pairs = _mm256_sll_epi32(_mm256_loadu_si256(x.cast()), shift(k));
        _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(UPPER)))
    }
}

/// # Safety
/// The machine has AVX2, and eight pairs can be written.
#[inline(always)]
unsafe fn pair8(y: *mut u16, even: __m256, odd: __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(even));
        let high = _mm256_and_si256(_mm256_castps_si256(odd), _mm256_set1_epi32(UPPER));
        _mm256_storeu_si256(y.cast(), _mm256_or_si256(low, high));
    }
}

/// Splits eight outputs' pairs into four pairs of outputs of the first input feature, and of the
/// second.
///
/// # Safety
/// The machine has AVX2; eight pairs can be read, four written to each.
#[inline(always)]
unsafe fn split8(x: *const u16, first: *mut f32, second: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let order = _mm256_broadcastsi128_si256(_mm_setr_epi8(
            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
        ));
        let split = _mm256_shuffle_epi8(_mm256_loadu_si256(x.cast()), order);
        let split = _mm256_permute4x64_epi64::<0b11_01_10_00>(split);
        _mm_storeu_si128(first.cast(), _mm256_castsi256_si128(split));
        _mm_storeu_si128(second.cast(), _mm256_extracti128_si256::<1>(split));
    }
}

/// The bits of the nearest bf16 in the lower half of each lane.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn rounded8(v: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let nan = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(QUIET)));
        let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
        let rounded = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan);
        _mm256_and_ps(rounded, _mm256_castsi256_ps(_mm256_set1_epi32(UPPER)))
    }
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn add_exponent8(x: __m256, t: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n))
    }
}

/// # Safety
/// The machine has AVX2; eight rows of eight floats can be read from `x` and written to `y`.
#[inline(always)]
unsafe fn transpose8(x: *const f32, x_stride: usize, y: *mut f32, y_stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let half = |row: usize, at: usize| {
            let low = _mm256_castps128_ps256(_mm_loadu_ps(x.add(row * x_stride + at)));
            _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(x.add((row + 4) * x_stride + at)))
        };
        for at in [0, 4] {
            let (a, b, c, d) = (half(0, at), half(1, at), half(2, at), half(3, at));
            let (ab0, ab1) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (cd0, cd1) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let to = y.add(at * y_stride);
            _mm256_storeu_ps(to, _mm256_shuffle_ps::<0x44>(ab0, cd0));
            _mm256_storeu_ps(to.add(y_stride), _mm256_shuffle_ps::<0xEE>(ab0, cd0));
            _mm256_storeu_ps(to.add(2 * y_stride), _mm256_shuffle_ps::<0x44>(ab1, cd1));
            _mm256_storeu_ps(to.add(3 * y_stride), _mm256_shuffle_ps::<0xEE>(ab1, cd1));
        }
    }
}
