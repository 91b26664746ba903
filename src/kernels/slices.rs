//! Functions applied to slices, sixteen lanes at a time. An element's result does not depend on
//! its place.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};

/// A function of one vector.
pub(crate) trait Lanewise: Copy {
    /// The function at `x`; mark it `#[inline(always)]`.
    fn at<S: Simd>(self, s: S, x: S::V) -> S::V;
}

/// Applies `f` in place.
pub(crate) fn map<F: Lanewise>(level: CpuLevel, xs: &mut [f32], f: F) {
    level.run(Map(xs, f));
}

struct Map<'a, F>(&'a mut [f32], F);

impl<F: Lanewise> Kernel for Map<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.0.chunks_mut(LANES) {
            s.store_part(x, self.1.at(s, s.load_part(x)));
        }
    }
}

/// The largest element; minus infinity for an empty slice.
pub(crate) fn max(level: CpuLevel, xs: &[f32]) -> f32 {
    level.run(Max(xs))
}

struct Max<'a>(&'a [f32]);

impl Kernel<f32> for Max<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.0.as_chunks();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut best = s.load(&last);
        for x in whole {
            best = s.max(s.load(x), best);
        }
        s.top(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::noise;

    #[derive(Clone, Copy)]
    struct Square;

    impl Lanewise for Square {
        #[inline(always)]
        fn at<S: Simd>(self, s: S, x: S::V) -> S::V {
            s.mul(x, x)
        }
    }

    #[test]
    fn levels_and_places_give_the_same_bits_as_plain_loops() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let xs = noise(3, len);
            for level in [CpuLevel::Portable, CpuLevel::Avx2, CpuLevel::Avx512] {
                let mut squares = xs.clone();
                map(level, &mut squares, Square);
                assert!(squares.iter().zip(&xs).all(|(y, x)| *y == x * x));
                assert_eq!(max(level, &xs), xs.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
    }
}
