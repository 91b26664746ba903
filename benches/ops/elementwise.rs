//! What lies between the products: norm, rotary, gated units, low-rank shifts.

use steersman::kernels::glu::{GluActivation, glu, glu_backward};
use steersman::kernels::low_rank::{self, Activation, Gradients, InputGradient, Saved};
use steersman::kernels::norm::{rms_norm, rms_norm_backward};
use steersman::kernels::rope::{RopeTable, rope, rope_backward};
use steersman::kernels::row_sum::RowSum;

use crate::{Benches, D, F, measure, noise};

/// Width of a head, and the rank of the shifts.
const HEAD: usize = 64;
const R: usize = 8;

pub fn bench(benches: &mut Benches) {
    let rows: &[usize] = if benches.quick { &[512] } else { &[1, 64, 2048] };
    for rows in rows.iter().copied() {
        norm(benches, rows);
        rotary(benches, rows);
        gated(benches, rows);
        shift(benches, rows);
    }
}

fn norm(benches: &mut Benches, rows: usize) {
    let (x, w, dy, mut y) = (noise(rows * D), noise(D), noise(rows * D), vec![0.0; rows * D]);
    measure(&mut benches.bytes, &format!("norm/{rows}"), 8 * x.len(), || {
        rms_norm(&x, &w, 1e-5, false, &mut y);
    });
    measure(&mut benches.bytes, &format!("norm_grad/{rows}"), 12 * x.len(), || {
        rms_norm_backward(&x, &w, 1e-5, false, &dy, &mut y);
    });
}

fn rotary(benches: &mut Benches, rows: usize) {
    let freqs: Vec<f32> =
        (0..HEAD / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / HEAD as f32)).collect();
    let positions: Vec<u32> = (0..rows as u32).collect();
    let (table, x) = (RopeTable::at(&freqs, &positions, 1.0), noise(rows * D));
    let mut y = vec![0.0; x.len()];
    let bytes = 8 * x.len();
    measure(&mut benches.bytes, &format!("rotary/{rows}"), bytes, || {
        rope(&x, &positions, &table, &mut y);
    });
    measure(&mut benches.bytes, &format!("rotary_grad/{rows}"), bytes, || {
        rope_backward(&x, &positions, &table, &mut y);
    });
}

fn gated(benches: &mut Benches, rows: usize) {
    let n = rows * F;
    let (gate, up, dy) = (noise(n), noise(n), noise(n));
    let (mut y, mut dgate, mut dup) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
    for (name, act) in [("silu", GluActivation::Silu), ("gelu_tanh", GluActivation::GeluTanh)] {
        measure(&mut benches.bytes, &format!("glu/{name}/{rows}"), 12 * n, || {
            glu(&gate, &up, act, &mut y);
        });
        measure(&mut benches.bytes, &format!("glu_grad/{name}/{rows}"), 20 * n, || {
            glu_backward(&gate, &up, &dy, act, &mut dgate, &mut dup);
        });
    }
}

fn shift(benches: &mut Benches, rows: usize) {
    let (x, dy, wdown, wup) = (noise(rows * D), noise(rows * D), noise(R * D), noise(D * R));
    let (mut z, mut y) = (vec![0.0; rows * R], vec![0.0; rows * D]);
    let flops = 4 * rows * D * R;
    measure(&mut benches.flops, &format!("low_rank/{rows}"), flops, || {
        low_rank::down(&x, &wdown, D, R, &mut z);
        low_rank::up_add((&z, R), &wup, (1.0, Activation::Linear), &x, &mut y);
    });
    let mut dx = vec![0.0; rows * D];
    let (mut ddown, mut dup) = (RowSum::new(R * D), RowSum::new(D * R));
    measure(&mut benches.flops, &format!("low_rank_grad/{rows}"), 2 * flops, || {
        let (alpha, activation) = (1.0, Activation::Linear);
        let saved = Saved { x: &x, z: &z, wdown: &wdown, wup: &wup, r: R, alpha, activation };
        let gradients =
            Gradients { dx: InputGradient::Add(&mut dx), dwdown: &mut ddown, dwup: &mut dup };
        low_rank::backward(&dy, saved, gradients);
    });
}
