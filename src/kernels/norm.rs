//! Root-mean-square normalisation and element-wise sums, by rows.

/// `y = x * rsqrt(mean(x²) + eps) * weight` for each row of `x`, `[N, weight.len()]`; with
/// `plus_one` the factor is `1 + weight`, as Gemma stores it.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, plus_one: bool, y: &mut [f32]) {
    let d = weight.len();
    for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
        let r = inverse_rms(x, eps);
        for i in 0..d {
            y[i] = x[i] * r * (weight[i] + if plus_one { 1.0 } else { 0.0 });
        }
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32 + eps).sqrt().recip()
}

/// Gradient of [`rms_norm`] to `x` into `dx`; the weight is frozen.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    plus_one: bool,
    dy: &[f32],
    dx: &mut [f32],
) {
    let d = weight.len();
    for ((x, dy), dx) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
        let r = inverse_rms(x, eps);
        let w = |i: usize| weight[i] + if plus_one { 1.0 } else { 0.0 };
        let sum: f32 = (0..d).map(|i| dy[i] * w(i) * x[i]).sum();
        for i in 0..d {
            dx[i] = r * (dy[i] * w(i) - x[i] * (sum * r * r / d as f32));
        }
    }
}

/// `y += x`.
pub fn add_assign(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

/// `y += a * x`, each element rounded once.
pub fn scale_add(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = a.mul_add(*x, *y));
}
