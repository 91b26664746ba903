//! Rotary position embedding (arXiv:2104.09864) of queries and keys, in the half-split layout of
//! Hugging Face: element `i` of a head turns with element `i + half`.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::parallel::{for_each, task_len};

/// Cosines and sines of every position's angles.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Tables for positions `0..positions`: the angle is `position * inv_freq[i]` rounded to f32,
    /// as Hugging Face does; cosine and sine are multiplied by `attention_factor`.
    pub fn new(inv_freq: &[f32], positions: usize, attention_factor: f32) -> Self {
        Self::at(inv_freq, &(0..positions as u32).collect::<Vec<_>>(), attention_factor)
    }

    /// Like [`RopeTable::new`] for a list of positions; entry `i` is that of `positions[i]`.
    pub fn at(inv_freq: &[f32], positions: &[u32], attention_factor: f32) -> Self {
        let angles = || positions.iter().flat_map(|p| inv_freq.iter().map(move |f| *p as f32 * f));
        Self {
            half: inv_freq.len(),
            cos: angles().map(|a| (a as f64).cos() as f32 * attention_factor).collect(),
            sin: angles().map(|a| (a as f64).sin() as f32 * attention_factor).collect(),
        }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Cosines, `[positions, head_dim / 2]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines, `[positions, head_dim / 2]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }
}

/// Rotates each head of each row of `x`, `[positions.len(), heads * head_dim]`, in place, by the
/// angles of the row's position, which the table must have.
pub fn rope(x: &mut [f32], positions: &[u32], table: &RopeTable) {
    rotate(x, positions, table, false);
}

/// Gradient of [`rope`]: rotates `dy` back in place.
pub fn rope_backward(dy: &mut [f32], positions: &[u32], table: &RopeTable) {
    rotate(dy, positions, table, true);
}

fn rotate(x: &mut [f32], positions: &[u32], table: &RopeTable, back: bool) {
    if x.is_empty() {
        return;
    }
    let width = x.len() / positions.len();
    assert!(x.len() == width * positions.len() && width.is_multiple_of(table.head_dim()));
    let (level, task) = (CpuLevel::detect(), task_len(width));
    for_each(x.chunks_mut(task).zip(positions.chunks(task / width)), |(x, positions)| {
        level.run(Rotate { x, width, positions, table, back });
    });
}

struct Rotate<'a> {
    x: &'a mut [f32],
    width: usize,
    positions: &'a [u32],
    table: &'a RopeTable,
    back: bool,
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let half = self.table.half;
        let sign = s.splat(if self.back { -1.0 } else { 1.0 });
        for (row, &position) in self.x.chunks_exact_mut(self.width).zip(self.positions) {
            let at = position as usize * half..(position as usize + 1) * half;
            let (cos, sin) = (&self.table.cos[at.clone()], &self.table.sin[at]);
            for head in row.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                let pairs = a.chunks_mut(LANES).zip(b.chunks_mut(LANES));
                for ((a, b), (cos, sin)) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
                    let (cos, sin) = (s.load_part(cos), s.mul(s.load_part(sin), sign));
                    let (x, y) = (s.load_part(a), s.load_part(b));
                    let minus = s.sub(s.splat(0.0), sin);
                    s.store_part(a, s.fma(x, cos, s.mul(y, minus)));
                    s.store_part(b, s.fma(y, cos, s.mul(x, sin)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(half: usize) -> Vec<f32> {
        (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect()
    }

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * 3.0 + 0.1).collect()
    }

    #[test]
    fn pairs_turn_by_the_angle_of_their_position() {
        for (half, heads) in [(4, 3), (16, 2), (32, 9), (20, 1)] {
            let (freq, positions) = (frequencies(half), [0, 7, 3, 499, 7]);
            let table = RopeTable::new(&freq, 500, 1.5);
            assert_eq!((table.positions(), table.head_dim()), (500, 2 * half));
            let x = wave(5 * heads * 2 * half);
            let mut y = x.clone();
            rope(&mut y, &positions, &table);
            for (n, (x, y)) in x.chunks(2 * half).zip(y.chunks(2 * half)).enumerate() {
                for i in 0..half {
                    let angle = (positions[n / heads] as f32 * freq[i]) as f64;
                    let (a, b) = (x[i] as f64, x[i + half] as f64);
                    let (c, s) = (1.5 * angle.cos(), 1.5 * angle.sin());
                    assert!((y[i] as f64 - (a * c - b * s)).abs() < 1e-6);
                    assert!((y[i + half] as f64 - (b * c + a * s)).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn backward_undoes_a_rotation() {
        let table = RopeTable::new(&frequencies(32), 300, 1.0);
        let positions: Vec<u32> = (0..200).map(|i| i * 7 % 300).collect();
        let x = wave(200 * 3 * 64);
        let mut y = x.clone();
        rope(&mut y, &positions, &table);
        assert!(x.iter().zip(&y).any(|(x, y)| (x - y).abs() > 1.0));
        rope_backward(&mut y, &positions, &table);
        assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-6));
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let table = RopeTable::new(&frequencies(12), 300, 1.0);
        let positions: Vec<u32> = (0..300).rev().collect();
        let x = wave(300 * 9 * 24);
        let mut y = x.clone();
        rope(&mut y, &positions, &table);
        for (i, (x, y)) in x.chunks(9 * 24).zip(y.chunks(9 * 24)).enumerate() {
            let (mut own, mut plain) = (x.to_vec(), x.to_vec());
            rope(&mut own, &positions[i..i + 1], &table);
            assert_eq!(own, y);
            let positions = &positions[i..i + 1];
            let table = &table;
            let job = Rotate { x: &mut plain, width: 9 * 24, positions, table, back: false };
            CpuLevel::Portable.run(job);
            assert_eq!(plain, y);
        }
    }
}
