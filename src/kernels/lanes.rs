//! Vectors of sixteen f32 lanes with the same bits on every instruction set.
//!
//! A computation is a [`Kernel`] written once over [`Simd`];
//! [`CpuLevel::run`](super::dispatch::CpuLevel::run) compiles it for the best instruction set that
//! the machine has. Every operation rounds each lane as IEEE 754 says and sums over lanes take a
//! fixed tree, so the instruction set changes the speed and nothing else.

/// Lanes of a vector, and output rows of a packed panel.
pub(crate) const LANES: usize = 16;

/// An instruction set; holding a value proves that the machine has it.
pub(crate) trait Simd: Copy {
    /// Sixteen f32 lanes.
    type V: Copy;
    /// Rows of the tallest tile of accumulators that stays in registers.
    const ROWS: usize;
    /// Whether that tile is two vectors wide, and shorter ones are up to four.
    const WIDE: bool;

    /// Runs a kernel compiled for this instruction set, as a function of its own.
    fn run<R, K: Kernel<R>>(self, kernel: K) -> R;
    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// Reads the lanes.
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// Reads the first of each pair of bf16 numbers.
    fn load_even(self, x: &[u16; 2 * LANES]) -> Self::V;
    /// Reads the second of each pair of bf16 numbers.
    fn load_odd(self, x: &[u16; 2 * LANES]) -> Self::V;
    /// Reads the first or second of each pair of bf16 numbers, by whether `k` is even or odd.
    fn load_link(self, x: &[u16; 2 * LANES], k: usize) -> Self::V;
    /// Writes the upper halves of the lanes' bits as pairs of bf16 numbers.
    fn store_pairs(self, y: &mut [u16; 2 * LANES], even: Self::V, odd: Self::V);
    /// The nearest bf16 numbers (ties to even); what is not a number stays so.
    fn round_bf16(self, v: Self::V) -> Self::V;
    /// Writes the upper halves of the lanes' bits.
    fn store_upper(self, y: &mut [u16; LANES], v: Self::V);
    /// Sixteen outputs' weights from eight pairs of input features, transposed: `y` gets sixteen input
    /// features' weights to eight pairs of outputs.
    fn transpose_pairs(self, x: &[[u16; 2 * LANES]; 8], y: &mut [[u16; 2 * LANES]; 8]);
    /// Writes the lanes.
    fn store(self, y: &mut [f32; LANES], v: Self::V);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The smaller; `b` where either is not a number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger; `b` where either is not a number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `x` where `a < b`, else `y`.
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `x * 2^n` for normal `x` and result, `n` being the integer in the low bits of `t`.
    fn add_exponent(self, x: Self::V, t: Self::V) -> Self::V;
    /// Sum of the lanes: halves are added to halves four times.
    fn sum(self, v: Self::V) -> f32;
    /// Largest lane, found in the same order.
    fn top(self, v: Self::V) -> f32;
    /// Transposes eight rows of `x` into eight columns of `y`: `y[i * y_stride + j] = x[j *
    /// x_stride + i]` for `i, j < 8`.
    fn transpose8(self, x: &[f32], x_stride: usize, y: &mut [f32], y_stride: usize);

    /// The first `x.len()` lanes, the others 0; at most sixteen.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::V {
        if let Some(all) = x.first_chunk() {
            return self.load(all);
        }
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// Writes the first `y.len()` lanes; at most sixteen.
    #[inline(always)]
    fn store_part(self, y: &mut [f32], v: Self::V) {
        if let Some(all) = y.first_chunk_mut() {
            return self.store(all, v);
        }
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        y.copy_from_slice(&lanes[..y.len()]);
    }
}

/// A computation with result `R` written over any instruction set. `run` and all it calls are to
/// be `#[inline(always)]`, or they are compiled without the instruction set.
pub(crate) trait Kernel<R = ()> {
    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> R;
}

/// Sixteen lanes in plain Rust; `f32::mul_add` is one instruction on aarch64 and a (slow) library
/// call on x86 machines without FMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// The nearest bf16 number (ties to even); what is not a number stays so.
#[inline(always)]
fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    f32::from_bits(if x.is_nan() { bits | 0x0040_0000 } else { rounded } & 0xffff_0000)
}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn fold(v: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let a: [f32; 8] = std::array::from_fn(|i| f(v[i], v[i + 8]));
    let b: [f32; 4] = std::array::from_fn(|i| f(a[i], a[i + 4]));
    f(f(b[0], b[2]), f(b[1], b[3]))
}

impl Simd for Portable {
    type V = [f32; LANES];
    const ROWS: usize = 4;
    const WIDE: bool = false;

    #[inline(always)]
    fn run<R, K: Kernel<R>>(self, kernel: K) -> R {
        kernel.run(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }
    #[inline(always)]
    fn load_even(self, x: &[u16; 2 * LANES]) -> Self::V {
        std::array::from_fn(|i| f32::from_bits(u32::from(x[2 * i]) << 16))
    }
    #[inline(always)]
    fn load_odd(self, x: &[u16; 2 * LANES]) -> Self::V {
        std::array::from_fn(|i| f32::from_bits(u32::from(x[2 * i + 1]) << 16))
    }
    #[inline(always)]
    fn load_link(self, x: &[u16; 2 * LANES], k: usize) -> Self::V {
        std::array::from_fn(|i| f32::from_bits(u32::from(x[2 * i + k % 2]) << 16))
    }
    #[inline(always)]
    fn store_pairs(self, y: &mut [u16; 2 * LANES], even: Self::V, odd: Self::V) {
        for i in 0..LANES {
            y[2 * i] = (even[i].to_bits() >> 16) as u16;
            y[2 * i + 1] = (odd[i].to_bits() >> 16) as u16;
        }
    }
    #[inline(always)]
    fn round_bf16(self, v: Self::V) -> Self::V {
        v.map(round_to_bf16)
    }
    #[inline(always)]
    fn store_upper(self, y: &mut [u16; LANES], v: Self::V) {
        y.iter_mut().zip(v).for_each(|(y, x)| *y = (x.to_bits() >> 16) as u16);
    }
    #[inline(always)]
    fn transpose_pairs(self, x: &[[u16; 2 * LANES]; 8], y: &mut [[u16; 2 * LANES]; 8]) {
        for (out, in_) in (0..LANES).flat_map(|out| (0..LANES).map(move |in_| (out, in_))) {
            y[out / 2][2 * in_ + out % 2] = x[in_ / 2][2 * out + in_ % 2];
        }
    }
    #[inline(always)]
    fn store(self, y: &mut [f32; LANES], v: Self::V) {
        *y = v;
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn add_exponent(self, x: Self::V, t: Self::V) -> Self::V {
        zip(x, t, |x, t| f32::from_bits(x.to_bits().wrapping_add(t.to_bits() << 23)))
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        fold(v, |a, b| a + b)
    }
    #[inline(always)]
    fn top(self, v: Self::V) -> f32 {
        fold(v, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn transpose8(self, x: &[f32], x_stride: usize, y: &mut [f32], y_stride: usize) {
        for j in 0..8 {
            for i in 0..8 {
                y[i * y_stride + j] = x[j * x_stride + i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::dispatch::CpuLevel;

    struct All<'a>(&'a [f32; LANES], &'a [f32; LANES], &'a mut Vec<f32>);

    impl Kernel for All<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let (a, b) = (s.load(self.0), s.load(self.1));
            let mut pairs = [0; 2 * LANES];
            s.store_pairs(&mut pairs, a, b);
            let (mut tile, mut turned) = ([pairs; 8], [[0; 2 * LANES]; 8]);
            tile.as_flattened_mut().iter_mut().enumerate().for_each(|(i, x)| *x ^= i as u16);
            s.transpose_pairs(&tile, &mut turned);
            let turned = turned.as_flattened();
            let at = |out: usize, in_: usize| tile[in_ / 2][2 * out + in_ % 2];
            assert!((0..256).all(|i| turned[i] == at(i / 32 * 2 + i % 2, i % 32 / 2)));
            let mut rounded = [0; LANES];
            for v in [a, b] {
                s.store_upper(&mut rounded, s.round_bf16(v));
                self.2.extend(rounded.map(|x| f32::from_bits(u32::from(x) << 16)));
                s.store_upper(&mut rounded, v);
                self.2.extend(rounded.map(|x| f32::from_bits(u32::from(x) << 16)));
            }
            let vectors = [
                s.splat(self.0[3]),
                s.load_even(&pairs),
                s.load_odd(&pairs),
                s.load_link(&pairs, 6),
                s.load_link(&pairs, 7),
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.fma(a, b, a),
                s.min(a, b),
                s.max(a, b),
                s.select_lt(a, b, b, a),
                s.add_exponent(a, s.add(b, s.splat(12_582_912.0))),
                s.load_part(&self.0[..5]),
                s.round_bf16(a),
                s.round_bf16(b),
            ];
            for v in vectors {
                let mut lanes = [0.0; LANES];
                s.store(&mut lanes, v);
                self.2.extend(lanes);
            }
            self.2.extend([s.sum(a), s.top(a), s.sum(b), s.top(b)]);
            let x: Vec<f32> = (0..8 * 11).map(|i| i as f32).collect();
            let mut y = vec![0.0; 8 * 9];
            s.transpose8(&x, 11, &mut y, 9);
            assert!((0..64).all(|i| y[i / 8 * 9 + i % 8] == x[i % 8 * 11 + i / 8]));
            self.2.extend(y);
            let mut part = [0.0; 3];
            s.store_part(&mut part, b);
            self.2.extend(part);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let a = std::array::from_fn(|i| (i as f32 * 0.7).sin() * 10.0);
        let mut b: [f32; LANES] = std::array::from_fn(|i| (i as f32 * 1.3).cos() * 7.0);
        for special in [1.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            b[5] = special;
            let mut plain = Vec::new();
            CpuLevel::Portable.run(All(&a, &b, &mut plain));
            for level in [CpuLevel::Avx2, CpuLevel::Avx512] {
                let mut fast = Vec::new();
                level.run(All(&a, &b, &mut fast));
                assert_eq!(fast.len(), plain.len());
                for (x, y) in fast.iter().zip(&plain) {
                    assert!(x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan(), "{x} {y}");
                }
            }
        }
    }
}
