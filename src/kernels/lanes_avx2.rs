//! The sixteen lanes as two registers of AVX2 with fused multiply-add.

use super::lanes::{Job, LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the machine has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The machine has AVX2 and FMA.
    #[inline(always)]
    pub unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma")]
fn run<J: Job>(simd: Avx2, job: J) {
    job.run(simd);
}

/// A function of two vectors that applies one intrinsic to both halves.
macro_rules! pairwise {
    ($name:ident, $intrinsic:ident) => {
        #[inline(always)]
        fn $name(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: holding `self` proves the features.
            unsafe { ($intrinsic(a.0, b.0), $intrinsic(a.1, b.1)) }
        }
    };
}

/// Folds sixteen lanes to one by halves.
macro_rules! fold {
    ($v:ident, $wide:ident, $half:ident, $single:ident) => {
        // SAFETY: the caller holds an `Avx2`, which proves the features.
        unsafe {
            let eight = $wide($v.0, $v.1);
            let four = $half(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = $half(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32($single(two, _mm_shuffle_ps::<1>(two, two)))
        }
    };
}

impl Simd for Avx2 {
    type V = (__m256, __m256);

    #[inline(always)]
    fn run<J: Job>(self, job: J) {
        // SAFETY: holding `self` proves the features.
        unsafe { run(self, job) }
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
    fn store(self, y: &mut [f32; LANES], v: Self::V) {
        // SAFETY: both halves lie inside `y`.
        unsafe {
            _mm256_storeu_ps(y.as_mut_ptr(), v.0);
            _mm256_storeu_ps(y.as_mut_ptr().add(8), v.1);
        }
    }
    pairwise!(add, _mm256_add_ps);
    pairwise!(sub, _mm256_sub_ps);
    pairwise!(mul, _mm256_mul_ps);
    pairwise!(div, _mm256_div_ps);
    pairwise!(min, _mm256_min_ps);
    pairwise!(max, _mm256_max_ps);
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
        (add_exponent(self, x.0, t.0), add_exponent(self, x.1, t.1))
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        fold!(v, _mm256_add_ps, _mm_add_ps, _mm_add_ss)
    }
    #[inline(always)]
    fn top(self, v: Self::V) -> f32 {
        fold!(v, _mm256_max_ps, _mm_max_ps, _mm_max_ss)
    }
    #[inline(always)]
    fn transpose8(self, x: &[f32], x_stride: usize, y: &mut [f32], y_stride: usize) {
        assert!(7 * x_stride + 8 <= x.len() && 7 * y_stride + 8 <= y.len());
        // SAFETY: the last row of eight floats ends inside both slices.
        unsafe { transpose8(self, x.as_ptr(), x_stride, y.as_mut_ptr(), y_stride) }
    }
}

#[inline(always)]
fn add_exponent(_: Avx2, x: __m256, t: __m256) -> __m256 {
    // SAFETY: the argument proves the features.
    unsafe {
        let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n))
    }
}

/// # Safety
/// Eight rows of eight floats can be read from `x` and written to `y`.
#[inline(always)]
unsafe fn transpose8(_: Avx2, x: *const f32, x_stride: usize, y: *mut f32, y_stride: usize) {
    // SAFETY: the argument proves the features; the caller vouches for the memory.
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
