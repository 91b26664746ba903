//! The promises of products in block floating point: those of the operands rounded as they say, for any
//! batch, for normal numbers finer than of bf16.

use half::bf16;

use super::matmul::{Axis, MatmulPrecision, Way};
use super::matmul_block_float::{COLUMN_BITS, ROW_BITS, block_links};
use super::matmul_rounded::{keep_rounded, rounded_bytes};
use super::pack::PackedMatrix;
use super::testing::{noise, product_where_there, relative_error, sides, with_threads};

/// A product by integers, if the machine multiplies them.
fn run(axis: Axis, x: &[f32], w: &PackedMatrix) -> Option<Vec<f32>> {
    product_where_there(Way::BlockFloat, axis, x, w)
}

/// `[out, in]` numbers as `f32` and as bf16.
fn storages(w: &[f32], out: usize, in_: usize) -> [PackedMatrix; 2] {
    [PackedMatrix::from_f32(w, out, in_), PackedMatrix::from_f32_as_bf16(w, out, in_)]
}

/// The weight as columns of `k` links seen along `axis`, rounded to bf16.
fn columns(axis: Axis, w: &PackedMatrix) -> Vec<f32> {
    let (k, n) = sides(axis, w);
    let plain = w.unpack();
    let at = |j: usize, i: usize| match axis {
        Axis::Output => plain[j * k + i],
        Axis::Input => plain[i * n + j],
    };
    let all = (0..n).flat_map(|j| (0..k).map(move |i| (j, i)));
    all.map(|(j, i)| bf16::from_f32(at(j, i)).to_f32()).collect()
}

/// Chains of `k` links with those of each block rounded to integers in their unit, as a vector shorter than
/// 2^bits.
fn rounded(chains: &[f32], k: usize, bits: i32) -> Vec<f32> {
    let round = |block: &[f32]| {
        let largest = block.iter().fold(0.0f32, |m, x| x.abs().max(m));
        let least = ((largest.to_bits() >> 23) as i32 - 126).max(-111) - 15;
        let length = norm(block.iter().map(|&x| f64::from(x))) * (1.0f64 + 1.0 / 128.0).sqrt();
        let fits = |unit: &i32| length / 2f64.powi(*unit) < 2f64.powi(bits);
        let unit = 2f64.powi((least..).find(fits).unwrap());
        let integer = |x: f32| (f64::from(x) / unit).round_ties_even().min(32767.0);
        block.iter().map(|&x| (integer(x) * unit) as f32).collect()
    };
    let blocks = chains.chunks(k).flat_map(|chain| chain.chunks(block_links(k)));
    blocks.flat_map(|block| -> Vec<f32> { round(block) }).collect()
}

/// Products of rows and columns of `k` links.
fn products(rows: &[f32], columns: &[f32], k: usize) -> Vec<f64> {
    let dot = |row: &[f32], column: &[f32]| {
        row.iter().zip(column).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
    };
    let columns = |row| columns.chunks(k).map(move |column| dot(row, column));
    rows.chunks(k).flat_map(columns).collect()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn rows_do_not_depend_on_the_batch_or_the_threads() {
    for (out, in_) in [(192, 270), (33, 576), (1536, 40)] {
        for w in storages(&noise(7, out * in_), out, in_) {
            for axis in [Axis::Output, Axis::Input] {
                let (k, columns) = sides(axis, &w);
                let x = noise(3, 2048 * k);
                let Some(all) = with_threads(1, || run(axis, &x, &w)) else { return };
                for m in [1, 2, 11, 12, 13, 63, 64, 65, 300, 2048] {
                    for first in [0, 2048 - m] {
                        let part = &x[first * k..(first + m) * k];
                        let y = with_threads(2, || run(axis, part, &w)).unwrap();
                        assert!(
                            y == all[first * columns..(first + m) * columns],
                            "{m} from {first}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_product_is_that_of_the_rounded_operands() {
    let small = [(9, 50, 600), (5, 49, 31), (3, 17, 513), (1, 1, 1), (25, 33, 18), (40, 256, 384)];
    // and more than a span of links along either axis
    let shapes = small.into_iter().chain([(3, 17, 2100), (3, 2100, 17)]);
    for (m, out, in_) in shapes {
        for scale in [1.0, 1e-30, 1e30] {
            let w: Vec<f32> = noise(7, out * in_).iter().map(|w| w * w * w).collect();
            for w in storages(&w, out, in_) {
                for axis in [Axis::Output, Axis::Input] {
                    let k = sides(axis, &w).0;
                    let x: Vec<f32> = noise(4, m * k).iter().map(|x| x * x * x * scale).collect();
                    let columns = rounded(&columns(axis, &w), k, COLUMN_BITS);
                    let want = products(&rounded(&x, k, ROW_BITS), &columns, k);
                    let Some(y) = run(axis, &x, &w) else { return };
                    assert!(relative_error(&y, &want) < 1e-6, "{m} x {k}, {scale}");
                }
            }
        }
    }
}

#[test]
fn the_largest_sums_stay_in_32_bits() {
    for k in [1, 2, 64, 192, 288] {
        // vectors of one direction, their lengths just below where the unit doubles
        for x in [0.99f32, 1.0, 1.99, 1.0f32.next_down()] {
            let w = PackedMatrix::from_f32_as_bf16(&vec![255.0; 16 * k], 16, k);
            let columns = rounded(&columns(Axis::Output, &w), k, COLUMN_BITS);
            for x in [vec![x; 12 * k], vec![-x; 12 * k]] {
                let want = products(&rounded(&x, k, ROW_BITS), &columns, k);
                let Some(y) = run(Axis::Output, &x, &w) else { return };
                assert!(relative_error(&y, &want) < 1e-6, "{k}");
            }
        }
    }
}

/// Normal numbers, those of every `step`th feature of `k` that many times as large.
fn normal(seed: u64, n: usize, k: usize, (step, times): (usize, f32)) -> Vec<f32> {
    let parts = noise(seed, 12 * n);
    let sums = parts.chunks(12).map(|parts| parts.iter().sum::<f32>() / 2.0).enumerate();
    sums.map(|(i, x)| if (i % k).is_multiple_of(step) { times * x } else { x }).collect()
}

#[test]
fn rounding_is_finer_than_to_bf16_for_normal_numbers_and_with_large_features() {
    let (m, out, k) = (24, 96, 576);
    // and the share of bf16's error that is left; in the last case what is large in rows is small in columns
    let cases = [
        ((97, 1.0), (97, 1.0), 0.12),
        ((97, 50.0), (97, 1.0), 0.16),
        ((97, 1.0), (89, 50.0), 0.16),
        ((97, 50.0), (97, 0.02), 1.1),
    ];
    for (of_rows, of_columns, share) in cases {
        let x = normal(1, m * k, k, of_rows);
        let w = PackedMatrix::from_f32_as_bf16(&normal(1 << 40, out * k, k, of_columns), out, k);
        let columns = columns(Axis::Output, &w);
        let Some(y) = run(Axis::Output, &x, &w) else { return };
        let want = products(&x, &columns, k);
        let bf16: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let bf16 = norm(products(&bf16, &columns, k).iter().zip(&want).map(|(y, w)| y - w));
        let ours = norm(y.iter().zip(&want).map(|(y, w)| f64::from(*y) - w));
        assert!(ours < share * bf16, "{} of bf16's error", ours / bf16);
    }
}

#[test]
fn nothing_times_anything_is_the_old_number() {
    let w = PackedMatrix::from_f32_as_bf16(&[0.0; 40 * 300], 40, 300);
    let Some(y) = run(Axis::Output, &noise(1, 30 * 300), &w) else { return };
    assert!(y.iter().all(|&y| y == 0.0));
    let w = PackedMatrix::from_f32_as_bf16(&noise(1, 40 * 300), 40, 300);
    let Some(y) = run(Axis::Output, &[0.0; 30 * 300], &w) else { return };
    assert!(y.iter().all(|&y| y == 0.0));
}

#[test]
fn nan_and_infinity_reach_their_row_or_column_only() {
    let (m, out, in_) = (14, 40, 300);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for axis in [Axis::Output, Axis::Input] {
            for (good, i) in storages(&noise(7, out * in_), out, in_).iter().zip(0..) {
                let (k, n) = sides(axis, good);
                let x = noise(300, m * k);
                let Some(want) = run(axis, &x, good) else { return };
                let mut spoilt = x.clone();
                spoilt[5 * k + 17] = bad;
                let y = run(axis, &spoilt, good).unwrap();
                assert!(y[5 * n..6 * n].iter().all(|y| y.is_nan()));
                assert!(y[..5 * n] == want[..5 * n] && y[6 * n..] == want[6 * n..]);
                let mut w = noise(7, out * in_);
                w[17 * in_ + 33] = bad;
                let column = if axis == Axis::Output { 17 } else { 33 };
                let y = run(axis, &x, &storages(&w, out, in_)[i]).unwrap();
                let places = y.iter().zip(&want).enumerate();
                for (place, (y, want)) in places {
                    assert_eq!(y.is_nan(), place % n == column);
                    assert!(y.is_nan() || y == want);
                }
            }
        }
    }
}

#[test]
fn weights_of_any_size_are_rounded_as_others() {
    let (m, out, in_) = (14, 40, 300);
    for scale in [1e30, 1e-30, 1e-36] {
        let w: Vec<f32> = noise(7, out * in_).iter().map(|w| w * scale).collect();
        let w = PackedMatrix::from_f32_as_bf16(&w, out, in_);
        let x = noise(300, m * in_);
        let columns = rounded(&columns(Axis::Output, &w), in_, COLUMN_BITS);
        let want = products(&rounded(&x, in_, ROW_BITS), &columns, in_);
        let Some(y) = run(Axis::Output, &x, &w) else { return };
        // brought back to where errors are measured
        let y: Vec<f32> = y.iter().map(|y| y / scale).collect();
        let want: Vec<f64> = want.iter().map(|want| want / f64::from(scale)).collect();
        assert!(want.iter().any(|&want| want != 0.0));
        assert!(relative_error(&y, &want) < 1e-6, "{scale}");
    }
    let w = PackedMatrix::from_f32_as_bf16(&[1e-42; 40 * 300], out, in_);
    let Some(y) = run(Axis::Output, &noise(300, m * in_), &w) else { return };
    assert!(y.iter().all(|&y| y == 0.0));
}

#[test]
fn integers_that_are_kept_change_no_bit_are_read_and_go_with_who_holds_them() {
    for (out, in_) in [(192, 270), (33, 576), (16, 1536), (40, 17), (48, 2100), (1536, 40)] {
        for w in storages(&noise(7, out * in_), out, in_) {
            let medium = MatmulPrecision::Medium;
            let x = noise(3, 70 * in_);
            let Some(fresh) = run(Axis::Output, &x, &w) else { return };
            let Some(kept) = keep_rounded(&w, medium) else { return };
            let integers = w.rounded().expect("somebody holds them");
            assert_eq!(size_of_val(integers.as_slice()), rounded_bytes(&w, medium));
            for m in [1, 11, 12, 20, 64, 70] {
                let y = run(Axis::Output, &x[..m * in_], &w).unwrap();
                assert!(y == fresh[..m * out], "{m} rows of [{out}, {in_}]");
            }
            let back = noise(4, 13 * out);
            let with = run(Axis::Input, &back, &w);
            let mut others = integers.to_vec();
            drop((kept, integers));
            assert!(w.rounded().is_none() && run(Axis::Input, &back, &w) == with);
            others[0].0[0] ^= 64;
            let held = w.rounded_or(|| others);
            assert!(run(Axis::Output, &x, &w).unwrap() != fresh, "the integers were not read");
            drop(held);
            assert!(run(Axis::Output, &x, &w).unwrap() == fresh);
        }
    }
}
