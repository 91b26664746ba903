//! Rows keep their bits at every batch size and width where libraries change their way of computing,
//! on one thread and on two, in products at every precision, low-rank products and log-probs.

use super::logp::{LogpOptions, Target, forward_backward};
use super::low_rank::{Activation, Gradients, InputGradient, Saved, backward, down, up_add};
use super::matmul::{MatmulPrecision, matmul, matmul_input_grad};
use super::pack::PackedMatrix;
use super::row_sum::RowSum;
use super::testing::{noise, with_threads};

const ROWS: usize = 2048;
const MS: [usize; 8] = [1, 2, 15, 16, 63, 64, 65, ROWS];
const NS: [usize; 4] = [1, 8, 64, 192];
/// More than one block along k, the last one not full.
const K: usize = 270;
const PRECISIONS: [MatmulPrecision; 3] =
    [MatmulPrecision::Highest, MatmulPrecision::High, MatmulPrecision::Medium];

fn storages(out: usize, in_: usize) -> [PackedMatrix; 2] {
    let w = noise(7, out * in_);
    [PackedMatrix::from_f32(&w, out, in_), PackedMatrix::from_f32_as_bf16(&w, out, in_)]
}

/// Holds `results` of rows `first..last` on one thread and on two against those of all rows; a
/// result is as many numbers a row as it likes.
fn check(what: &str, results: impl Fn(usize, usize) -> Vec<Vec<f32>> + Sync) {
    let all = with_threads(1, || results(0, ROWS));
    for (m, threads) in MS.into_iter().flat_map(|m| [(m, 1), (m, 2)]) {
        for first in [0, ROWS - m] {
            let part = with_threads(threads, || results(first, first + m));
            for (all, part) in all.iter().zip(&part) {
                let width = all.len() / ROWS;
                let same = *part == all[first * width..(first + m) * width];
                assert!(same, "{what}: {m} rows from {first} on, {threads} threads");
            }
        }
    }
}

#[test]
fn products_at_every_precision() {
    for (n, precision) in NS.into_iter().flat_map(|n| PRECISIONS.map(|p| (n, p))) {
        let (x, dy) = (noise(1, ROWS * K), noise(2, ROWS * n));
        for (w, storage) in storages(n, K).iter().zip(["f32", "bf16"]) {
            check(&format!("{K} to {n}, {storage}, {precision:?}"), |first, last| {
                let (mut y, mut dx) =
                    (vec![0.0; (last - first) * n], vec![0.0; (last - first) * K]);
                matmul(&x[first * K..last * K], w, None, precision, &mut y);
                matmul_input_grad(&dy[first * n..last * n], w, precision, &mut dx);
                vec![y, dx]
            });
        }
    }
}

#[test]
fn low_rank_products_and_their_gradients() {
    for (r, n) in NS.into_iter().flat_map(|r| NS.map(|n| (r, n))) {
        let (x, old, dy) = (noise(1, ROWS * K), noise(2, ROWS * n), noise(3, ROWS * n));
        let (wdown, wup) = (noise(4, r * K), noise(5, n * r));
        let (alpha, activation) = (0.5, Activation::Silu);
        check(&format!("{K} to {r} to {n}"), |first, last| {
            let (x, dy) = (&x[first * K..last * K], &dy[first * n..last * n]);
            let (mut z, old) = (vec![0.0; (last - first) * r], &old[first * n..last * n]);
            let mut y = vec![0.0; old.len()];
            down(x, &wdown, K, r, &mut z);
            up_add((&z, r), &wup, (alpha, activation), old, &mut y);
            let mut dx = vec![0.0; x.len()];
            let (mut dwdown, mut dwup) = (RowSum::new(r * K), RowSum::new(r * n));
            let saved = Saved { x, z: &z, wdown: &wdown, wup: &wup, r, alpha, activation };
            let dx_to = InputGradient::Add(&mut dx);
            let sums = Gradients { dx: dx_to, dwdown: &mut dwdown, dwup: &mut dwup };
            backward(dy, saved, sums);
            vec![z, y, dx]
        });
    }
}

#[test]
fn log_probs_at_every_precision() {
    let d = 40;
    for (n, precision) in NS.into_iter().flat_map(|n| PRECISIONS.map(|p| (n, p))) {
        let h = noise(1, ROWS * d);
        let options = LogpOptions { entropy: true, precision, ..Default::default() };
        for (w, storage) in storages(n, d).iter().zip(["f32", "bf16"]) {
            check(&format!("head of {n} tokens, {storage}, {precision:?}"), |first, last| {
                let target =
                    |row| Target { row: row as u32, token: ((first + row) * 7 % n) as u32 };
                let targets: Vec<Target> = (0..last - first).map(target).collect();
                let h = &h[first * d..last * d];
                let mut dh = vec![0.0; h.len()];
                let weights = vec![-1.0; targets.len()];
                let said = forward_backward(h, w, (&targets, &weights), None, options, &mut dh);
                vec![said.logp, said.lse, said.entropy.unwrap(), dh]
            });
        }
    }
}
