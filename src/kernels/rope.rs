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

/// `y`, each head of each row of `x` rotated by the angles of the row's position, which the table
/// must have; both are `[positions.len(), heads * head_dim]`.
pub fn rope(x: &[f32], positions: &[u32], table: &RopeTable, y: &mut [f32]) {
    rotate(x, positions, table, false, y);
}

/// Gradient of [`rope`]: `dx`, which is `dy` rotated back.
pub fn rope_backward(dy: &[f32], positions: &[u32], table: &RopeTable, dx: &mut [f32]) {
    rotate(dy, positions, table, true, dx);
}

fn rotate(x: &[f32], positions: &[u32], table: &RopeTable, back: bool, y: &mut [f32]) {
    if x.is_empty() {
        return;
    }
    let width = x.len() / positions.len();
    assert!(x.len() == width * positions.len() && width.is_multiple_of(table.head_dim()));
    assert!(y.len() == x.len(), "rotated rows differ in size");
    let (level, task) = (CpuLevel::detect(), task_len(width));
    let rows = x.chunks(task).zip(positions.chunks(task / width));
    for_each(rows.zip(y.chunks_mut(task)), |((x, positions), y)| {
        level.run(Rotate { x, y, width, positions, table, back });
    });
}

struct Rotate<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
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
        let rows = self.x.chunks_exact(self.width).zip(self.y.chunks_exact_mut(self.width));
        for ((x, y), &position) in rows.zip(self.positions) {
            let at = position as usize * half..(position as usize + 1) * half;
            let (cos, sin) = (&self.table.cos[at.clone()], &self.table.sin[at]);
            for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
                for i in (0..half).step_by(LANES) {
                    let (low, high) =
                        (i..half.min(i + LANES), half + i..half + half.min(i + LANES));
                    let (cos, sin) = (&cos[low.clone()], &sin[low.clone()]);
                    let (cos, sin) = (s.load_part(cos), s.mul(s.load_part(sin), sign));
                    let (a, b) = (s.load_part(&x[low.clone()]), s.load_part(&x[high.clone()]));
                    let minus = s.sub(s.splat(0.0), sin);
                    s.store_part(&mut y[low], s.fma(a, cos, s.mul(b, minus)));
                    s.store_part(&mut y[high], s.fma(b, cos, s.mul(a, sin)));
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
            rope(&x, &positions, &table, &mut y);
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
        rope(&x, &positions, &table, &mut y);
        assert!(x.iter().zip(&y).any(|(x, y)| (x - y).abs() > 1.0));
        let mut back = vec![0.0; x.len()];
        rope_backward(&y, &positions, &table, &mut back);
        assert!(x.iter().zip(&back).all(|(x, y)| (x - y).abs() < 1e-6));
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let table = RopeTable::new(&frequencies(12), 300, 1.0);
        let positions: Vec<u32> = (0..300).rev().collect();
        let x = wave(300 * 9 * 24);
        let mut y = x.clone();
        rope(&x, &positions, &table, &mut y);
        for (i, (x, y)) in x.chunks(9 * 24).zip(y.chunks(9 * 24)).enumerate() {
            let (mut own, mut plain) = (x.to_vec(), x.to_vec());
            rope(x, &positions[i..i + 1], &table, &mut own);
            assert_eq!(own, y);
            let positions = &positions[i..i + 1];
            let (table, y_plain) = (&table, &mut plain[..]);
            let job = Rotate { x, y: y_plain, width: 9 * 24, positions, table, back: false };
            CpuLevel::Portable.run(job);
            assert_eq!(plain, y);
        }
    }
}
