//! Gradients of log-probs where the statistics of the rows are known, those of the distributions that the
//! tokens were drawn from: the vocabulary then goes by in slices, and logits never leave the cache.

use super::dispatch::CpuLevel;
use super::logp::{Job, LogpOptions, RowStats, Target};
use super::logp_row::{Pull, gradient_slice, squash};
use super::logp_rule::RowRule;
use super::matmul::{K_SPAN, matmul, matmul_input_grad_of_outputs, matmul_of_outputs};
use super::pack::PackedMatrix;
use super::parallel::{for_each, map};
use super::slices::room;

/// Rows whose logits are held at a time, of [`K_SPAN`] tokens.
const ROWS: usize = 256;

/// What the rows turn out to be.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownForward {
    /// Natural log-probability of each target.
    pub logp: Vec<f32>,
    /// Sum of the probabilities of each row: 1 but for rounding, if the statistics are its own.
    pub mass: Vec<f32>,
}

/// The gradient `dh [N, D]` (overwritten) of `sum of weights * logp`, and of `sum of dentropy * entropy` over
/// rows if there is such, with the bits of [`forward_backward`](super::logp::forward_backward), given the
/// statistics of each row. Panics if lengths disagree or a row has a rule of its own.
pub fn backward_known(
    h: &[f32],
    head: &PackedMatrix,
    (targets, weights): (&[Target], &[f32]),
    (stats, dentropy): (&[RowStats], Option<&[f32]>),
    options: LogpOptions,
    dh: &mut [f32],
) -> KnownForward {
    assert!(weights.len() == targets.len() && dh.len() == h.len(), "log-prob lengths disagree");
    assert!(options.rules.is_empty(), "a row has a rule of its own");
    let job = Job::new(h, head, targets, options);
    assert!(stats.len() == job.rows && dentropy.is_none_or(|d| d.len() == job.rows));
    let (d, v) = (head.in_features(), head.out_features());
    let mut result = KnownForward { logp: vec![0.0; targets.len()], mass: vec![0.0; job.rows] };
    let mut logits = room(ROWS.min(job.rows) * K_SPAN.min(v));
    let (level, none) = (CpuLevel::detect(), RowRule::default());
    for start in (0..job.rows).step_by(ROWS) {
        let rows = start..(start + ROWS).min(job.rows);
        let (h, dh) = (&h[start * d..rows.end * d], &mut dh[start * d..rows.end * d]);
        for first in (0..v).step_by(K_SPAN) {
            let slice = first..(first + K_SPAN).min(v);
            let logits = &mut logits[..rows.len() * slice.len()];
            matmul_of_outputs(h, (head, slice.clone()), options.precision, logits);
            let read = map(rows.clone().zip(logits.chunks_mut(slice.len())), |(at, row)| {
                squash(level, row, &options, &none);
                let of_row = job.targets_of(at..at + 1);
                let pull = Pull {
                    lse: stats[at].lse(),
                    weight: weights[of_row.clone()].iter().sum(),
                    dentropy: dentropy.map_or(0.0, |d| d[at]),
                    entropy: stats[at].entropy as f32,
                };
                let here = of_row.filter(|i| slice.contains(&(targets[*i].token as usize)));
                let hits: Vec<_> =
                    here.map(|i| (i, targets[i].token as usize - slice.start)).collect();
                let logps: Vec<_> =
                    hits.iter().map(|(i, token)| (*i, stats[at].logp(row[*token]))).collect();
                let hits = hits.into_iter().map(|(i, token)| (token, weights[i]));
                (gradient_slice(level, row, &options, pull, hits), logps)
            });
            for (at, (mass, logps)) in rows.clone().zip(read) {
                result.mass[at] += mass;
                logps.into_iter().for_each(|(i, logp)| result.logp[i] = logp);
            }
            matmul_input_grad_of_outputs(logits, (head, slice), options.precision, dh);
        }
    }
    result
}

/// The gradient `dh [N, D]` (overwritten) of the log-prob of each row's `drawn` token, with the bits of
/// [`backward_known`] for a target of weight 1 a row, given the head's transpose, the logits `l [N, V]` as the
/// options have made them (overwritten), and their statistics. Panics if lengths disagree.
pub fn backward_drawn(
    l: &mut [f32],
    transposed: &PackedMatrix,
    drawn: &[(u32, RowStats)],
    options: LogpOptions,
    dh: &mut [f32],
) {
    assert!(l.len() == drawn.len() * transposed.in_features(), "logits are not [N, V]");
    let level = CpuLevel::detect();
    for_each(l.chunks_mut(transposed.in_features()).zip(drawn), |(row, (token, stats))| {
        let (lse, entropy) = (stats.lse(), stats.entropy as f32);
        let pull = Pull { lse, weight: 1.0, dentropy: 0.0, entropy };
        gradient_slice(level, row, &options, pull, std::iter::once((*token as usize, 1.0)));
    });
    matmul(l, transposed, None, options.precision, dh);
}
