//! Products on tiles, in software: accuracy, independence of the batch, and that nothing is
//! written outside the result. Where a machine has tiles, the tests of the matmul run on them.

use half::bf16;

use super::dispatch::CpuLevel::{self, Avx512, Emulated};
use super::matmul::{Axis, MatmulPrecision, Terms};
use super::matmul_amx::{BLOCK_ROWS, Chunk, multiply};
use super::matmul_fetch::Fetch;
use super::matmul_form::Form;
use super::matmul_tile::Strip;
use super::pack::{PackedMatrix, PairRow};
use super::testing::{noise, product_at, relative_error, sides, with_threads};
use MatmulPrecision::{High, Medium};

/// Rows, outputs and inputs: single ones, odd ones, whole tiles and blocks, more than a span of k.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (1, 40, 300),
    (3, 17, 33),
    (15, 48, 31),
    (16, 32, 64),
    (33, 49, 257),
    (47, 16, 512),
    (70, 100, 513),
    (5, 20, 2090),
];

fn storages(out: usize, in_: usize) -> [PackedMatrix; 2] {
    let w = noise(7, out * in_);
    [PackedMatrix::from_f32(&w, out, in_), PackedMatrix::from_f32_as_bf16(&w, out, in_)]
}

fn run(
    level: CpuLevel,
    axis: Axis,
    x: &[f32],
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    precision: MatmulPrecision,
) -> Vec<f32> {
    product_at((level, axis), x, w, Terms { bias, ..Terms::default() }, precision)
}

/// The product in f64, of operands changed by `form`.
fn exact(axis: Axis, x: &[f32], w: &PackedMatrix, form: impl Fn(f32) -> f32) -> Vec<f64> {
    let ((k, columns), in_) = (sides(axis, w), w.in_features());
    let form = |x: &f32| f64::from(form(*x));
    let (x, w): (Vec<_>, Vec<_>) =
        (x.iter().map(form).collect(), w.unpack().iter().map(form).collect());
    let weight = |j: usize, i: usize| match axis {
        Axis::Output => w[j * in_ + i],
        Axis::Input => w[i * in_ + j],
    };
    let rows = x.chunks(k).flat_map(|row| (0..columns).map(move |j| (row, j)));
    rows.map(|(row, j)| row.iter().enumerate().map(|(i, x)| x * weight(j, i)).sum()).collect()
}

/// Calls `check` with every shape, storage and axis, and an input.
fn for_all(check: impl Fn(Axis, &[f32], &PackedMatrix)) {
    for (m, out, in_) in SHAPES {
        for w in storages(out, in_) {
            for axis in [Axis::Output, Axis::Input] {
                check(axis, &noise(5, m * sides(axis, &w).0), &w);
            }
        }
    }
}

#[test]
fn medium_on_tiles_is_the_product_of_rounded_operands() {
    for_all(|axis, x, w| {
        let want = exact(axis, x, w, |x| bf16::from_f32(x).to_f32());
        let error = relative_error(&run(Emulated, axis, x, w, None, Medium), &want);
        assert!(error < 1e-6, "{:?}: {error}", sides(axis, w));
    });
}

#[test]
fn tiles_of_the_machine_agree_with_those_in_software() {
    let machine = CpuLevel::detect();
    for_all(|axis, x, w| {
        for precision in [High, Medium] {
            let want = run(Emulated, axis, x, w, None, precision);
            let want: Vec<f64> = want.into_iter().map(f64::from).collect();
            let error = relative_error(&run(machine, axis, x, w, None, precision), &want);
            let most = match precision {
                _ if machine.multiplies_tiles() => 1e-6,
                Medium if machine.multiplies_pairs_fast() => 1e-6,
                Medium => 8e-3,
                _ => 8e-6,
            };
            assert!(error < most, "{:?}, {precision:?}: {error}", sides(axis, w));
        }
    });
}

#[test]
fn high_on_tiles_agrees_with_f64() {
    for_all(|axis, x, w| {
        let want = exact(axis, x, w, |x| x);
        let error = relative_error(&run(Emulated, axis, x, w, None, High), &want);
        assert!(
            error < if w.is_bf16() { 4e-6 } else { 8e-6 },
            "{:?}, bf16 {}: {error}",
            sides(axis, w),
            w.is_bf16()
        );
    });
}

#[test]
fn tiles_add_the_bias() {
    for (m, out, in_) in SHAPES {
        for w in storages(out, in_) {
            let (x, bias) = (noise(5, m * in_), noise(3, out));
            for (precision, round) in [(High, false), (Medium, true)] {
                let form = |x: f32| if round { bf16::from_f32(x).to_f32() } else { x };
                let mut want = exact(Axis::Output, &x, &w, form);
                want.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(bias[i % out]));
                let y = run(Emulated, Axis::Output, &x, &w, Some(&bias), precision);
                assert!(relative_error(&y, &want) < 8e-6);
            }
        }
    }
}

#[test]
fn rows_on_tiles_do_not_depend_on_the_batch_or_the_threads() {
    for (out, in_) in [(1, 270), (40, 270), (72, 33), (8, 2090)] {
        for w in storages(out, in_) {
            for (axis, precision) in [
                (Axis::Output, Medium),
                (Axis::Output, High),
                (Axis::Input, Medium),
                (Axis::Input, High),
            ] {
                let (k, columns) = sides(axis, &w);
                let x = noise(3, 2048 * k);
                let at = |x: &[f32]| run(Emulated, axis, x, &w, None, precision);
                let all = with_threads(1, || at(&x));
                for m in [1, 2, 16, 17, 31, 33, 65, 400] {
                    for first in [0, 2048 - m] {
                        let y = with_threads(2, || at(&x[first * k..(first + m) * k]));
                        let same = y == all[first * columns..(first + m) * columns];
                        assert!(same, "M {m} at row {first}, {k} to {columns}, {precision:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn weights_that_bf16_holds_give_the_same_bits_in_both_storages() {
    for (m, out, in_) in SHAPES {
        let w = PackedMatrix::from_f32_as_bf16(&noise(7, out * in_), out, in_);
        let wide = PackedMatrix::from_f32(&w.unpack(), out, in_);
        for (axis, precision) in [(Axis::Output, High), (Axis::Input, High), (Axis::Input, Medium)]
        {
            let x = noise(5, m * sides(axis, &w).0);
            let at = |w| run(Emulated, axis, &x, w, None, precision);
            assert!(at(&w) == at(&wide));
        }
    }
}

#[test]
fn highest_does_not_use_tiles() {
    let (w, x) = (PackedMatrix::from_f32(&noise(7, 40 * 70), 40, 70), noise(5, 9 * 70));
    let at = |level| run(level, Axis::Output, &x, &w, None, MatmulPrecision::Highest);
    assert!(at(Emulated) == at(Avx512));
}

#[test]
fn nan_and_infinity_stay_in_their_row_on_tiles() {
    for w in storages(21, 41) {
        for (axis, bad) in [(Axis::Output, f32::NAN), (Axis::Input, f32::INFINITY)] {
            for precision in [High, Medium] {
                let (k, n) = sides(axis, &w);
                let mut x = noise(2, 3 * k);
                x[2 * k - 1] = bad;
                let y = run(Emulated, axis, &x, &w, None, precision);
                assert!(y[n..2 * n].iter().all(|y| !y.is_finite()));
                assert!(y[..n].iter().chain(&y[2 * n..]).all(|y| y.is_finite()));
            }
        }
    }
}

#[test]
fn two_parts_of_a_row_hold_sixteen_bits_of_each_link() {
    let x = noise(1, 3 * 50);
    let lda = Chunk::<2>::row_elements(45);
    let mut chunks = vec![Chunk::<2>([[7; 32]; 2]); 3 * lda];
    Chunk::copy(CpuLevel::detect(), &x, 50, 45, &mut chunks);
    for (row, chunks) in x.chunks(50).zip(chunks.chunks(lda)) {
        for i in 0..64 {
            let [near, rest] = chunks[i / 32].0.map(|part| bf16::from_bits(part[i % 32]).to_f32());
            let x = if i < 45 { row[i] } else { 0.0 };
            assert_eq!(near, bf16::from_f32(x).to_f32());
            assert!((x - near - rest).abs() <= x.abs() / 131_072.0);
        }
    }
}

#[test]
fn a_strip_reads_its_rows_and_writes_its_results_only() {
    const GAP: usize = 7;
    let lda = Chunk::<1>::row_elements(64);
    for m in 1..=2 * BLOCK_ROWS + 6 {
        for panels in [1, 2] {
            let x = noise(1, m * 64);
            // rows after the last would spoil every sum
            let mut a = vec![Chunk::<1>([[0x7fc0; 32]; 1]); (m + BLOCK_ROWS) * lda];
            Chunk::copy(CpuLevel::detect(), &x, 64, 64, &mut a[..m * lda]);
            let b = vec![PairRow([0x3f80; 32]); panels * 32];
            let ldy = panels * 16 + GAP;
            let mut y = vec![1.0; (m + BLOCK_ROWS) * ldy];
            let strip = Strip {
                rows: m,
                k: 64,
                a: a.as_ptr(),
                lda,
                b: b.as_ptr(),
                panels,
                panel_stride: 32,
                ahead: 64,
                fetch: Fetch::NONE,
                init: y.as_ptr(),
                ldi: ldy,
                y: y.as_mut_ptr(),
                ldy,
            };
            // SAFETY: the slices have the shapes that the strip states.
            unsafe { multiply::<1, 1>(Emulated, &strip) };
            for (i, row) in y.chunks(ldy).enumerate() {
                let width = if i < m { panels * 16 } else { 0 };
                assert!(row[..width].iter().all(|y| y.is_finite() && *y != 1.0));
                assert!(row[width..].iter().all(|y| *y == 1.0), "{m} rows, {panels} panels");
            }
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn panels_made_for_all_tasks_are_those_that_each_task_makes() {
    for (out, in_) in [(40, 33), (270, 72), (2090, 17)] {
        for w in storages(out, in_) {
            for precision in [Medium, High] {
                let x = noise(3, 600 * out);
                let few = &x[..600 / 4 * out];
                let [all, part] =
                    [&x, few].map(|x| run(Emulated, Axis::Input, x, &w, None, precision));
                assert_eq!(bits(&all[..part.len()]), bits(&part), "[{out}, {in_}], {precision:?}");
            }
        }
    }
}

#[test]
fn rows_are_cut_alike_with_and_without_an_instruction_for_it() {
    fn check<const PARTS: usize>() {
        for (rows, width) in [(1, 1), (3, 31), (2, 32), (5, 100), (4, 576)] {
            let stride = width + 3;
            let mut x = noise(9, rows * stride);
            x.iter_mut().step_by(7).for_each(|x| *x *= 1e20);
            let elements = rows * Chunk::<PARTS>::row_elements(width);
            let [fast, plain] = [CpuLevel::detect(), CpuLevel::Portable].map(|level| {
                let mut into = vec![Chunk([[0xffff; 32]; PARTS]); elements];
                Chunk::<PARTS>::copy(level, &x, stride, width, &mut into);
                let rows = into.chunks(Chunk::<PARTS>::row_elements(width));
                let read = rows.flat_map(|row| &row[..width.div_ceil(32)]);
                read.map(|chunk| chunk.0).collect::<Vec<_>>()
            });
            assert_eq!(fast, plain, "[{rows}, {width}] in {PARTS} parts");
        }
    }
    check::<1>();
    check::<2>();
}
