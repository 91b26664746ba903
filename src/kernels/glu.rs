//! Gated linear units (arXiv:2002.05202): `y = act(gate) * up`.

use super::dispatch::CpuLevel;
use super::lanes::{Kernel, LANES, Simd};
use super::lanes_math::{gelu, gelu_tanh, silu};
use super::parallel::{for_each, task_len};

/// The activation on the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GluActivation {
    /// `x * sigmoid(x)` (SwiGLU).
    Silu,
    /// GELU with the tanh approximation, `gelu_pytorch_tanh` in Hugging Face's configs.
    GeluTanh,
    /// GELU with the error function.
    Gelu,
}

/// `y = act(gate) * up`, element by element.
pub fn glu(gate: &[f32], up: &[f32], act: GluActivation, y: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == y.len());
    let (level, task) = (CpuLevel::detect(), task_len(1));
    let parts = gate.chunks(task).zip(up.chunks(task)).zip(y.chunks_mut(task));
    for_each(parts, |((gate, up), y)| level.run(Forward { gate, up, act, y }));
}

/// Gradients of [`glu`]: `dgate = dy * up * act'(gate)` and `dup = dy * act(gate)`.
pub fn glu_backward(
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    act: GluActivation,
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    assert!([up.len(), dy.len(), dgate.len(), dup.len()].iter().all(|n| *n == gate.len()));
    let (level, task) = (CpuLevel::detect(), task_len(1));
    let inputs = gate.chunks(task).zip(up.chunks(task)).zip(dy.chunks(task));
    let parts = inputs.zip(dgate.chunks_mut(task).zip(dup.chunks_mut(task)));
    for_each(parts, |(((gate, up), dy), (dgate, dup))| {
        level.run(Backward { gate, up, dy, act, dgate, dup });
    });
}

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    act: GluActivation,
    y: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.gate.chunks(LANES).zip(self.up.chunks(LANES));
        for ((gate, up), y) in inputs.zip(self.y.chunks_mut(LANES)) {
            let (value, _) = value_and_slope(s, s.load_part(gate), self.act);
            s.store_part(y, s.mul(value, s.load_part(up)));
        }
    }
}

struct Backward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dy: &'a [f32],
    act: GluActivation,
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.gate.chunks(LANES).zip(self.up.chunks(LANES)).zip(self.dy.chunks(LANES));
        let outputs = self.dgate.chunks_mut(LANES).zip(self.dup.chunks_mut(LANES));
        for (((gate, up), dy), (dgate, dup)) in inputs.zip(outputs) {
            let (value, slope) = value_and_slope(s, s.load_part(gate), self.act);
            let dy = s.load_part(dy);
            s.store_part(dgate, s.mul(s.mul(dy, s.load_part(up)), slope));
            s.store_part(dup, s.mul(dy, value));
        }
    }
}

/// The activation and its derivative.
#[inline(always)]
fn value_and_slope<S: Simd>(s: S, x: S::V, act: GluActivation) -> (S::V, S::V) {
    match act {
        GluActivation::Silu => silu(s, x),
        GluActivation::GeluTanh => gelu_tanh(s, x),
        GluActivation::Gelu => gelu(s, x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [GluActivation; 3] =
        [GluActivation::Silu, GluActivation::GeluTanh, GluActivation::Gelu];

    /// Simpson's rule for the normal distribution; the other two by their formulas.
    fn exact(x: f64, act: GluActivation) -> f64 {
        match act {
            GluActivation::Silu => x / (1.0 + (-x).exp()),
            GluActivation::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                x / (1.0 + (-2.0 * u).exp())
            }
            GluActivation::Gelu => {
                let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
                let h = (x + 12.0) / 2000.0;
                let inner = (1..2000)
                    .map(|i| density(-12.0 + i as f64 * h) * if i % 2 == 1 { 4.0 } else { 2.0 });
                x * h / 3.0 * (inner.sum::<f64>() + density(x))
            }
        }
    }

    fn grid() -> Vec<f32> {
        (-400..=400).map(|i| i as f32 * 0.02 + 0.001).collect()
    }

    #[test]
    fn values_are_exact_to_rounding() {
        for act in ALL {
            let gate = grid();
            let mut y = vec![0.0; gate.len()];
            glu(&gate, &vec![0.7; gate.len()], act, &mut y);
            for (x, y) in gate.iter().zip(y) {
                let wanted = exact(*x as f64, act) * 0.7f32 as f64;
                let error = (y as f64 - wanted).abs() / wanted.abs();
                let allowed = 1e-6 * (1.0 + (*x as f64).powi(2) / 8.0);
                assert!(error < allowed, "{act:?} at {x}: {y} instead of {wanted}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for act in ALL {
            let gate = grid();
            let n = gate.len();
            let (mut dgate, mut dup) = (vec![0.0; n], vec![0.0; n]);
            glu_backward(&gate, &vec![0.7; n], &vec![-1.3; n], act, &mut dgate, &mut dup);
            for i in 0..n {
                let x = gate[i] as f64;
                let slope = (exact(x + 1e-4, act) - exact(x - 1e-4, act)) / 2e-4;
                assert!((dgate[i] as f64 + 0.91 * slope).abs() < 1e-6, "{act:?} at {x}");
                assert!((dup[i] as f64 + 1.3 * exact(x, act)).abs() < 3e-6);
            }
        }
    }

    #[test]
    fn far_arguments_stay_finite() {
        for act in ALL {
            let gate = [-1e30, -1e5, -100.0, -40.0, 40.0, 100.0, 1e5, 1e30];
            let (mut dgate, mut dup) = ([0.0; 8], [0.0; 8]);
            glu_backward(&gate, &[1.0; 8], &[1.0; 8], act, &mut dgate, &mut dup);
            for i in 0..8 {
                assert!((dgate[i] - if i < 4 { 0.0 } else { 1.0 }).abs() < 1e-6, "{act:?} {i}");
                assert!((dup[i] - gate[i].max(0.0)).abs() < 1e-6, "{act:?} {i}");
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_the_batch_nor_on_the_instruction_set() {
        let gate: Vec<f32> = grid().into_iter().cycle().take(40_007).collect();
        let up: Vec<f32> = gate.iter().map(|x| x * 0.3 - 1.0).collect();
        for act in ALL {
            let n = gate.len();
            let (mut y, mut plain) = (vec![0.0; n], vec![0.0; n]);
            glu(&gate, &up, act, &mut y);
            CpuLevel::Portable.run(Forward { gate: &gate, up: &up, act, y: &mut plain });
            assert_eq!(y, plain);
            for i in (0..n - 5).step_by(997) {
                let mut own = [0.0; 5];
                glu(&gate[i..i + 5], &up[i..i + 5], act, &mut own);
                assert_eq!(own, y[i..i + 5]);
            }
        }
    }
}
