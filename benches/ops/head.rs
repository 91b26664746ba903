//! The fused head, its log-probs with and without the gradient, and the exponentials of one row.

use steersman::kernels::logp::{self, LogpOptions, RowRule, RowStats, Target};
use steersman::kernels::matmul::MatmulPrecision;
use steersman::kernels::pack::PackedMatrix;

use crate::{Benches, D, V, measure, noise};

pub fn bench(benches: &mut Benches) {
    let head = PackedMatrix::from_f32_as_bf16(&noise(V * D), V, D);
    let rows = if benches.quick { 64 } else { 512 };
    let (h, mut dh) = (noise(rows * D), vec![0.0; rows * D]);
    let targets: Vec<_> =
        (0..rows as u32).map(|row| Target { row, token: row * 7919 % V as u32 }).collect();
    let (weights, product) = (vec![1.0; rows], 2 * rows * D * V);
    for (name, precision) in
        [("highest", MatmulPrecision::Highest), ("medium", MatmulPrecision::Medium)]
    {
        let options = LogpOptions { precision, entropy: true, ..Default::default() };
        let criterion = match precision {
            MatmulPrecision::Medium if !precision.is_highest_here() => &mut benches.medium_flops,
            _ => &mut benches.flops,
        };
        measure(criterion, &format!("logp/{name}/{rows}"), product, || {
            logp::forward(&h, &head, &targets, options);
        });
        measure(criterion, &format!("logp_grad/{name}/{rows}"), 2 * product, || {
            logp::forward_backward(&h, &head, (&targets, &weights), None, options, &mut dh);
        });
    }
    let (mut logits, options) = (noise(V), LogpOptions::default());
    measure(&mut benches.bytes, "exp/row_stats", 4 * V, || {
        RowStats::of(&mut logits, &options, &RowRule::default());
    });
}
