//! Products with frozen weights, both directions, each storage and precision.

use steersman::kernels::low_rank::Activation;
use steersman::kernels::low_rank_term::LowRankTerm;
use steersman::kernels::matmul::{
    MatmulPrecision, Output, Terms, matmul, matmul_all, matmul_input_grad, matmul_input_grad_add,
};
use steersman::kernels::pack::PackedMatrix;

use crate::{Benches, D, F, V, measure, noise};

/// Inputs and outputs: q and o, k and v, gate and up, down, head.
const SHAPES: [(usize, usize); 5] = [(D, D), (D, 192), (D, F), (F, D), (D, V)];
const PRECISIONS: [(&str, MatmulPrecision); 3] = [
    ("highest", MatmulPrecision::Highest),
    ("high", MatmulPrecision::High),
    ("medium", MatmulPrecision::Medium),
];

pub fn bench(benches: &mut Benches) {
    for (inputs, outputs) in SHAPES {
        let w = noise(inputs * outputs);
        for (storage, w) in [
            ("f32", PackedMatrix::from_f32(&w, outputs, inputs)),
            ("bf16", PackedMatrix::from_f32_as_bf16(&w, outputs, inputs)),
        ] {
            for (precision, how) in PRECISIONS {
                let case = format!("{inputs}x{outputs}/{storage}/{precision}");
                for rows in rows(benches.quick, outputs).iter().copied() {
                    product(benches, &format!("matmul/{case}/{rows}"), &w, (rows, how), false);
                    product(benches, &format!("matmul_grad/{case}/{rows}"), &w, (rows, how), true);
                }
            }
        }
    }
    [64, 512].into_iter().for_each(|rows| with_low_rank(benches, rows));
}

/// Query, key and value with LoRA of rank 8 in one go, and the input gradient of the query's.
fn with_low_rank(benches: &mut Benches, rows: usize) {
    const R: usize = 8;
    let shapes = [D, 192, 192];
    let packed = |outputs| PackedMatrix::from_f32_as_bf16(&noise(D * outputs), outputs, D);
    let (weights, ups) = (shapes.map(packed), shapes.map(|outputs| noise(outputs * R)));
    let (x, z, wdown) = (noise(rows * D), noise(rows * R), noise(R * D));
    let mut ys = shapes.map(|outputs| vec![0.0; rows * outputs]);
    let outputs: usize = shapes.iter().sum();
    let highest = MatmulPrecision::Highest;
    let flops = 2 * rows * outputs * (D + R);
    measure(&mut benches.flops, &format!("matmul_lora/{D}x{outputs}/{rows}"), flops, || {
        let phi = (2.0, Activation::Linear);
        let terms = ups.each_ref().map(|up| [LowRankTerm::of_output((&z, R), up, phi)]);
        let outputs = weights.iter().zip(&mut ys).zip(&terms);
        let outputs = outputs.map(|((w, y), low_rank)| {
            let terms = Terms { bias: None, low_rank };
            Output { w, terms, y }
        });
        matmul_all(&x, outputs.collect(), highest);
    });
    let (dy, mut dx) = (noise(rows * D), vec![0.0; rows * D]);
    let flops = 2 * rows * D * (D + R);
    measure(&mut benches.flops, &format!("matmul_lora_grad/{D}x{D}/{rows}"), flops, || {
        let low_rank = &[LowRankTerm::of_input((z.clone(), R), &wdown)];
        let terms = Terms { low_rank, ..Terms::default() };
        matmul_input_grad_add(&dy, &weights[0], terms, highest, &mut dx);
    });
}

fn rows(quick: bool, outputs: usize) -> &'static [usize] {
    match (quick, outputs) {
        (false, _) => &[1, 16, 64, 512, 2048],
        (true, V) => &[1, 64],
        (true, _) => &[1, 64, 512],
    }
}

/// One product; a single row is bound by reading the weight, so its rate is in bytes.
fn product(
    benches: &mut Benches,
    name: &str,
    w: &PackedMatrix,
    (rows, precision): (usize, MatmulPrecision),
    gradient: bool,
) {
    let (inputs, outputs) = (w.in_features(), w.out_features());
    let (from, to) = if gradient { (outputs, inputs) } else { (inputs, outputs) };
    let (x, mut y) = (noise(rows * from), vec![0.0; rows * to]);
    let (criterion, amount) = match (rows, precision) {
        (1, _) => (&mut benches.bytes, w.bytes()),
        (_, MatmulPrecision::Medium) if !precision.is_highest_here() => {
            (&mut benches.medium_flops, 2 * rows * inputs * outputs)
        }
        _ => (&mut benches.flops, 2 * rows * inputs * outputs),
    };
    measure(criterion, name, amount, || match gradient {
        true => matmul_input_grad(&x, w, precision, &mut y),
        false => matmul(&x, w, None, precision, &mut y),
    });
}
