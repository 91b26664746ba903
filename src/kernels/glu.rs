//! Gated linear units: `y = act(gate) * up`.

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
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = value_and_slope(*g, act).0 * u;
    }
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
    for i in 0..gate.len() {
        let (value, slope) = value_and_slope(gate[i], act);
        dgate[i] = dy[i] * up[i] * slope;
        dup[i] = dy[i] * value;
    }
}

fn value_and_slope(x: f32, act: GluActivation) -> (f32, f32) {
    match act {
        GluActivation::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            (x * s, s + x * s * (1.0 - s))
        }
        GluActivation::GeluTanh | GluActivation::Gelu => {
            let (c, a) = (0.797_884_6_f32, 0.044_715_f32);
            let s = 1.0 / (1.0 + (-2.0 * c * (x + a * x * x * x)).exp());
            (x * s, s + x * s * (1.0 - s) * 2.0 * c * (1.0 + 3.0 * a * x * x))
        }
    }
}
