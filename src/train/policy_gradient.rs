//! The gradient of a policy-gradient step: groups through the model, their log-probs into the
//! objective, its derivatives back.
//!
//! Where the adapters are those that sampled, the log-probs are known beforehand, and one pass over the
//! head gives the gradient; that they are the same to the bit is checked. Where sampling took the gradients of
//! its tokens at the head, it is computed for one completion of the step only, to check the same of that. Otherwise
//! the head is computed once more, before, for the log-probs.

use candle_core::{DType, Tensor};

use super::group_batch::{Chosen, GroupBatch, micro_batches};
use super::known::{check_mass, check_ratio};
use super::loss::policy::{Completion, CompletionLoss, Normaliser, PolicyLoss};
use crate::adapter::Adapter;
use crate::model::Policy;
use crate::ops::{
    Distribution, GradientSums, Gradients, Pull, Taken, Tape, Value, add, equal_bits,
};
use crate::random::Stream;
use crate::rollout::{self, Group, SamplingParams};
use crate::{Error, Result};

/// What a step learns from.
pub struct Step<'a> {
    /// The groups.
    pub groups: &'a [Group],
    /// Advantage of each completion, group after group; `None` where it takes no part.
    pub advantages: &'a [Option<f64>],
    /// Log-probs of each completion's tokens under the reference; empty without one.
    pub reference: &'a [Vec<f32>],
    /// Which tokens the policy objective counts; empty = all.
    pub chosen: &'a [Vec<bool>],
    /// What the whole step counts.
    pub normaliser: Normaliser,
    /// The adapters are those that sampled.
    pub on_policy: bool,
    /// Set where another sampler recorded the log-probs, such as one of another precision.
    pub off_policy: Option<OffPolicy<'a>>,
}

impl Step<'_> {
    /// Tokens that the policy objective counts.
    fn counted_tokens(&self) -> usize {
        if self.chosen.is_empty() {
            return self.normaliser.tokens;
        }
        let counted = self.chosen.iter().zip(self.advantages).filter(|(_, a)| a.is_some());
        counted.map(|(chosen, _)| chosen.iter().filter(|chosen| **chosen).count()).sum()
    }
}

/// How completions of another sampler are learnt from: the importance ratio is taken to the trainer's own
/// log-probs of the policy that sampled, and each token weighs `min(trainer's / sampler's probability, cap)`.
#[derive(Clone, Copy, Debug)]
pub struct OffPolicy<'a> {
    /// Those log-probs, group after group; empty where the adapters are those that sampled.
    pub old: &'a [Vec<f32>],
    /// The cap.
    pub cap: f64,
}

/// What is minimised.
#[derive(Clone, Copy, Debug)]
pub struct Objective {
    /// The clipped objective and the divergence from the reference.
    pub loss: PolicyLoss,
    /// Weight of the entropy bonus.
    pub entropy_coef: f64,
    /// How tokens were drawn.
    pub sampling: SamplingParams,
}

/// How much is computed at once.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Most tokens of a micro-batch; 0 = the whole step.
    pub micro_batch_tokens: usize,
    /// Compute blocks again in the backward pass instead of keeping their activations.
    pub gradient_checkpointing: bool,
}

/// Sums over a step's tokens, from which metrics are made.
#[derive(Clone, Debug, PartialEq)]
pub struct Sums {
    /// The loss.
    pub loss: f64,
    /// Tokens of completions that went through the model.
    pub tokens: usize,
    /// Sum of entropies, in nats.
    pub entropy: f64,
    /// Sum of KL estimates.
    pub kl: f64,
    /// Sum of importance ratios.
    pub ratio: f64,
    /// The smallest ratio.
    pub ratio_min: f64,
    /// The largest ratio.
    pub ratio_max: f64,
    /// Tokens clipped from below.
    pub clipped_low: usize,
    /// Tokens clipped from above.
    pub clipped_high: usize,
    /// Sum of the weights of tokens that another sampler drew.
    pub correction: f64,
    /// Log-probs of the step's tokens under the trainer's policy, by the completion's place, where
    /// another sampler drew them.
    pub old: Vec<(usize, Vec<f32>)>,
}

impl Default for Sums {
    fn default() -> Self {
        Sums {
            loss: 0.0,
            tokens: 0,
            entropy: 0.0,
            kl: 0.0,
            ratio: 0.0,
            ratio_min: f64::INFINITY,
            ratio_max: f64::NEG_INFINITY,
            clipped_low: 0,
            clipped_high: 0,
            correction: 0.0,
            old: Vec::new(),
        }
    }
}

impl Sums {
    fn add_entropies(&mut self, entropies: &[f32]) {
        self.entropy += entropies.iter().map(|entropy| f64::from(*entropy)).sum::<f64>();
    }

    fn add(&mut self, loss: &CompletionLoss) {
        self.loss += loss.loss;
        self.kl += loss.kl;
        self.tokens += loss.ratios.len();
        self.clipped_low += loss.clipped_low;
        self.clipped_high += loss.clipped_high;
        for ratio in &loss.ratios {
            self.ratio += ratio;
            self.ratio_min = self.ratio_min.min(*ratio);
            self.ratio_max = self.ratio_max.max(*ratio);
        }
    }
}

/// The gradients of a step, and what it sums up to. A completion that the loss does not depend on is
/// not computed.
///
/// # Errors
/// If the loss is not finite, or on the CPU an on-policy log-prob, what the block that is compared computes, or a
/// gradient at the head that is, is not that of sampling, or probabilities do not sum to one under sampling's
/// statistics.
pub fn gradients(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    step: &Step,
    objective: &Objective,
    cut: Cut,
) -> Result<(Sums, Gradients)> {
    let starts = starts(step.groups);
    let moves = |g: usize, c: usize| {
        let others = objective.loss.beta != 0.0 || objective.entropy_coef != 0.0;
        step.advantages[starts[g] + c].is_some_and(|advantage| others || advantage != 0.0)
    };
    let (mut sums, mut gradients) = (Sums::default(), GradientSums::new());
    let batches = micro_batches(step.groups, &moves, cut.micro_batch_tokens);
    let lot = step.groups.first().map_or(0, |group| Stream::new(&[group.version]).bits() as usize);
    let completions =
        |chosen: &Chosen| chosen.iter().map(|(_, places)| places.len()).sum::<usize>();
    let drawn = lot % batches.iter().map(completions).sum::<usize>().max(1);
    let mut before = 0;
    for chosen in &batches {
        let checked = drawn.checked_sub(before).filter(|place| *place < completions(chosen));
        before += completions(chosen);
        let part = Part { policy, adapters, step, objective, starts: &starts, lot, checked };
        part.accumulate(chosen, cut.gradient_checkpointing, &mut sums, &mut gradients)?;
    }
    if !sums.loss.is_finite() {
        return Err(Error::failure(format!("the loss became {}", sums.loss)));
    }
    Ok((sums, gradients.finish(policy.engine())?))
}

/// Log-probs of every completion's tokens, group after group, under other adapters or without the
/// sampler's filters: at `temperature` alone.
///
/// # Errors
/// If a tensor operation fails.
pub fn plain_logps(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    groups: &[Group],
    temperature: f64,
    micro_batch_tokens: usize,
) -> Result<Vec<Vec<f32>>> {
    let starts = starts(groups);
    let count = groups.iter().map(|group| group.completions.len()).sum();
    let mut all = vec![Vec::new(); count];
    for chosen in micro_batches(groups, &|_, _| true, micro_batch_tokens) {
        let packed = GroupBatch::new(groups, &chosen);
        let h = Value::constant(policy.hidden(&packed.batch, adapters)?);
        let plain = Distribution { temperature, ..Distribution::default() };
        let logps = said(policy, &h, &packed, plain)?;
        for ((g, c), logps) in packed.completions.iter().zip(packed.by_completion(&logps)) {
            all[starts[*g] + c] = logps;
        }
    }
    Ok(all)
}

/// The place of each group's first completion.
fn starts(groups: &[Group]) -> Vec<usize> {
    let lengths = groups.iter().map(|group| group.completions.len());
    lengths.scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect()
}

/// Log-probs of a batch's targets, without a way back.
fn said(
    policy: &Policy,
    h: &Value,
    packed: &GroupBatch,
    distribution: Distribution,
) -> Result<Vec<f32>> {
    let weights = vec![0.0; packed.targets.len()];
    let pull = Pull { targets: &packed.targets, weights: &weights, dentropy: None };
    let tape = Tape::off(policy.engine());
    Ok(policy.weighted_logps_under(&tape, h, pull, distribution)?.1.logps)
}

/// What the head's logits become: the distribution that was sampled from, and that without filters.
struct Distributions<'a> {
    sampled: Distribution<'a>,
    plain: Distribution<'a>,
}

/// One micro-batch of a step.
struct Part<'a> {
    policy: &'a Policy,
    adapters: &'a [Box<dyn Adapter>],
    step: &'a Step<'a>,
    objective: &'a Objective,
    starts: &'a [usize],
    /// The step's random number, by which it is drawn what is compared with sampling.
    lot: usize,
    /// The completion of this batch, if it is the one of the step, for which the head is computed even if sampling
    /// took gradients, to compare.
    checked: Option<usize>,
}

impl Part<'_> {
    fn accumulate(
        &self,
        chosen: &Chosen,
        checkpointing: bool,
        sums: &mut Sums,
        gradients: &mut GradientSums,
    ) -> Result<()> {
        let (policy, sampling) = (self.policy, &self.objective.sampling);
        let packed = GroupBatch::new(self.step.groups, chosen);
        let rules = match sampling.has_rules() {
            true => packed.rules(self.step.groups, sampling.repetition_penalty != 1.0),
            false => Vec::new(),
        };
        let plain = Distribution { temperature: sampling.temperature, ..Distribution::default() };
        let stats = match self.is_known() && rules.is_empty() {
            true => packed.stats(self.step.groups),
            false => Vec::new(),
        };
        let taken = match stats.is_empty() || self.objective.entropy_coef != 0.0 {
            true => None,
            false => packed.taken(self.step.groups),
        };
        let taken = taken.as_ref().map(|(gradients, logps)| Taken { gradients, logps });
        let sampled = Distribution { stats: &stats, taken, ..sampling.distribution(&rules) };
        let of = Distributions { sampled, plain };
        let recorded = match self.is_known() {
            true => packed.recorded(self.step.groups)?,
            false => None,
        };
        let trace = match recorded {
            Some(recorded) => policy.retrace(&packed.batch, self.adapters, &recorded, self.lot)?,
            None => {
                let embedded = policy.embed(&packed.batch.input_ids)?;
                policy.trace(&packed.batch, embedded, self.adapters, checkpointing)?
            }
        };
        let losses = self.losses(&packed, trace.output(), &of, sums)?;
        let dh = self.head_gradient(&packed, trace.output(), &losses, &of, sums)?;
        if let (Some(taken), Some(place)) = (taken, self.checked) {
            self.check_taken(&packed, trace.output(), (place, taken), of.sampled)?;
        }
        match dh {
            Some(dh) => trace.backward_into(dh, gradients),
            None => Ok(()),
        }
    }

    /// Whether the log-probs must be those that were recorded: the adapters and the kernels are those
    /// that sampled.
    fn is_known(&self) -> bool {
        let same_sampler = self.step.off_policy.is_none() && self.policy.engine().device().is_cpu();
        self.step.on_policy && same_sampler
    }

    /// The losses of the batch's completions, given the last block's output.
    fn losses(
        &self,
        packed: &GroupBatch,
        output: &Tensor,
        of: &Distributions,
        sums: &mut Sums,
    ) -> Result<Vec<CompletionLoss>> {
        let h = Value::constant(output.clone());
        let said = |distribution| -> Result<Vec<Vec<f32>>> {
            Ok(packed.by_completion(&said(self.policy, &h, packed, distribution)?))
        };
        let logps = match self.is_known() {
            true => self.completions(packed).map(|(_, c)| c.logps.clone()).collect(),
            false => said(of.sampled)?,
        };
        let unfiltered = match self.has_unfiltered() {
            true => Some(said(of.plain)?),
            false => None,
        };
        let mut losses = Vec::with_capacity(logps.len());
        for (i, (place, completion)) in self.completions(packed).enumerate() {
            let unfiltered = unfiltered.as_ref().map(|all| all[i].as_slice());
            losses.push(self.loss(place, completion, (&logps[i], unfiltered), sums));
        }
        losses.iter().for_each(|loss| sums.add(loss));
        Ok(losses)
    }

    /// Whether the divergence from the reference is taken of another distribution than was sampled.
    fn has_unfiltered(&self) -> bool {
        self.objective.sampling.has_rules() && self.objective.loss.beta != 0.0
    }

    /// The loss of one completion with the given log-probs.
    fn loss(
        &self,
        place: usize,
        completion: &rollout::Completion,
        (logps, unfiltered): (&[f32], Option<&[f32]>),
        sums: &mut Sums,
    ) -> CompletionLoss {
        let (step, mut old, mut weights) = (self.step, completion.logps.as_slice(), None);
        if let Some(off) = step.off_policy {
            old = off.old.get(place).map_or(logps, Vec::as_slice);
            weights = Some(PolicyLoss::truncated_weights(old, &completion.logps, off.cap));
            sums.correction += weights.iter().flatten().sum::<f64>();
            sums.old.push((place, old.to_vec()));
        }
        let completion = Completion {
            logps,
            sampled: old,
            reference: step.reference.get(place).map(Vec::as_slice),
            unfiltered,
            chosen: step.chosen.get(place).map(Vec::as_slice),
            correction: weights.as_deref(),
            advantage: step.advantages[place].unwrap_or(0.0),
        };
        self.objective.loss.of(&completion, &step.normaliser)
    }

    /// The gradient of the last block's output.
    fn head_gradient(
        &self,
        packed: &GroupBatch,
        output: &Tensor,
        losses: &[CompletionLoss],
        of: &Distributions,
        sums: &mut Sums,
    ) -> Result<Option<Tensor>> {
        let (policy, bonus) = (self.policy, self.bonus(packed));
        let tape = Tape::recording(policy.engine());
        let h = tape.input(output);
        let weights = |get: fn(&CompletionLoss) -> &Vec<f32>| -> Vec<f32> {
            packed.by_target(&losses.iter().map(|loss| get(loss).clone()).collect::<Vec<_>>())
        };
        let sampled = weights(|loss| &loss.dlogps);
        let pull = Pull { targets: &packed.targets, weights: &sampled, dentropy: bonus.as_deref() };
        let (mut loss, said) = policy.weighted_logps_under(&tape, &h, pull, of.sampled)?;
        if self.is_known() {
            let by_completion = packed.by_completion(&said.logps);
            let mut all = self.completions(packed).zip(&by_completion);
            all.try_for_each(|((_, completion), logps)| check_ratio(completion, logps))?;
            check_mass(of.sampled.stats, &said.mass)?;
        }
        sums.add_entropies(&packed.of_rows(&said.entropy));
        if let Some(bonus) = &bonus {
            let product = |(d, entropy): (&f32, &f32)| f64::from(*d) * f64::from(*entropy);
            sums.loss += bonus.iter().zip(&said.entropy).map(product).sum::<f64>();
        }
        if self.has_unfiltered() {
            let plain = weights(|loss| &loss.dunfiltered);
            let pull = Pull { targets: &packed.targets, weights: &plain, dentropy: None };
            let (kl, _) = policy.weighted_logps_under(&tape, &h, pull, of.plain)?;
            loss = add(&tape, &loss, &kl)?;
        }
        let one = Tensor::ones(1, DType::F32, policy.engine().device())?;
        Ok(tape.backward_to_input(&loss, one, &h)?.0)
    }

    /// The completion of each of the batch's places.
    fn completions<'b>(
        &'b self,
        packed: &'b GroupBatch,
    ) -> impl Iterator<Item = (usize, &'b rollout::Completion)> {
        packed
            .completions
            .iter()
            .map(|(g, c)| (self.starts[*g] + c, &self.step.groups[*g].completions[*c]))
    }

    /// The factor of each distinct row's entropy, if there is an entropy bonus: the mean over all tokens
    /// that the policy objective counts, whatever the loss's own normaliser is, as in TRL.
    fn bonus(&self, packed: &GroupBatch) -> Option<Vec<f32>> {
        let coef = self.objective.entropy_coef;
        if coef == 0.0 {
            return None;
        }
        let share = (-coef / self.step.counted_tokens().max(1) as f64) as f32;
        let of = |(place, completion): (usize, &rollout::Completion)| -> Vec<f32> {
            match self.step.chosen.get(place) {
                Some(chosen) => chosen.iter().map(|c| if *c { share } else { 0.0 }).collect(),
                None => vec![share; completion.tokens.len()],
            }
        };
        let factors: Vec<Vec<f32>> = self.completions(packed).map(of).collect();
        Some(packed.by_row(&packed.by_target(&factors)))
    }

    /// Refuses to go on where what sampling took of a completion at the head is not what training computes.
    fn check_taken(
        &self,
        packed: &GroupBatch,
        output: &Tensor,
        (place, taken): (usize, Taken),
        sampled: Distribution,
    ) -> Result<()> {
        let Some((_, completion)) = self.completions(packed).nth(place) else { return Ok(()) };
        let places = packed.targets_of(place);
        let targets: Vec<_> = places.iter().map(|target| packed.targets[*target]).collect();
        let gradients: Vec<_> = places.iter().map(|target| taken.gradients[*target]).collect();
        let (stats, weights) = (&completion.stats[..], vec![1.0; targets.len()]);
        let pull = Pull { targets: &targets, weights: &weights, dentropy: None };
        let of = |taken| -> Result<_> {
            let tape = Tape::recording(self.policy.engine());
            let (h, distribution) = (tape.input(output), Distribution { stats, taken, ..sampled });
            let (sum, said) = self.policy.weighted_logps_under(&tape, &h, pull, distribution)?;
            let one = Tensor::ones(1, DType::F32, self.policy.engine().device())?;
            Ok((tape.backward_to_input(&sum, one, &h)?.0, said))
        };
        let (own, said) = of(None)?;
        check_ratio(completion, &said.logps)?;
        check_mass(stats, &said.mass)?;
        let taken = Taken { gradients: &gradients, logps: &completion.logps };
        match (own, of(Some(taken))?.0) {
            (Some(own), Some(taken)) if equal_bits(&own, &taken)? => Ok(()),
            _ => Err(Error::failure(
                "the gradient at the head that sampling took is not that of training, by the same adapters; \
                 this is a bug",
            )),
        }
    }
}
