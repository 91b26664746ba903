//! The promises of the fused log-prob: right to f64 and to finite differences, same bits in any
//! batch, both ways to the gradient equal.

use super::logp::{
    LogpForward, LogpOptions, RowRule, RowStats, Target, backward, forward, forward_backward,
};
use super::logp_known::{backward_drawn, backward_known};
use super::matmul::{MatmulPrecision, matmul};
use super::pack::PackedMatrix;
use super::testing::{noise, relative_error, with_threads};

const D: usize = 24;
const V: usize = 2100;

/// Rows 1 and 4 have two targets, row 2 has none.
const TARGETS: [Target; 7] = [
    Target { row: 0, token: 5 },
    Target { row: 1, token: 0 },
    Target { row: 1, token: 2099 },
    Target { row: 3, token: 1000 },
    Target { row: 4, token: 17 },
    Target { row: 4, token: 17 },
    Target { row: 5, token: 16 },
];
const ROWS: usize = 6;

/// Row 0 has a penalty on its target and others, row 1 keeps few tokens, row 4 both.
fn rules() -> Vec<RowRule> {
    let mut rules = vec![RowRule::default(); ROWS];
    rules[0].penalised = vec![5, 6, 900];
    rules[1].kept = vec![0, 7, 8, 30, 2099];
    rules[4] = RowRule { penalised: vec![3, 17], kept: vec![3, 4, 17, 2000] };
    rules
}

fn all_options(rules: &[RowRule]) -> Vec<LogpOptions<'_>> {
    let mut list = Vec::new();
    for softcap in [None, Some(3.0)] {
        for inv_temperature in [1.0, 0.7] {
            let plain =
                LogpOptions { inv_temperature, softcap, entropy: true, ..Default::default() };
            list.extend([plain, LogpOptions { repetition_penalty: 1.3, rules, ..plain }]);
        }
    }
    list
}

fn head() -> PackedMatrix {
    PackedMatrix::from_f32(&noise(1, V * D), V, D)
}

/// Log-probabilities, entropies and log-sums of a row in f64.
struct Exact {
    logp: Vec<f64>,
    entropy: f64,
    lse: f64,
    slope: Vec<f64>,
}

fn exact_row(h: &[f64], w: &[f32], options: &LogpOptions, row: usize) -> Exact {
    let (inv, penalty) =
        (f64::from(options.inv_temperature), f64::from(options.repetition_penalty));
    let rule = RowRule::of(options.rules, row);
    let raw = w.chunks(D).map(|w| w.iter().zip(h).map(|(w, h)| f64::from(*w) * h).sum::<f64>());
    let (l, slope): (Vec<f64>, Vec<f64>) = raw
        .enumerate()
        .map(|(token, z)| {
            let (l, slope) = match options.softcap.map(f64::from) {
                None => (z * inv, inv),
                Some(c) => ((z / c).tanh() * c * inv, inv * (1.0 - (z / c).tanh().powi(2))),
            };
            let factor = if z < 0.0 { penalty } else { 1.0 / penalty };
            let factor = if rule.penalised.contains(&(token as u32)) { factor } else { 1.0 };
            let out = !rule.kept.is_empty() && !rule.kept.contains(&(token as u32));
            (if out { f64::NEG_INFINITY } else { l * factor }, slope * factor)
        })
        .unzip();
    let lse = l.iter().map(|l| l.exp()).sum::<f64>().ln();
    let logp: Vec<f64> = l.iter().map(|l| l - lse).collect();
    let some = logp.iter().filter(|p| p.is_finite());
    let entropy = -some.map(|p| p.exp() * p).sum::<f64>();
    Exact { logp, entropy, lse, slope }
}

/// `dh` of `sum weights logp + sum dentropy H` in f64.
fn exact_gradient(h: &[f32], weights: &[f32], dentropy: &[f32], options: &LogpOptions) -> Vec<f64> {
    let w = head().unpack();
    let mut dh = Vec::new();
    for (row, h) in h.chunks(D).enumerate() {
        let h: Vec<f64> = h.iter().map(|&x| f64::from(x)).collect();
        let exact = exact_row(&h, &w, options, row);
        let mut g = vec![0.0; V];
        for (v, g) in g.iter_mut().enumerate() {
            let p = exact.logp[v].exp();
            let log = if p > 0.0 { exact.logp[v] } else { 0.0 };
            *g = -f64::from(dentropy[row]) * p * (log + exact.entropy);
            for (target, weight) in TARGETS.iter().zip(weights) {
                if target.row as usize == row {
                    let hit = if target.token as usize == v { 1.0 } else { 0.0 };
                    *g += f64::from(*weight) * (hit - p);
                }
            }
            *g *= exact.slope[v];
        }
        dh.extend((0..D).map(|j| (0..V).map(|v| g[v] * f64::from(w[v * D + j])).sum::<f64>()));
    }
    dh
}

/// The loss whose gradient is [`exact_gradient`].
fn exact_loss(h: &[f64], weights: &[f32], dentropy: &[f32], options: &LogpOptions) -> f64 {
    let w = head().unpack();
    let rows = h.chunks(D).enumerate();
    let rows: Vec<Exact> = rows.map(|(i, h)| exact_row(h, &w, options, i)).collect();
    let of_targets = TARGETS.iter().zip(weights).map(|(target, weight)| {
        f64::from(*weight) * rows[target.row as usize].logp[target.token as usize]
    });
    let of_rows = rows.iter().zip(dentropy).map(|(row, d)| f64::from(*d) * row.entropy);
    of_targets.sum::<f64>() + of_rows.sum::<f64>()
}

#[test]
fn the_reference_gradient_is_the_slope_of_the_reference_loss() {
    let (h, weights, dentropy) = (noise(2, ROWS * D), noise(3, TARGETS.len()), noise(4, ROWS));
    for options in all_options(&rules()) {
        let dh = exact_gradient(&h, &weights, &dentropy, &options);
        for at in [0, D + 3, 2 * D, 4 * D + 7] {
            let loss = |step: f64| {
                let mut h: Vec<f64> = h.iter().map(|&x| f64::from(x)).collect();
                h[at] += step;
                exact_loss(&h, &weights, &dentropy, &options)
            };
            let slope = (loss(1e-5) - loss(-1e-5)) / 2e-5;
            assert!((slope - dh[at]).abs() < 1e-6, "{slope} {}", dh[at]);
        }
    }
}

#[test]
fn forward_agrees_with_f64() {
    let (head, h) = (head(), noise(2, ROWS * D));
    let w = head.unpack();
    for options in all_options(&rules()) {
        let got = forward(&h, &head, &TARGETS, options);
        let wide: Vec<f64> = h.iter().map(|&x| f64::from(x)).collect();
        let rows = wide.chunks(D).enumerate();
        let rows: Vec<Exact> = rows.map(|(i, h)| exact_row(h, &w, &options, i)).collect();
        for (target, logp) in TARGETS.iter().zip(&got.logp) {
            let want = rows[target.row as usize].logp[target.token as usize];
            assert!((f64::from(*logp) - want).abs() < 2e-6, "{logp} {want}");
        }
        for (i, row) in rows.iter().enumerate() {
            assert!((f64::from(got.lse[i]) - row.lse).abs() < 2e-6);
            assert!((f64::from(got.entropy.as_ref().unwrap()[i]) - row.entropy).abs() < 5e-6);
            let best = (0..V).max_by(|&a, &b| row.logp[a].total_cmp(&row.logp[b])).unwrap();
            assert_eq!(got.argmax[i] as usize, best);
        }
    }
}

#[test]
fn gradients_agree_with_f64_both_ways() {
    let (head, h) = (head(), noise(2, ROWS * D));
    let (weights, dentropy) = (noise(3, TARGETS.len()), noise(4, ROWS));
    for options in all_options(&rules()) {
        let (mut once, mut later) = (vec![0.0; h.len()], vec![0.0; h.len()]);
        let got = forward_backward(&h, &head, (&TARGETS, &weights), None, options, &mut once);
        assert_eq!(got, forward(&h, &head, &TARGETS, options));
        backward(&h, &head, &TARGETS, &got.lse, &weights, None, options, &mut later);
        assert_eq!(once, later);
        let want = exact_gradient(&h, &weights, &[0.0; ROWS], &options);
        assert!(relative_error(&once, &want) < 1e-5);

        let pull = Some(&dentropy[..]);
        backward(&h, &head, &TARGETS, &got.lse, &weights, pull, options, &mut later);
        let want = exact_gradient(&h, &weights, &dentropy, &options);
        assert!(relative_error(&later, &want) < 1e-5);
        forward_backward(&h, &head, (&TARGETS, &weights), pull, options, &mut once);
        assert_eq!(once, later);
    }
}

#[test]
fn rows_do_not_depend_on_the_batch_the_chunks_or_the_threads() {
    let (v, d, n) = (49_000, 16, 400);
    let (w, h) = (noise(1, v * d), noise(2, n * d));
    let head = PackedMatrix::from_f32_as_bf16(&w, v, d);
    let target = |row: u32| Target { row, token: row * 100 };
    let targets: Vec<Target> = (0..n as u32).map(target).collect();
    let options = LogpOptions { entropy: true, ..Default::default() };
    let weights = vec![1.0; n];
    let mut dh = vec![0.0; n * d];
    let all = with_threads(1, || {
        forward_backward(&h, &head, (&targets, &weights), None, options, &mut dh)
    });
    for (first, last) in [(0, 1), (169, 172), (100, 300)] {
        let part: Vec<Target> = (first..last)
            .map(|row| Target { row: (row - first) as u32, ..target(row as u32) })
            .collect();
        let h = &h[first * d..last * d];
        let mut part_dh = vec![0.0; h.len()];
        let got: LogpForward = with_threads(2, || {
            forward_backward(h, &head, (&part, &weights[..part.len()]), None, options, &mut part_dh)
        });
        assert!(got.logp == all.logp[first..last] && got.lse == all.lse[first..last]);
        assert!(got.entropy.unwrap() == all.entropy.as_ref().unwrap()[first..last]);
        assert!(part_dh == dh[first * d..last * d]);
    }
}

#[test]
fn nan_is_not_hidden_and_no_rows_give_no_results() {
    let head = head();
    let mut h = noise(2, 2 * D);
    h[3] = f32::NAN;
    let targets = [Target { row: 0, token: 1 }, Target { row: 1, token: 1 }];
    let got = forward(&h, &head, &targets, LogpOptions::default());
    assert!(got.logp[0].is_nan() && got.logp[1].is_finite());
    assert!(forward(&[], &head, &[], LogpOptions::default()).logp.is_empty());
}

/// The statistics of all rows of h, and what [`forward_backward`] and [`backward_known`] say of it.
fn known_and_not(
    (h, head): (&[f32], &PackedMatrix),
    (targets, weights): (&[Target], &[f32]),
    dentropy: Option<&[f32]>,
    options: LogpOptions,
) -> Vec<RowStats> {
    let v = head.out_features();
    let mut logits = vec![0.0; h.len() / head.in_features() * v];
    matmul(h, head, None, options.precision, &mut logits);
    let none = RowRule::default();
    let of_row = |row: &mut [f32]| RowStats::of(row, &options, &none);
    let stats: Vec<RowStats> = logits.chunks_mut(v).map(of_row).collect();
    let (mut dh, mut known_dh) = (vec![0.0; h.len()], vec![f32::NAN; h.len()]);
    let of = (targets, weights);
    let said = forward_backward(h, head, of, dentropy, options, &mut dh);
    let known = backward_known(h, head, of, (&stats, dentropy), options, &mut known_dh);
    assert!(known_dh == dh && known.logp == said.logp, "{} rows, {options:?}", stats.len());
    assert!(known.mass.iter().all(|mass| (mass - 1.0).abs() < 1e-5));
    stats
}

#[test]
fn known_statistics_give_the_same_bits_at_every_precision_and_others_show() {
    const MANY: usize = 4100;
    let heads = [head(), PackedMatrix::from_f32_as_bf16(&noise(1, MANY * D), MANY, D)];
    for (head, rows) in heads.iter().flat_map(|head| [1, 5, 8, 20, 300].map(|rows| (head, rows))) {
        let v = head.out_features() as u32;
        let target = |row: u32| Target { row, token: (row * 977 + 2047) % v };
        let targets: Vec<Target> = (0..rows).filter(|row| row % 7 != 3).map(target).collect();
        let (h, weights) = (noise(2, rows as usize * D), noise(3, targets.len()));
        let dentropy = noise(4, rows as usize);
        for precision in [MatmulPrecision::Highest, MatmulPrecision::High, MatmulPrecision::Medium]
        {
            for plain in all_options(&[]).into_iter().step_by(2) {
                let options = LogpOptions { precision, ..plain };
                let of = (&targets[..], &weights[..]);
                known_and_not((&h, head), of, None, options);
                let mut stats = known_and_not((&h, head), of, Some(&dentropy), options);
                stats[rows as usize - 1].log_sum += 0.01;
                let mut dh = vec![0.0; h.len()];
                let known = backward_known(&h, head, of, (&stats, None), options, &mut dh);
                assert!((known.mass[rows as usize - 1] - 1.0).abs() > 5e-3);
            }
        }
    }
}

#[test]
fn gradients_of_drawn_tokens_have_the_bits_of_targets_of_weight_one() {
    const MANY: usize = 4100;
    let f32_head = PackedMatrix::from_f32(&noise(1, MANY * D), MANY, D);
    let heads = [head(), f32_head, PackedMatrix::from_f32_as_bf16(&noise(1, MANY * D), MANY, D)];
    for (head, rows) in heads.iter().flat_map(|head| [1, 8, 20, 70].map(|rows| (head, rows))) {
        let (v, turned) = (head.out_features(), head.transposed());
        let token = |row: usize| ((row * 977 + 2047) % v) as u32;
        let target = |row: usize| Target { row: row as u32, token: token(row) };
        let targets: Vec<Target> = (0..rows).map(target).collect();
        let (h, ones) = (noise(2, rows * D), vec![1.0; rows]);
        for precision in [MatmulPrecision::Highest, MatmulPrecision::High, MatmulPrecision::Medium]
        {
            for plain in all_options(&[]).into_iter().step_by(2) {
                let options = LogpOptions { precision, ..plain };
                let mut l = vec![0.0; rows * v];
                matmul(&h, head, None, precision, &mut l);
                let of_row = |row: &mut [f32]| RowStats::of(row, &options, &RowRule::default());
                let stats: Vec<RowStats> = l.chunks_mut(v).map(of_row).collect();
                let drawn: Vec<_> = (0..rows).map(|row| (token(row), stats[row])).collect();
                let (mut dh, mut known) = (vec![f32::NAN; h.len()], vec![f32::NAN; h.len()]);
                backward_drawn(&mut l, &turned, &drawn, options, &mut dh);
                let of = (&targets[..], &ones[..]);
                backward_known(&h, head, of, (&stats, None), options, &mut known);
                assert!(dh == known, "{rows} rows, {options:?}");
            }
        }
    }
}
