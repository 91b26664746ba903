//! All products with the frozen weights of SmolLM2-135M's blocks (seven matrices in each of 30), and those of
//! their input gradients, beside oneDNN and MKL in `vs_pytorch/matmul.py`.
//!
//! `cargo bench --bench matmul -- --rows 512 --matmul_precision medium`

mod common;

use std::time::Instant;

use common::{Flags, median, peak_mib};
use steersman::Result;
use steersman::kernels::matmul::{matmul, matmul_input_grad};
use steersman::kernels::pack::PackedMatrix;

const LAYERS: usize = 30;
/// Inputs and outputs: q and o, k and v, gate and up, down.
const SHAPES: [(usize, usize); 7] =
    [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)];

fn main() -> Result<()> {
    let flags = Flags::new();
    let (rows, precision) = (flags.count("--rows").unwrap_or(512), flags.precision()?);
    let noise =
        |n: usize| -> Vec<f32> { (0..n).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0).collect() };
    let packed = |(inputs, outputs): (usize, usize)| {
        PackedMatrix::from_f32_as_bf16(&noise(inputs * outputs), outputs, inputs)
    };
    let layers: Vec<Vec<PackedMatrix>> = (0..LAYERS).map(|_| SHAPES.map(packed).into()).collect();
    let (x, mut y) = (noise(rows * 1536), vec![0.0; rows * 1536]);
    let mut pass = || {
        let start = Instant::now();
        for w in layers.iter().flatten() {
            let (from, to) = (rows * w.in_features(), rows * w.out_features());
            matmul(&x[..from], w, None, precision, &mut y[..to]);
            matmul_input_grad(&x[..to], w, precision, &mut y[..from]);
        }
        start.elapsed().as_secs_f64()
    };
    pass();
    let seconds = median((0..flags.count("--steps").unwrap_or(5)).map(|_| pass()).collect());
    let products: usize = SHAPES.iter().map(|(inputs, outputs)| inputs * outputs).sum();
    let gflops = (4 * rows * products * LAYERS) as f64 / seconds / 1e9;
    println!("median_s {seconds:.4} gflop_s {gflops:.0} peak_mib {}", peak_mib());
    Ok(())
}
