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
use crate::Result;
use crate::kernels::logp::{self, LogpForward, LogpOptions, RowRule, RowStats, Target};
use crate::kernels::logp_known::{KnownForward, backward_known};
use crate::kernels::matmul::matmul;
use crate::kernels::norm;
use crate::kernels::slices::room;

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
}

impl Default for Distribution<'_> {
    fn default() -> Self {
        Distribution { temperature: 1.0, repetition_penalty: 1.0, rules: &[], stats: &[] }
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

impl Head<'_> {
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
        let flops = || (1 + usize::from(tracked)) * self.weight.flops(pull.targets.len());
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
        let options = self.options(tape, distribution);
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
        let said = match distribution.stats {
            [] => {
                Logps::new(logp::forward_backward(&x, packed, weighted, dentropy, options, &mut dx))
            }
            stats => {
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
        let options = self.options(tape, Distribution::default());
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

    fn options<'d>(&self, tape: &Tape, distribution: Distribution<'d>) -> LogpOptions<'d> {
        LogpOptions {
            inv_temperature: (1.0 / distribution.temperature) as f32,
            softcap: self.softcap.map(|cap| cap as f32),
            repetition_penalty: distribution.repetition_penalty as f32,
            rules: distribution.rules,
            entropy: true,
            precision: tape.engine().precision(),
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
    let own = Distribution { rules: rules.0, stats: stats.0, ..*distribution };
    (distribution.rules, distribution.stats) = (rules.1, stats.1);
    (part, own)
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
