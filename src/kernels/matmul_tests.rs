//! The promises of the matmul: batch invariance to the bit, same bits on every level, accuracy.

use half::bf16;

use super::dispatch::CpuLevel;
use super::low_rank::{Activation, up_add};
use super::low_rank_term::LowRankTerm;
use super::matmul::{
    Axis, MatmulPrecision, Output, Terms, Way, matmul, matmul_add, matmul_all, matmul_input_grad,
    matmul_input_grad_add,
};
use super::pack::PackedMatrix;
use super::testing::{noise, product_at, product_where_there, relative_error, sides, with_threads};

const MS: [usize; 8] = [1, 2, 15, 16, 63, 64, 65, 2048];
const OUTS: [usize; 6] = [1, 8, 64, 192, 576, 1536];
use MatmulPrecision::{High, Highest, Medium};

fn storages(out: usize, in_: usize) -> [PackedMatrix; 2] {
    let w = noise(7, out * in_);
    [PackedMatrix::from_f32(&w, out, in_), PackedMatrix::from_f32_as_bf16(&w, out, in_)]
}

fn run(axis: Axis, x: &[f32], w: &PackedMatrix, precision: MatmulPrecision) -> Vec<f32> {
    let (k, columns) = sides(axis, w);
    let mut y = vec![f32::NAN; x.len() / k * columns];
    match axis {
        Axis::Output => matmul(x, w, None, precision, &mut y),
        Axis::Input => matmul_input_grad(x, w, precision, &mut y),
    }
    y
}

/// Rows of `x` in batches of M give the bits that they give among 2048.
fn check_batches(axis: Axis, w: &PackedMatrix, precision: MatmulPrecision) {
    let (k, columns) = sides(axis, w);
    let x = noise(3, 2048 * k);
    let all = with_threads(1, || run(axis, &x, w, precision));
    for m in MS {
        for first in [0, 2048 - m] {
            let part = &x[first * k..(first + m) * k];
            let y = with_threads(2, || run(axis, part, w, precision));
            let same = y == all[first * columns..(first + m) * columns];
            assert!(same, "M {m} at row {first}, {k} to {columns}, {precision:?}");
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch_or_the_threads() {
    for out in OUTS {
        for w in storages(out, 270) {
            for axis in [Axis::Output, Axis::Input] {
                check_batches(axis, &w, Highest);
                check_batches(axis, &w, Medium);
                // elsewhere the same as `Highest`
                if CpuLevel::detect().multiplies_tiles() {
                    check_batches(axis, &w, High);
                }
            }
        }
    }
    for w in storages(576, 1536) {
        check_batches(Axis::Output, &w, Highest);
        check_batches(Axis::Input, &w, Medium);
    }
    // rows that begin in the same cache sets are copied where they are many, a span of k at a time
    for w in storages(48, 3072) {
        check_batches(Axis::Output, &w, Highest);
    }
    for w in storages(3072, 48) {
        check_batches(Axis::Input, &w, Highest);
    }
}

#[test]
fn more_threads_than_rows_change_nothing() {
    for (m, out, in_) in [(13, 16, 90_000), (2, 40, 40_000), (900, 3, 3000)] {
        let w = PackedMatrix::from_f32(&noise(7, out * in_), out, in_);
        let x = noise(3, m * in_);
        let y = with_threads(1, || run(Axis::Output, &x, &w, Highest));
        assert!(y == with_threads(16, || run(Axis::Output, &x, &w, Highest)));
    }
}

#[test]
fn every_level_gives_the_same_bits_at_highest() {
    for (m, out, in_) in [(1, 40, 300), (3, 17, 33), (7, 576, 96), (70, 100, 513), (66, 1024, 2048)]
    {
        for w in storages(out, in_) {
            for axis in [Axis::Output, Axis::Input] {
                let (k, columns) = sides(axis, &w);
                let x = noise(5, m * k);
                let at = |level, precision| {
                    product_at((level, axis), &x, &w, Terms::default(), precision)
                };
                let plain = at(CpuLevel::Portable, Highest);
                assert!(at(CpuLevel::detect(), Highest) == plain, "{m} x {k} x {columns}");
                assert!(at(CpuLevel::Avx2, Highest) == plain, "{m} x {k} x {columns}");
            }
        }
    }
}

/// A product of pairs, if the machine multiplies them.
fn run_pairs(axis: Axis, x: &[f32], w: &PackedMatrix) -> Option<Vec<f32>> {
    product_where_there(Way::Pairs, axis, x, w)
}

#[test]
fn rows_of_pairs_do_not_depend_on_the_batch_or_the_threads() {
    for w in storages(192, 270).into_iter().chain(storages(33, 576)).chain(storages(8, 2090)) {
        for axis in [Axis::Output, Axis::Input] {
            let (k, columns) = sides(axis, &w);
            let x = noise(3, 2048 * k);
            let Some(all) = with_threads(1, || run_pairs(axis, &x, &w)) else { return };
            for (m, first) in MS.into_iter().flat_map(|m| [(m, 0), (m, 2048 - m)]) {
                let part = &x[first * k..(first + m) * k];
                let y = with_threads(2, || run_pairs(axis, part, &w)).unwrap();
                assert!(y == all[first * columns..(first + m) * columns], "{m} rows from {first}");
            }
        }
    }
}

#[test]
fn medium_without_a_faster_instruction_is_highest() {
    for w in storages(49, 270) {
        let x = noise(5, 7 * 270);
        let at = |level, precision| {
            product_at((level, Axis::Output), &x, &w, Terms::default(), precision)
        };
        assert!(at(CpuLevel::Avx2, Medium) == at(CpuLevel::Avx2, Highest));
        let (here, same) = (CpuLevel::detect(), Medium.is_highest_here());
        assert_eq!(at(here, Medium) == at(here, Highest), same);
    }
}

#[test]
fn low_rank_terms_are_added_to_the_product_as_passes_of_their_own_would() {
    use CpuLevel::{Avx2, Avx512, Emulated, Portable};
    for (m, out, in_, r) in [(1, 40, 300, 8), (5, 17, 33, 3), (64, 576, 96, 8), (150, 33, 2100, 19)]
    {
        let (x, bias) = (noise(4, m * in_), noise(1, out));
        let (z, wup) = (noise(2, m * r), noise(3, out * r));
        let phi = (0.5, Activation::Silu);
        let both = [(); 2].map(|()| LowRankTerm::of_output((&z, r), &wup, phi));
        let bias = Some(&bias[..]);
        for (w, level) in storages(out, in_).iter().flat_map(|w| {
            [Portable, Avx2, Avx512, Emulated, CpuLevel::detect()].map(|level| (w, level))
        }) {
            for precision in [Highest, High, Medium] {
                let run = |low_rank| {
                    let terms = Terms { bias, low_rank };
                    with_threads(2, || product_at((level, Axis::Output), &x, w, terms, precision))
                };
                let plain = run(&[]);
                let (mut once, mut twice) = (plain.clone(), plain.clone());
                up_add((&z, r), &wup, phi, &plain, &mut once);
                up_add((&z, r), &wup, phi, &once, &mut twice);
                let case = format!("{m} x {in_} x {out}, {precision:?}, {level:?}");
                assert!(plain != once && run(&both[..1]) == once, "{case}");
                assert!(run(&both) == twice, "{case}");
            }
        }
    }
}

#[test]
fn products_at_once_are_the_products_one_by_one() {
    for (m, in_) in [(1, 40), (64, 300), (65, 96), (300, 1024)] {
        let (x, z) = (noise(1, m * in_), noise(2, m * 8));
        let weights: Vec<_> =
            [33, 48, 7, 576].into_iter().flat_map(|out| storages(out, in_)).collect();
        let biases: Vec<_> = (3..).zip(&weights).map(|(i, w)| noise(i, w.out_features())).collect();
        let ups: Vec<_> =
            (20..).zip(&weights).map(|(i, w)| noise(i, 8 * w.out_features())).collect();
        let terms =
            ups.iter().map(|up| [LowRankTerm::of_output((&z, 8), up, (0.5, Activation::Linear))]);
        let terms: Vec<_> = terms.collect();
        for precision in [Highest, High, Medium] {
            let of = |i: usize| Terms { bias: Some(&biases[i]), low_rank: &terms[i] };
            let each = weights.iter().enumerate().map(|(i, w)| {
                let mut y = vec![f32::NAN; m * w.out_features()];
                matmul_add(&x, w, of(i), precision, &mut y);
                y
            });
            let each: Vec<_> = each.collect();
            let mut all: Vec<_> = each.iter().map(|y| vec![f32::NAN; y.len()]).collect();
            let outputs = weights.iter().zip(&mut all).enumerate();
            let outputs = outputs.map(|(i, (w, y))| Output { w, terms: of(i), y }).collect();
            with_threads(2, || matmul_all(&x, outputs, precision));
            assert!(all == each, "{m} x {in_}, {precision:?}");
        }
    }
}

#[test]
fn a_term_of_the_input_is_the_code_times_wdown() {
    let (m, out, in_, r) = (30, 20, 70, 5);
    for w in storages(out, in_) {
        let (dy, dz, wdown) = (noise(3, m * out), noise(1, m * r), noise(2, r * in_));
        let low_rank = &[LowRankTerm::of_input((dz.clone(), r), &wdown)];
        let mut dx = vec![f32::NAN; m * in_];
        let terms = Terms { low_rank, ..Terms::default() };
        matmul_input_grad_add(&dy, &w, terms, Highest, &mut dx);
        let plain = w.unpack();
        let mut want = exact(&dz, r, in_, |k, j| wdown[k * in_ + j]);
        let product = exact(&dy, out, in_, |o, k| plain[o * in_ + k]);
        want.iter_mut().zip(product).for_each(|(want, product)| *want += product);
        assert!(relative_error(&dx, &want) < 1e-6);
    }
}

/// `x [m, k]` times `w [k, n]` seen through `at`, in f64.
fn exact(x: &[f32], k: usize, n: usize, at: impl Fn(usize, usize) -> f32) -> Vec<f64> {
    let dot = |row: &[f32], j| (0..k).map(|i| f64::from(row[i]) * f64::from(at(i, j))).sum();
    x.chunks(k).flat_map(|row| (0..n).map(move |j| (row, j))).map(|(row, j)| dot(row, j)).collect()
}

#[test]
fn products_agree_with_f64() {
    for (m, out, in_) in [(1, 1, 1), (1, 576, 1536), (5, 49, 31), (70, 200, 576), (33, 1536, 40)] {
        for w in storages(out, in_) {
            let plain = w.unpack();
            let (x, dy, bias) = (noise(1, m * in_), noise(2, m * out), noise(3, out));
            let mut want = exact(&x, in_, out, |k, o| plain[o * in_ + k]);
            want.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(bias[i % out]));
            let mut y = vec![0.0; m * out];
            matmul(&x, &w, Some(&bias), Highest, &mut y);
            assert!(relative_error(&y, &want) < 1e-6);
            matmul(&x, &w, Some(&bias), High, &mut y);
            let halves = CpuLevel::detect().multiplies_tiles() && !w.is_bf16();
            assert!(relative_error(&y, &want) < if halves { 8e-6 } else { 4e-6 });
            let want = exact(&dy, out, in_, |o, k| plain[o * in_ + k]);
            assert!(relative_error(&run(Axis::Input, &dy, &w, Highest), &want) < 1e-6);
        }
    }
}

#[test]
fn products_of_pairs_are_those_of_rounded_operands() {
    let round = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>();
    for (m, out, in_) in [
        (9, 50, 600),
        (5, 49, 31),
        (3, 17, 513),
        (1, 1, 1),
        (20, 33, 18),
        (3, 40, 2090),
        (3, 2090, 40),
    ] {
        for w in storages(out, in_) {
            let plain = round(&w.unpack());
            for axis in [Axis::Output, Axis::Input] {
                let (k, n) = sides(axis, &w);
                let x = noise(4, m * k);
                let at = |i: usize, j: usize| match axis {
                    Axis::Output => plain[j * in_ + i],
                    Axis::Input => plain[i * in_ + j],
                };
                let want = exact(&round(&x), k, n, at);
                let Some(y) = run_pairs(axis, &x, &w) else { return };
                assert!(relative_error(&y, &want) < 1e-6);
            }
        }
    }
}

#[test]
fn nan_and_infinity_pass_through_to_their_row_only() {
    let numbers = [f32::NAN, f32::INFINITY];
    for (out, in_) in [(20, 40), (21, 41)] {
        for w in storages(out, in_) {
            for axis in [Axis::Output, Axis::Input] {
                let (k, n) = sides(axis, &w);
                for (bad, precision) in
                    numbers.iter().flat_map(|x| [(x, Highest), (x, High), (x, Medium)])
                {
                    let mut x = noise(2, 3 * k);
                    x[2 * k - 1] = *bad;
                    let y = run(axis, &x, &w, precision);
                    assert!(y[n..2 * n].iter().all(|y| !y.is_finite()));
                    assert!(y[..n].iter().chain(&y[2 * n..]).all(|y| y.is_finite()));
                }
            }
        }
    }
}

#[test]
fn no_rows_give_no_rows() {
    let w = PackedMatrix::from_f32(&[1.0; 6], 2, 3);
    matmul(&[], &w, None, Highest, &mut []);
    matmul_input_grad(&[], &w, Highest, &mut []);
}

#[test]
fn products_with_the_transpose_have_the_bits_of_input_gradients_in_every_way() {
    for (m, out, in_) in [(1, 40, 300), (7, 33, 17), (64, 4100, 48), (70, 2090, 21), (300, 96, 64)]
    {
        for w in storages(out, in_) {
            let (x, turned) = (noise(3, m * out), w.transposed());
            assert_eq!((turned.out_features(), turned.is_bf16()), (in_, w.is_bf16()));
            for level in [CpuLevel::Portable, CpuLevel::detect(), CpuLevel::Emulated] {
                for precision in [Highest, High, Medium] {
                    let at =
                        |axis, w| product_at((level, axis), &x, w, Terms::default(), precision);
                    let same = at(Axis::Output, &turned) == at(Axis::Input, &w);
                    assert!(same, "{m} x {out} x {in_}, {precision:?}, {level:?}");
                }
            }
            for way in [Way::Pairs, Way::BlockFloat] {
                let at = |axis, w| product_where_there(way, axis, &x, w);
                assert!(at(Axis::Output, &turned) == at(Axis::Input, &w), "{way:?}");
            }
        }
    }
}
