//! The output head: logits where they are asked for, and log-probs that never materialise [N, V].

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Engine, host};
use super::linear::linear;
use super::norm::rms_norm;
use super::rows::gather_rows;
use super::tape::{Sink, Tape};
use super::value::Value;
use super::weight::Weight;
use crate::kernels::logp::{self, LogpForward, LogpOptions, RowRule, RowStats, Target};
use crate::kernels::logp_known::{KnownForward, backward_drawn, backward_known};
use crate::kernels::matmul::matmul;
use crate::kernels::matmul_rounded::{self, Rounded};
use crate::kernels::norm;
use crate::kernels::pack::PackedMatrix;
use crate::kernels::slices::room;
use crate::{Error, Result};

/// What the head says about a list of targets.
#[derive(Clone, Debug, Default)]
pub struct Logps {
    /// log p(token | row) of each target.
    pub logps: Vec<f32>,
    /// Entropy of each row's distribution, in nats.
    pub entropy: Vec<f32>,
    /// The most likely token of each row.
    pub argmax: Vec<u32>,
    /// The sum of each row's probabilities under the statistics that were given, 1 but for rounding if they are
    /// its own; empty where none were.
    pub mass: Vec<f32>,
}

impl Logps {
    fn new(forward: LogpForward) -> Self {
        let entropy = forward.entropy.unwrap_or_default();
        Logps { logps: forward.logp, entropy, argmax: forward.argmax, mass: Vec::new() }
    }

    fn known(stats: &[RowStats], KnownForward { logp, mass }: KnownForward) -> Self {
        let entropy = stats.iter().map(|stats| stats.entropy as f32).collect();
        Logps { logps: logp, entropy, argmax: stats.iter().map(|s| s.argmax).collect(), mass }
    }

    fn extend(&mut self, other: Logps) {
        self.logps.extend(other.logps);
        self.entropy.extend(other.entropy);
        self.argmax.extend(other.argmax);
        self.mass.extend(other.mass);
    }
}

/// How the logits of rows become the distributions that tokens are drawn from.
#[derive(Clone, Copy, Debug)]
pub struct Distribution<'a> {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// Divides positive and multiplies negative logits of the tokens that a rule names.
    pub repetition_penalty: f64,
    /// The rule of each distinct row of the targets, in order; empty = no row has one.
    pub rules: &'a [RowRule],
    /// The statistics of each distinct row, where they are known beforehand, as those of sampling are; no row
    /// then has a rule. Empty = unknown.
    pub stats: &'a [RowStats],
    /// What [`Head::drawn_gradients`] gave when the targets were drawn, from which the gradient of a loss without
    /// entropies follows: the head is then not computed. Ignored otherwise, and where the statistics are unknown.
    pub taken: Option<Taken<'a>>,
}

/// What is known of targets since they were drawn.
#[derive(Clone, Copy, Debug)]
pub struct Taken<'a> {
    /// The gradient `[D]` of each target's log-prob in its row, normed.
    pub gradients: &'a [&'a [f32]],
    /// The log-probs.
    pub logps: &'a [f32],
}

impl Default for Distribution<'_> {
    fn default() -> Self {
        let (temperature, repetition_penalty) = (1.0, 1.0);
        Distribution { temperature, repetition_penalty, rules: &[], stats: &[], taken: None }
    }
}

/// What a loss, linear in log-probs and entropies, is made of.
#[derive(Clone, Copy, Debug)]
pub struct Pull<'a> {
    /// The tokens whose log-probs it holds, sorted by their row of h.
    pub targets: &'a [Target],
    /// The factor of each log-prob.
    pub weights: &'a [f32],
    /// The factor of the entropy of each distinct row of the targets; none without entropies.
    pub dentropy: Option<&'a [f32]>,
}

/// The frozen end of a policy: the last norm, and the head, whose logits may be capped.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// Weight `[D]` of the norm.
    pub norm: &'a Tensor,
    /// Addend under the norm's root.
    pub eps: f64,
    /// Whether the norm's factor is 1 + weight.
    pub plus_one: bool,
    /// The head, [V, D].
    pub weight: &'a Weight,
    /// c of c tanh(z / c).
    pub softcap: Option<f64>,
}

/// The head as [`Head::drawn_gradients`] reads it.
pub struct TransposedHead {
    weight: PackedMatrix,
    _rounded: Option<Rounded>,
}

impl Head<'_> {
    /// The head's transpose, with the bytes of the head once more, and of its integers if they are to stay
    /// rounded. On the CPU.
    ///
    /// # Errors
    /// Elsewhere.
    pub fn transposed(&self, engine: &Engine, keep_rounded: bool) -> Result<TransposedHead> {
        let Some(packed) = self.weight.packed().filter(|_| engine.fused()) else {
            return Err(Error::failure("gradients of drawn tokens want the kernels of the cpu"));
        };
        let weight = packed.transposed();
        let rounded =
            keep_rounded.then(|| matmul_rounded::keep_rounded(&weight, engine.precision()));
        Ok(TransposedHead { weight, _rounded: rounded.flatten() })
    }

    /// Logits [rows, V] = softcap(norm(h) Wᵀ) of some rows of h [N, D]; not recorded.
    pub fn logits(&self, engine: &Engine, h: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let normed = self.normed(&Tape::off(engine), &Value::constant(h.clone()), rows)?;
        let z = self.weight.apply(engine, normed.tensor(), None)?;
        Ok(capped(z, self.softcap.map(|cap| cap as f32))?)
    }

    /// [`Head::logits`] into a vector that keeps its memory from call to call.
    pub fn logits_into(
        &self,
        engine: &Engine,
        h: &Tensor,
        rows: &[u32],
        into: &mut Vec<f32>,
    ) -> Result<()> {
        let Some(packed) = self.weight.packed().filter(|_| engine.fused()) else {
            *into = self.logits(engine, h, rows)?.flatten_all()?.to_vec1()?;
            return Ok(());
        };
        let normed = self.normed(&Tape::off(engine), &Value::constant(h.clone()), rows)?;
        let tokens = packed.out_features();
        let _span = trace_span!("logits", flops = self.weight.flops(rows.len())).entered();
        into.resize(rows.len() * tokens, 0.0);
        matmul(&host(normed.tensor())?, packed, None, engine.precision(), into);
        if let Some(cap) = self.softcap {
            logp::cap(into, tokens, cap as f32);
        }
        Ok(())
    }

    /// The gradient of the log-prob of each row's drawn token in the row that the head reads, normed,
    /// [rows, D], given the logits as capped and divided by the temperature (overwritten), and their
    /// statistics: what [`Distribution::taken`] wants.
    pub fn drawn_gradients(
        &self,
        engine: &Engine,
        transposed: &TransposedHead,
        logits: &mut [f32],
        drawn: &[(u32, RowStats)],
        temperature: f64,
    ) -> Vec<f32> {
        let flops = self.weight.flops(drawn.len());
        let _span = trace_span!("drawn gradients", flops = flops).entered();
        let distribution = Distribution { temperature, ..Distribution::default() };
        let mut gradients = room(drawn.len() * transposed.weight.out_features());
        let options = self.options(engine, distribution);
        backward_drawn(logits, &transposed.weight, drawn, options, &mut gradients);
        gradients
    }

    /// sum over t of `weights[t]` * log p(targets`[t]`), and over rows of dentropy * entropy, as one
    /// number `[1]`, differentiable in h [N, D], a target's row being a row of h.
    ///
    /// The factors are known before the pass, so that it computes the gradient of h on its way: two
    /// products with the head instead of three, and nothing is kept of norm and logits. Returns the
    /// sum and what the head said.
    pub fn weighted_logps(
        &self,
        tape: &Tape,
        h: &Value,
        pull: Pull,
        distribution: Distribution,
    ) -> Result<(Value, Logps)> {
        let Some(packed) = self.weight.packed().filter(|_| tape.engine().fused()) else {
            return self.composed_weighted(tape, h, pull, distribution);
        };
        let tracked = tape.is_recording() && h.is_tracked();
        let products = match (distribution.taken, pull.dentropy) {
            (Some(_), None) if !distribution.stats.is_empty() && tracked => 0,
            _ => 1 + usize::from(tracked),
        };
        let flops = || products * self.weight.flops(pull.targets.len());
        let _span = trace_span!("weighted log-probs", flops = flops()).entered();
        let mut dh = vec![0f32; if tracked { h.tensor().elem_count() } else { 0 }];
        let (mut said, mut rest) = (Logps::default(), (pull, distribution));
        for rows in compact(pull.targets, rows_at_once(packed.out_features())) {
            let part = take(&mut rest, &rows);
            let dh = tracked.then_some(&mut dh[..]);
            said.extend(self.weigh(tape, h.tensor(), &rows, part, dh)?);
        }
        let sum = tape.engine().tensor(vec![total(&pull, &said)], &[1])?;
        let value = tape.push(sum, &[h], || {
            let (engine, shape) = (tape.engine().clone(), h.tensor().dims().to_vec());
            move |dy: Tensor, sink: &mut Sink| {
                let dy = dy.sum_all()?.to_scalar::<f32>()?;
                if dy != 1.0 {
                    dh.iter_mut().for_each(|dh| *dh *= dy);
                }
                sink.give(0, engine.tensor(dh, &shape)?)
            }
        });
        Ok((value, said))
    }

    /// What the head says about some rows of h; the gradient of their sum is added to `dh`.
    fn weigh(
        &self,
        tape: &Tape,
        h: &Tensor,
        Rows { rows, targets }: &Rows,
        (pull, distribution): (Pull, Distribution),
        dh: Option<&mut [f32]>,
    ) -> Result<Logps> {
        let Some(packed) = self.weight.packed() else { return Ok(Logps::default()) };
        let (h, w, d) = (host(h)?, host(self.norm)?, packed.in_features());
        let options = self.options(tape.engine(), distribution);
        let (eps, plus_one) = (self.eps as f32, self.plus_one);
        let picked: Vec<f32> =
            rows.iter().flat_map(|r| &h[*r as usize * d..][..d]).copied().collect();
        let mut x = room(picked.len());
        norm::rms_norm(&picked, &w, eps, plus_one, &mut x);
        let Some(dh) = dh else {
            return Ok(Logps::new(logp::forward(&x, packed, targets, options)));
        };
        let mut dx = room(x.len());
        let (weighted, dentropy) = ((&targets[..], pull.weights), pull.dentropy);
        let said = match (distribution.stats, dentropy, distribution.taken) {
            ([], _, _) => {
                Logps::new(logp::forward_backward(&x, packed, weighted, dentropy, options, &mut dx))
            }
            (stats, None, Some(Taken { gradients, logps })) => {
                add_weighted(weighted, gradients.iter().copied(), d, &mut dx);
                Logps::known(stats, KnownForward { logp: logps.to_vec(), mass: Vec::new() })
            }
            (stats, None, None) => {
                let (own, known) = own_gradients(&x, packed, targets, stats, options);
                add_weighted(weighted, own.chunks_exact(d), d, &mut dx);
                Logps::known(stats, known)
            }
            (stats, Some(_), _) => {
                let given = (stats, dentropy);
                Logps::known(stats, backward_known(&x, packed, weighted, given, options, &mut dx))
            }
        };
        let mut dpicked = x;
        norm::rms_norm_backward(&picked, &w, eps, plus_one, &dx, &mut dpicked);
        for (r, dpicked) in rows.iter().zip(dpicked.chunks_exact(d)) {
            let dh = &mut dh[*r as usize * d..][..d];
            dh.iter_mut().zip(dpicked).for_each(|(dh, x)| *dh += x);
        }
        Ok(said)
    }

    /// log p(target) of each target as a differentiable value `[targets]`, for losses whose weights
    /// depend on it; the backward pass recomputes the logits chunk by chunk.
    pub fn token_logps(
        &self,
        tape: &Tape,
        h: &Value,
        targets: &[Target],
    ) -> Result<(Value, Logps)> {
        let Rows { rows, targets } = compact(targets, usize::MAX).next().unwrap_or_default();
        let h = &self.normed(tape, h, &rows)?;
        let Some(packed) = self.weight.packed().filter(|_| tape.engine().fused()) else {
            let z = linear(tape, h, self.weight)?;
            return self.composed_logps(tape, &z, &targets, Distribution::default());
        };
        let options = self.options(tape.engine(), Distribution::default());
        let (rows, flops) = (rows.len(), self.weight.flops(rows.len()));
        let _span = trace_span!("log-probs", rows, flops).entered();
        let forward = logp::forward(&host(h.tensor())?, packed, &targets, options);
        let logps = tape.engine().tensor(forward.logp.clone(), &[targets.len()])?;
        let lse = forward.lse.clone();
        let value = tape.push(logps, &[h], || {
            let (engine, h, head) = (tape.engine().clone(), h.keep(), self.weight.clone());
            move |dy: Tensor, sink: &mut Sink| {
                let _span = trace_span!("log-probs backward", rows, flops = 2 * flops).entered();
                let h = h.tensor()?;
                let mut dh = vec![0f32; h.elem_count()];
                if let Some(packed) = head.packed() {
                    let (rows, dlogp) = (host(&h)?, host(&dy)?);
                    logp::backward(&rows, packed, &targets, &lse, &dlogp, None, options, &mut dh);
                }
                sink.give(0, engine.tensor(dh, h.dims())?)
            }
        });
        Ok((value, Logps::new(forward)))
    }

    pub(super) fn normed(&self, tape: &Tape, h: &Value, rows: &[u32]) -> Result<Value> {
        let picked = gather_rows(tape, h, rows)?;
        rms_norm(tape, &picked, self.norm, self.eps, self.plus_one)
    }

    fn options<'d>(&self, engine: &Engine, distribution: Distribution<'d>) -> LogpOptions<'d> {
        LogpOptions {
            inv_temperature: (1.0 / distribution.temperature) as f32,
            softcap: self.softcap.map(|cap| cap as f32),
            repetition_penalty: distribution.repetition_penalty as f32,
            rules: distribution.rules,
            entropy: true,
            precision: engine.precision(),
        }
    }
}

/// The part of a loss and of its distributions that belongs to `rows`, which come next.
fn take<'a>(
    (pull, distribution): &mut (Pull<'a>, Distribution<'a>),
    rows: &Rows,
) -> (Pull<'a>, Distribution<'a>) {
    let (targets, rest) = pull.targets.split_at(rows.targets.len());
    let (weights, other_weights) = pull.weights.split_at(rows.targets.len());
    let dentropy = pull.dentropy.map(|all| all.split_at(rows.rows.len()));
    let rules = distribution.rules.split_at(rows.rows.len().min(distribution.rules.len()));
    let part = Pull { targets, weights, dentropy: dentropy.map(|(part, _)| part) };
    *pull =
        Pull { targets: rest, weights: other_weights, dentropy: dentropy.map(|(_, rest)| rest) };
    let stats = distribution.stats.split_at(rows.rows.len().min(distribution.stats.len()));
    let taken = distribution.taken.map(|taken| taken.split_at(rows.targets.len()));
    let (first, others) = (taken.map(|(first, _)| first), taken.map(|(_, others)| others));
    let own = Distribution { rules: rules.0, stats: stats.0, taken: first, ..*distribution };
    (distribution.rules, distribution.stats, distribution.taken) = (rules.1, stats.1, others);
    (part, own)
}

impl<'a> Taken<'a> {
    fn split_at(self, targets: usize) -> (Self, Self) {
        let (gradients, other_gradients) = self.gradients.split_at(targets);
        let (logps, other_logps) = self.logps.split_at(targets);
        (Taken { gradients, logps }, Taken { gradients: other_gradients, logps: other_logps })
    }
}

/// The gradient of each target's log-prob in its row of `x`, normed, [targets, D], and what the rows turn out to be.
fn own_gradients(
    x: &[f32],
    head: &PackedMatrix,
    targets: &[Target],
    stats: &[RowStats],
    options: LogpOptions,
) -> (Vec<f32>, KnownForward) {
    let d = head.in_features();
    let row = |target: &Target| target.row as usize;
    let rows: Vec<f32> = targets.iter().flat_map(|t| &x[row(t) * d..][..d]).copied().collect();
    let stats: Vec<RowStats> = targets.iter().map(|target| stats[row(target)]).collect();
    let alone: Vec<Target> =
        (0..).zip(targets).map(|(row, target)| Target { row, ..*target }).collect();
    let (ones, mut gradients) = (vec![1.0; targets.len()], room(rows.len()));
    let mut known =
        backward_known(&rows, head, (&alone, &ones), (&stats, None), options, &mut gradients);
    let of_rows = targets.chunk_by(|a, b| a.row == b.row);
    let mut done = 0;
    let mass = of_rows.map(|row| {
        done += row.len();
        known.mass[done - 1]
    });
    known.mass = mass.collect();
    (gradients, known)
}

/// `dx [rows, D]` (overwritten) becomes the sum of the gradients of each row's targets, weighted.
fn add_weighted<'a>(
    (targets, weights): (&[Target], &[f32]),
    gradients: impl Iterator<Item = &'a [f32]>,
    d: usize,
    dx: &mut [f32],
) {
    dx.fill(0.0);
    for ((target, weight), own) in targets.iter().zip(weights).zip(gradients) {
        let dx = &mut dx[target.row as usize * d..][..d];
        dx.iter_mut().zip(own).for_each(|(dx, own)| *dx += weight * own);
    }
}

/// The value of a loss.
fn total(pull: &Pull, said: &Logps) -> f32 {
    let product = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
    let logps: f64 = said.logps.iter().zip(pull.weights).map(product).sum();
    let entropies = pull.dentropy.unwrap_or_default();
    let entropies: f64 = said.entropy.iter().zip(entropies).map(product).sum();
    (logps + entropies) as f32
}

/// Bytes that norm and head need besides their input and its gradient.
pub fn head_scratch(vocabulary: usize, hidden: usize) -> usize {
    let rows = rows_at_once(vocabulary);
    size_of::<f32>() * (4 * rows * hidden + rows.min(logp::chunk_rows(vocabulary)) * vocabulary)
}

/// Rows that go through norm and head at once: a few chunks of logits.
fn rows_at_once(vocabulary: usize) -> usize {
    (4 * logp::chunk_rows(vocabulary)).min(1024)
}

/// Rows of h, and targets whose row is a place among them.
#[derive(Default)]
pub(super) struct Rows {
    pub(super) rows: Vec<u32>,
    pub(super) targets: Vec<Target>,
}

/// The distinct rows of `targets` with their targets in order, at most `most` rows at a time.
pub(super) fn compact(targets: &[Target], most: usize) -> impl Iterator<Item = Rows> {
    let mut groups = targets.chunk_by(|a, b| a.row == b.row).peekable();
    std::iter::from_fn(move || {
        groups.peek()?;
        let mut all = Rows::default();
        for group in groups.by_ref().take(most) {
            let row = all.rows.len() as u32;
            all.rows.push(group[0].row);
            all.targets.extend(group.iter().map(|target| Target { row, token: target.token }));
        }
        Some(all)
    })
}

pub(super) fn capped(z: Tensor, softcap: Option<f32>) -> candle_core::Result<Tensor> {
    match softcap {
        None => Ok(z),
        Some(cap) => (z / cap as f64)?.tanh()? * cap as f64,
    }
}
