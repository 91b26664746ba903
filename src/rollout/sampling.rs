//! The chain of logits processors and the draw of one token.
//!
//! Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p. Random numbers are
//! a function of (seed, step, prompt, sample, position), never of call order.

use std::collections::BTreeSet;

use crate::ops::{Distribution, LogpOptions, RowRule, RowStats};
use crate::random::Stream;
use crate::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token. At least a millionth otherwise.
    pub temperature: f64,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens already seen; 1 does nothing.
    pub repetition_penalty: f64,
}

impl SamplingParams {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        SamplingParams { temperature: 0.0, ..Self::default() }
    }

    /// Whether some tokens cannot be drawn.
    pub fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// Whether a token's distribution depends on more than its logits and the temperature.
    pub fn has_rules(&self) -> bool {
        self.filters() || self.repetition_penalty != 1.0
    }

    /// Whether tokens are drawn from their logits divided by the temperature and nothing else.
    pub fn is_plain(&self) -> bool {
        self.temperature > 0.0 && !self.has_rules()
    }

    /// The distribution that tokens are drawn from, given the rule of each row.
    pub fn distribution<'a>(&self, rules: &'a [RowRule]) -> Distribution<'a> {
        let (temperature, repetition_penalty) = (self.temperature, self.repetition_penalty);
        Distribution { temperature, repetition_penalty, rules, ..Distribution::default() }
    }

    /// Refuses values outside their range.
    ///
    /// # Errors
    /// Names the value and its range.
    pub fn validate(&self) -> Result<()> {
        let least = if self.temperature == 0.0 { 0.0 } else { 1e-6 };
        let ranges = [
            ("temperature", self.temperature, least, f64::MAX),
            ("top_p", self.top_p, f64::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, f64::MIN_POSITIVE, f64::MAX),
        ];
        match ranges.iter().find(|(_, value, low, high)| !(*low..=*high).contains(value)) {
            None => Ok(()),
            Some((name, value, _, _)) => {
                Err(Error::usage(format!("{name} = {value} is out of range")))
            }
        }
    }
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// The address of one random number.
#[derive(Clone, Copy, Debug)]
pub struct RandomKey {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
    /// Number of the prompt.
    pub prompt: u64,
    /// Number of the sample of that prompt.
    pub sample: u64,
    /// Position of the token in its sequence.
    pub position: u64,
}

impl RandomKey {
    /// A number in [0, 1) with 53 random bits.
    pub fn uniform(&self) -> f64 {
        let address = [self.seed, self.step, self.prompt, self.sample, self.position];
        Stream::new(&address).unit_f64()
    }
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the distribution that it was drawn from.
    pub logp: f32,
    /// Entropy of that distribution, in nats.
    pub entropy: f32,
    /// The tokens that could be drawn, sorted; empty = all.
    pub kept: Vec<u32>,
    /// The statistics of the distribution; greedily, those of the logits.
    pub stats: RowStats,
}

/// Draws the next token from logits `[V]`, which the processors change in place; `seen` are the tokens
/// of the sequence so far, each once.
///
/// # Errors
/// If the logits hold a NaN or no finite number.
pub fn sample(
    logits: &mut [f32],
    seen: Vec<u32>,
    params: &SamplingParams,
    key: &RandomKey,
) -> Result<Sampled> {
    let greedy = params.temperature == 0.0;
    let options = LogpOptions {
        inv_temperature: if greedy { 1.0 } else { (1.0 / params.temperature) as f32 },
        repetition_penalty: params.repetition_penalty as f32,
        ..LogpOptions::default()
    };
    let rule = RowRule { penalised: seen, kept: Vec::new() };
    let stats = RowStats::of(logits, &options, &rule);
    let nan = logits.iter().fold(false, |nan, logit| nan | logit.is_nan());
    if nan || !stats.max.is_finite() {
        let place = format!("prompt {} sample {}", key.prompt, key.sample);
        return Err(Error::failure(format!("{place}: the model's logits are not finite")));
    }
    if greedy {
        let (token, kept) = (stats.argmax, Vec::new());
        return Ok(Sampled { token, logp: 0.0, entropy: 0.0, kept, stats });
    }
    if !params.filters() {
        let token = stats.draw(logits, key.uniform());
        let (logp, entropy) = (stats.logp(logits[token as usize]), stats.entropy as f32);
        return Ok(Sampled { token, logp, entropy, kept: Vec::new(), stats });
    }
    Ok(sample_kept(logits, stats.max, params, key))
}

/// Draws among the tokens that survive the filters.
fn sample_kept(logits: &[f32], max: f32, params: &SamplingParams, key: &RandomKey) -> Sampled {
    let weight = |logit: f32| f64::from(logit - max).exp();
    let kept = keep(logits, params, weight);
    let stats = RowStats::of_kept(logits, &kept);
    let mut left = key.uniform() * stats.log_sum.exp();
    let mut token = kept[kept.len() - 1];
    for other in &kept {
        left -= weight(logits[*other as usize]);
        if left < 0.0 {
            token = *other;
            break;
        }
    }
    let (logp, entropy) = (stats.logp(logits[token as usize]), stats.entropy as f32);
    Sampled { token, logp, entropy, kept, stats }
}

/// The tokens of a sequence, each once, sorted.
pub(super) fn distinct<'a>(tokens: impl Iterator<Item = &'a u32>) -> Vec<u32> {
    tokens.copied().collect::<BTreeSet<u32>>().into_iter().collect()
}

/// The tokens that survive the filters, in order of their ids; never empty.
fn keep(logits: &[f32], params: &SamplingParams, weight: impl Fn(f32) -> f64) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let likely_first =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if params.top_k > 0 && params.top_k < tokens.len() {
        tokens.select_nth_unstable_by(params.top_k - 1, likely_first);
        tokens.truncate(params.top_k);
    }
    tokens.sort_unstable_by(likely_first);
    if params.top_p < 1.0 {
        let total: f64 = tokens.iter().map(|token| weight(logits[*token as usize])).sum();
        let mut before = 0.0;
        let enough = tokens.iter().position(|token| {
            let reached = before >= params.top_p * total;
            before += weight(logits[*token as usize]);
            reached
        });
        tokens.truncate(enough.unwrap_or(tokens.len()));
    }
    let floor = params.min_p * weight(logits[tokens[0] as usize]);
    tokens.retain(|token| weight(logits[*token as usize]) >= floor);
    tokens.sort_unstable();
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(position: u64) -> RandomKey {
        RandomKey { seed: 1, step: 2, prompt: 3, sample: 4, position }
    }

    fn kept(logits: &[f32], params: SamplingParams) -> Vec<u32> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        keep(logits, &params, |logit| ((logit - max) as f64).exp())
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let with = |top_p| kept(&logits, SamplingParams { top_p, ..Default::default() });
        assert_eq!(with(0.49), [0]);
        assert_eq!(with(0.6), [0, 1]);
        assert_eq!(with(0.81), [0, 1, 2]);
        assert_eq!(with(1.0), [0, 1, 2, 3]);
    }

    #[test]
    fn top_k_and_min_p_drop_unlikely_tokens() {
        let logits: Vec<f32> = [0.1f32, 0.6, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        assert_eq!(kept(&logits, SamplingParams { top_k: 2, ..Default::default() }), [1, 2]);
        assert_eq!(kept(&logits, SamplingParams { min_p: 0.3, ..Default::default() }), [1, 2]);
        assert_eq!(kept(&logits, SamplingParams { min_p: 0.5, ..Default::default() }), [1]);
    }

    #[test]
    fn repetition_penalty_divides_positive_and_multiplies_negative_logits_once() {
        let mut logits = [2.0, -2.0, 1.0];
        crate::ops::penalise(&mut logits, &[0, 1], 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }

    #[test]
    fn draws_follow_the_distribution_and_report_its_log_probs() -> Result<()> {
        let logits: Vec<f32> = [0.7f32, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let mut counts = [0usize; 3];
        for position in 0..20_000 {
            let params = SamplingParams::default();
            let drawn = sample(&mut logits.clone(), Vec::new(), &params, &key(position))?;
            assert!((drawn.logp - logits[drawn.token as usize]).abs() < 1e-6);
            counts[drawn.token as usize] += 1;
        }
        for (count, p) in counts.iter().zip([0.7, 0.2, 0.1]) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.015, "{counts:?}");
        }
        Ok(())
    }

    #[test]
    fn logits_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(
                sample(&mut [0.0, bad], Vec::new(), &SamplingParams::greedy(), &key(0)).is_err()
            );
        }
    }
}
