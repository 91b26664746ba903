//! Log-probabilities of chosen tokens under a linear head, and their gradients, without ever
//! holding the logits of more than a few rows.
//!
//! `l = inv_temperature cap(h W^T)`, `cap(z) = c tanh(z / c)`, `logp = l[token] - lse(l)`, where a
//! row may have a rule of its own (`logp_rule`). Rows are batch-invariant: neither the chunks nor the
//! threads change a bit.

use super::dispatch::CpuLevel;
pub use super::logp_row::RowStats;
use super::logp_row::{Pull, gradient_row, squash};
pub use super::logp_rule::{RowRule, penalise};
use super::matmul::{MatmulPrecision, matmul, matmul_input_grad};
use super::pack::PackedMatrix;
use super::parallel::{for_each, map};
use super::slices::room;

/// Bytes of logits held at a time: they stay in the third-level cache between the passes over them.
const SCRATCH_BYTES: usize = 24 << 20;

/// Rows whose logits are held at a time.
pub fn chunk_rows(vocabulary: usize) -> usize {
    (SCRATCH_BYTES / (vocabulary.max(1) * size_of::<f32>())).max(1)
}

/// A token whose log-probability is wanted at a row. Lists are sorted by row; several targets may
/// share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row of `h`.
    pub row: u32,
    /// Token id below V.
    pub token: u32,
}

/// How logits become a distribution.
#[derive(Clone, Copy, Debug)]
pub struct LogpOptions<'a> {
    /// One over the sampling temperature; positive.
    pub inv_temperature: f32,
    /// `c` of `c tanh(z / c)`, applied before penalty and temperature.
    pub softcap: Option<f32>,
    /// Divides positive and multiplies negative logits of the tokens that a row's rule names.
    pub repetition_penalty: f32,
    /// The rule of each row; empty = no row has one.
    pub rules: &'a [RowRule],
    /// Whether the entropy of each row is wanted.
    pub entropy: bool,
    /// How the products with the head are computed.
    pub precision: MatmulPrecision,
}

impl Default for LogpOptions<'_> {
    fn default() -> Self {
        LogpOptions {
            inv_temperature: 1.0,
            softcap: None,
            repetition_penalty: 1.0,
            rules: &[],
            entropy: false,
            precision: MatmulPrecision::Highest,
        }
    }
}

/// Results of the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct LogpForward {
    /// Natural log-probability of each target.
    pub logp: Vec<f32>,
    /// Log of the sum of exponentials, of each row.
    pub lse: Vec<f32>,
    /// Entropy in nats of each row, where it was asked for.
    pub entropy: Option<Vec<f32>>,
    /// The likeliest token of each row, the first of equals.
    pub argmax: Vec<u32>,
}

/// Log-probabilities of `targets` at the rows `h [N, D]` under `head [V, D]`. Panics if lengths
/// disagree or a target is out of range or out of order.
pub fn forward(
    h: &[f32],
    head: &PackedMatrix,
    targets: &[Target],
    options: LogpOptions,
) -> LogpForward {
    let job = Job::new(h, head, targets, options);
    let mut result = job.empty_result();
    job.chunks(|job, chunk, logits| {
        let read = job.for_rows(&chunk, logits, |at, row| job.read_row(at, row));
        job.keep(chunk, read, &mut result);
    });
    result
}

/// [`forward`], and in the same pass `dh [N, D]`, the gradient of `sum of weights * logp`, and of
/// `sum of dentropy * entropy` over rows if there is such (overwritten): two products instead of three.
pub fn forward_backward(
    h: &[f32],
    head: &PackedMatrix,
    (targets, weights): (&[Target], &[f32]),
    dentropy: Option<&[f32]>,
    options: LogpOptions,
    dh: &mut [f32],
) -> LogpForward {
    assert!(weights.len() == targets.len() && dh.len() == h.len(), "log-prob lengths disagree");
    let job = Job::new(h, head, targets, options);
    assert!(dentropy.is_none_or(|d| d.len() == job.rows), "entropy lengths disagree");
    let mut result = job.empty_result();
    job.chunks(|job, chunk, logits| {
        let read = job.for_rows(&chunk, logits, |at, row| {
            let read = job.read_row(at, row);
            let (lse, entropy) = (read.stats.lse(), read.stats.entropy as f32);
            job.pull_row(at, row, weights, (lse, entropy, dentropy));
            read
        });
        job.pull_chunk(&chunk, logits, dh);
        job.keep(chunk, read, &mut result);
    });
    result
}

/// `dh [N, D]` (overwritten) of a loss whose gradients are `dlogp` at each target and, if it
/// holds entropies, `dentropy` at each row; `lse` is that of [`forward`] with the same arguments.
/// Recomputes the logits.
#[allow(clippy::too_many_arguments)] // forward's four, its result, two gradients in and one out
pub fn backward(
    h: &[f32],
    head: &PackedMatrix,
    targets: &[Target],
    lse: &[f32],
    dlogp: &[f32],
    dentropy: Option<&[f32]>,
    options: LogpOptions,
    dh: &mut [f32],
) {
    assert!(dlogp.len() == targets.len() && dh.len() == h.len(), "log-prob lengths disagree");
    let job = Job::new(h, head, targets, options);
    assert!(lse.len() == job.rows && dentropy.is_none_or(|d| d.len() == job.rows));
    job.chunks(|job, chunk, logits| {
        job.for_rows(&chunk, logits, |at, row| {
            let rule = RowRule::of(options.rules, at);
            let entropy = match dentropy {
                Some(_) => RowStats::of(row, &options, rule).entropy as f32,
                None => {
                    squash(CpuLevel::detect(), row, &options, rule);
                    0.0
                }
            };
            job.pull_row(at, row, dlogp, (lse[at], entropy, dentropy));
        });
        job.pull_chunk(&chunk, logits, dh);
    });
}

/// Bounds raw logits `[N, V]` to `cap tanh(z / cap)` in place.
pub fn cap(logits: &mut [f32], tokens: usize, cap: f32) {
    let options = LogpOptions { softcap: Some(cap), ..LogpOptions::default() };
    let none = RowRule::default();
    for_each(logits.chunks_mut(tokens), |row| squash(CpuLevel::detect(), row, &options, &none));
}

/// A checked call.
pub(super) struct Job<'a> {
    h: &'a [f32],
    head: &'a PackedMatrix,
    targets: &'a [Target],
    options: LogpOptions<'a>,
    pub rows: usize,
}

/// What is read of a row of logits: its statistics, and the log-probs of its targets.
struct Read {
    stats: RowStats,
    logps: Vec<f32>,
}

/// A range of rows, or of targets.
type Rows = std::ops::Range<usize>;

impl<'a> Job<'a> {
    pub(super) fn new(
        h: &'a [f32],
        head: &'a PackedMatrix,
        targets: &'a [Target],
        options: LogpOptions<'a>,
    ) -> Self {
        let rows = h.len() / head.in_features();
        assert!(h.len() == rows * head.in_features(), "hidden states are not [N, D]");
        assert!(targets.is_sorted_by_key(|t| t.row), "targets are not sorted by row");
        assert!(targets.last().is_none_or(|t| (t.row as usize) < rows), "target row too large");
        let tokens = head.out_features();
        assert!(targets.iter().all(|t| (t.token as usize) < tokens), "target token too large");
        assert!(options.inv_temperature > 0.0, "temperature is not positive");
        assert!([0, rows].contains(&options.rules.len()), "rules are not one a row");
        Self { h, head, targets, options, rows }
    }

    fn empty_result(&self) -> LogpForward {
        LogpForward {
            logp: vec![0.0; self.targets.len()],
            lse: vec![0.0; self.rows],
            entropy: self.options.entropy.then(|| vec![0.0; self.rows]),
            argmax: vec![0; self.rows],
        }
    }

    /// Calls `work` with each chunk of rows and its raw logits.
    fn chunks(&self, mut work: impl FnMut(&Self, Rows, &mut [f32])) {
        let (d, v) = (self.head.in_features(), self.head.out_features());
        let most = chunk_rows(v).min(self.rows.max(1));
        let mut logits = room(most * v);
        for start in (0..self.rows).step_by(most) {
            let chunk = start..(start + most).min(self.rows);
            let logits = &mut logits[..chunk.len() * v];
            let h = &self.h[chunk.start * d..chunk.end * d];
            matmul(h, self.head, None, self.options.precision, logits);
            work(self, chunk, logits);
        }
    }

    /// The targets of rows `chunk`, as a range of the list.
    pub(super) fn targets_of(&self, chunk: Rows) -> Rows {
        let before = |row: usize| self.targets.partition_point(|t| (t.row as usize) < row);
        before(chunk.start)..before(chunk.end)
    }

    /// Turns row `at` of the raw logits into `l` and reads it.
    fn read_row(&self, at: usize, row: &mut [f32]) -> Read {
        let stats = RowStats::of(row, &self.options, RowRule::of(self.options.rules, at));
        let targets = self.targets[self.targets_of(at..at + 1)].iter();
        let logps = targets.map(|target| stats.logp(row[target.token as usize])).collect();
        Read { stats, logps }
    }

    /// Fills in the chunk's part of `result`.
    fn keep(&self, chunk: Rows, read: Vec<Read>, result: &mut LogpForward) {
        let targets = self.targets_of(chunk.clone());
        let logps = read.iter().flat_map(|read| &read.logps);
        result.logp[targets].iter_mut().zip(logps).for_each(|(to, logp)| *to = *logp);
        for (row, Read { stats, .. }) in chunk.zip(&read) {
            result.lse[row] = stats.lse();
            result.argmax[row] = stats.argmax;
            if let Some(entropy) = &mut result.entropy {
                entropy[row] = stats.entropy as f32;
            }
        }
    }

    /// Turns row `at` of `l` into the gradient of the raw logits, given the weights of all targets, the
    /// row's log of the sum of exponentials and its entropy, and the gradients of all entropies.
    fn pull_row(
        &self,
        at: usize,
        row: &mut [f32],
        weights: &[f32],
        (lse, entropy, dentropy): (f32, f32, Option<&[f32]>),
    ) {
        let of_row = self.targets_of(at..at + 1);
        let weight = weights[of_row.clone()].iter().sum();
        let pull = Pull { lse, weight, dentropy: dentropy.map_or(0.0, |d| d[at]), entropy };
        let targets = of_row.map(|i| (self.targets[i].token as usize, weights[i]));
        let rule = RowRule::of(self.options.rules, at);
        gradient_row(CpuLevel::detect(), row, &self.options, rule, pull, targets);
    }

    /// Turns the gradient of the chunk's raw logits into rows of `dh`.
    fn pull_chunk(&self, chunk: &Rows, logits: &[f32], dh: &mut [f32]) {
        let d = self.head.in_features();
        let dh = &mut dh[chunk.start * d..chunk.end * d];
        matmul_input_grad(logits, self.head, self.options.precision, dh);
    }

    /// The results of `work` on each row of the chunk, given its place among all rows.
    fn for_rows<R: Send>(
        &self,
        chunk: &Rows,
        logits: &mut [f32],
        work: impl Fn(usize, &mut [f32]) -> R + Sync + Send,
    ) -> Vec<R> {
        let rows = chunk.clone().zip(logits.chunks_mut(self.head.out_features()));
        map(rows, |(at, row)| work(at, row))
    }
}
