//! The promises of the low-rank kernels: right to f64, and the same bits in any batch.

use super::low_rank::{Activation, Gradients, InputGradient, Saved, backward, down, up_add};
use super::row_sum::RowSum;
use super::testing::{noise, relative_error, with_threads};

const ALL: [Activation; 5] =
    [Activation::Linear, Activation::Silu, Activation::Relu, Activation::Gelu, Activation::Tanh];

/// An adapter and a batch for it.
struct Case {
    d: usize,
    r: usize,
    activation: Activation,
    x: Vec<f32>,
    wdown: Vec<f32>,
    wup: Vec<f32>,
    dy: Vec<f32>,
}

const ALPHA: f32 = 0.5;

impl Case {
    fn new(m: usize, d: usize, d_out: usize, r: usize, activation: Activation) -> Self {
        let (x, wdown) = (noise(1, m * d), noise(2, r * d));
        let (wup, dy) = (noise(3, d_out * r), noise(4, m * d_out));
        Self { d, r, activation, x, wdown, wup, dy }
    }

    fn forward(&self, x: &[f32], y: &mut [f32]) -> Vec<f32> {
        let mut z = vec![0.0; x.len() / self.d * self.r];
        down(x, &self.wdown, self.d, self.r, &mut z);
        let old = y.to_vec();
        up_add((&z, self.r), &self.wup, (ALPHA, self.activation), &old, y);
        z
    }

    /// `dx`, `dwdown` and the transpose of `dwup`, added to zeros.
    fn backward(&self, x: &[f32], z: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
        let mut sums = [RowSum::new(self.wdown.len()), RowSum::new(self.wup.len())];
        let dx = self.backward_into(x, z, dy, &mut sums);
        let [dwdown, dwup] = sums.map(RowSum::finish);
        [dx, dwdown, dwup]
    }

    /// `dx`; the weights' gradients are added to `sums`.
    fn backward_into(&self, x: &[f32], z: &[f32], dy: &[f32], sums: &mut [RowSum; 2]) -> Vec<f32> {
        let (alpha, activation) = (ALPHA, self.activation);
        let saved =
            Saved { x, z, wdown: &self.wdown, wup: &self.wup, r: self.r, alpha, activation };
        let mut dx = vec![0.0; x.len()];
        let [dwdown, dwup] = sums;
        backward(dy, saved, Gradients { dx: InputGradient::Add(&mut dx), dwdown, dwup });
        dx
    }
}

/// `a [m, k]` times `b [k, n]`, where either may be given transposed by its strides.
fn exact(
    (m, k, n): (usize, usize, usize),
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    let dot = |i, j| (0..k).map(|l| a(i, l) * b(l, j)).sum();
    (0..m * n).map(|at| dot(at / n, at % n)).collect()
}

#[test]
fn forward_and_gradients_agree_with_f64() {
    for (m, d, d_out, r) in [(1, 5, 7, 1), (300, 48, 40, 8), (520, 33, 70, 19), (65, 20, 16, 64)] {
        for activation in ALL {
            let case = Case::new(m, d, d_out, r, activation);
            let mut y = vec![1.0; m * d_out];
            let z = case.forward(&case.x, &mut y);
            let f = |v: &[f32], at: usize| f64::from(v[at]);
            let (phi, slope) = (activation.apply(&z), activation.derivative(&z));
            let want_z =
                exact((m, d, r), |i, k| f(&case.x, i * d + k), |k, j| f(&case.wdown, j * d + k));
            assert!(relative_error(&z, &want_z) < 1e-6);
            let up =
                exact((m, r, d_out), |i, k| f(&phi, i * r + k), |k, j| f(&case.wup, j * r + k));
            let want_y: Vec<f64> = up.iter().map(|u| 1.0 + f64::from(ALPHA) * u).collect();
            assert!(relative_error(&y, &want_y) < 1e-6, "{activation:?}");

            let [dx, dwdown, dwup] = case.backward(&case.x, &z, &case.dy);
            let da = exact(
                (m, d_out, r),
                |i, k| f(&case.dy, i * d_out + k),
                |k, j| f(&case.wup, k * r + j),
            );
            let dz: Vec<f64> =
                da.iter().zip(&slope).map(|(a, s)| f64::from(ALPHA) * a * f64::from(*s)).collect();
            let want = exact((m, r, d), |i, k| dz[i * r + k], |k, j| f(&case.wdown, k * d + j));
            assert!(relative_error(&dx, &want) < 1e-5, "{activation:?}");
            let want = exact((r, m, d), |i, k| dz[k * r + i], |k, j| f(&case.x, k * d + j));
            assert!(relative_error(&dwdown, &want) < 1e-5, "{activation:?}");
            let scaled = |i, k| f64::from(ALPHA) * f(&phi, k * r + i);
            let want = exact((r, m, d_out), scaled, |k, j| f(&case.dy, k * d_out + j));
            assert!(relative_error(&dwup, &want) < 1e-5, "{activation:?}");
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch_or_the_threads() {
    let (m, d, d_out, r) = (600, 72, 56, 8);
    let case = Case::new(m, d, d_out, r, Activation::Gelu);
    let start = noise(9, m * d_out);
    let mut y = start.clone();
    let z = with_threads(1, || case.forward(&case.x, &mut y));
    let [dx, ..] = with_threads(1, || case.backward(&case.x, &z, &case.dy));
    for (first, last) in [(0, 1), (1, 3), (255, 257), (250, 315), (599, 600)] {
        let rows = |v: &[f32], width: usize| v[first * width..last * width].to_vec();
        let mut part = rows(&start, d_out);
        let part_z = with_threads(2, || case.forward(&rows(&case.x, d), &mut part));
        assert!(part == rows(&y, d_out) && part_z == rows(&z, r));
        let [part_dx, ..] = case.backward(&rows(&case.x, d), &part_z, &rows(&case.dy, d_out));
        assert!(part_dx == rows(&dx, d));
    }
}

#[test]
fn weight_gradients_do_not_depend_on_the_threads() {
    let case = Case::new(1500, 40, 24, 5, Activation::Silu);
    let z = case.forward(&case.x, &mut vec![0.0; 1500 * 24]);
    let run = |threads| with_threads(threads, || case.backward(&case.x, &z, &case.dy));
    assert!(run(1) == run(2) && run(1) == run(3));
}

#[test]
fn gradients_are_added_and_a_fresh_adapter_changes_nothing() {
    let mut case = Case::new(10, 12, 12, 4, Activation::Linear);
    let z = case.forward(&case.x, &mut vec![0.0; 120]);
    let [once, ..] = case.backward(&case.x, &z, &case.dy);
    let mut dx = once.clone();
    let saved = Saved {
        x: &case.x,
        z: &z,
        wdown: &case.wdown,
        wup: &case.wup,
        r: 4,
        alpha: ALPHA,
        activation: Activation::Linear,
    };
    let gradients = |dx: InputGradient| {
        let (mut dwdown, mut dwup) = (RowSum::new(48), RowSum::new(48));
        backward(&case.dy, saved, Gradients { dx, dwdown: &mut dwdown, dwup: &mut dwup });
        (dwdown.finish(), dwup.finish())
    };
    let sums = gradients(InputGradient::Add(&mut dx));
    let mut dz = vec![f32::NAN; z.len()];
    assert!(gradients(InputGradient::Code(&mut dz)) == sums);
    let want = exact(
        (10, 4, 12),
        |i, k| f64::from(dz[i * 4 + k]),
        |k, j| f64::from(case.wdown[k * 12 + j]),
    );
    assert!(relative_error(&once, &want) < 1e-6);
    assert!(dx.iter().zip(&once).all(|(twice, once)| *twice == once + once));
    case.wup.fill(0.0);
    let mut y = noise(8, 120);
    let before = y.clone();
    case.forward(&case.x, &mut y);
    assert_eq!(y, before);
}

#[test]
fn weight_gradients_do_not_depend_on_how_the_rows_are_cut() {
    let (m, d, d_out, r) = (900, 40, 24, 5);
    let case = Case::new(m, d, d_out, r, Activation::Silu);
    let z = case.forward(&case.x, &mut vec![0.0; m * d_out]);
    let whole = case.backward(&case.x, &z, &case.dy);
    for cuts in [vec![256, 900], vec![1, 40, 255, 300, 899], vec![512, 513]] {
        let mut sums = [RowSum::new(r * d), RowSum::new(r * d_out)];
        let (mut dx, mut from) = (Vec::new(), 0);
        for to in cuts.into_iter().chain([m]) {
            let rows = |v: &[f32], width: usize| v[from * width..to * width].to_vec();
            let (x, z, dy) = (rows(&case.x, d), rows(&z, r), rows(&case.dy, d_out));
            dx.extend(case.backward_into(&x, &z, &dy, &mut sums));
            from = to;
        }
        let [dwdown, dwup] = sums.map(RowSum::finish);
        assert!([dx, dwdown, dwup] == whole);
    }
}
