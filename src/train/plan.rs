//! How a step is cut to fit the memory: micro-batch and recomputation, chosen before training for the
//! longest case that the data holds. Neither changes a result.

use std::fmt;

use super::memory::{MemoryModel, PassSize, Sampling};
use crate::config::{MemoryBudget, OptimArgs};
use crate::model::part_tokens;
use crate::{Error, Result, free_memory};

/// A plan before anything is chosen.
const NONE: Plan = Plan {
    micro_batch_tokens: 0,
    gradient_checkpointing: false,
    reuse_activations: false,
    bytes: 0,
    budget: Budget { bytes: None, auto: false },
};

/// Micro-batches that are tried, in tokens, the largest first. Larger ones are no faster; down to a
/// quarter they are hardly slower, while computing blocks again costs a third of a step.
fn micro_batches() -> [usize; 3] {
    let part = part_tokens();
    [part, part / 2, part / 4]
}

/// The longest case that a run's data holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongestCase {
    /// Tokens of the longest sequence.
    pub sequence: usize,
    /// Tokens of the longest sequences that share a prompt, which are computed together where they
    /// fit into a micro-batch; as `sequence` where none do.
    pub family: usize,
    /// Tokens of an optimizer step at most.
    pub step: usize,
}

/// The memory that a run may take; by default any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Bytes, if there is a limit.
    pub bytes: Option<usize>,
    /// Whether the limit is that of the machine and not of the configuration.
    pub auto: bool,
}

impl Budget {
    /// The budget that a key asks for.
    pub fn new(key: MemoryBudget) -> Self {
        match key {
            MemoryBudget::Auto => Budget { bytes: free_memory::usable(), auto: true },
            MemoryBudget::Bytes(bytes) => Budget { bytes: Some(bytes), auto: false },
        }
    }
}

/// How a step is cut, and what memory it is predicted to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Most tokens computed at once; 0 = a whole batch.
    pub micro_batch_tokens: usize,
    /// Compute blocks again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Begin updates with what sampling computed, without a forward pass.
    pub reuse_activations: bool,
    /// Bytes that the process is predicted to take at most.
    pub bytes: usize,
    /// The memory that it may take.
    pub budget: Budget,
}

impl Plan {
    /// The cut of a run whose memory has no limit.
    pub fn unbounded(optim: &OptimArgs) -> Self {
        Plan {
            micro_batch_tokens: optim.micro_batch_tokens.unwrap_or_else(part_tokens),
            gradient_checkpointing: optim.gradient_checkpointing.unwrap_or(false),
            reuse_activations: false,
            bytes: 0,
            budget: Budget::default(),
        }
    }

    /// The first cut that fits, set keys kept as they are: without recomputation if any does, and in
    /// the largest micro-batch.
    ///
    /// # Errors
    /// Usage, if none fits: says what it would take.
    pub fn choose(
        optim: &OptimArgs,
        case: LongestCase,
        memory: &MemoryModel,
        budget: Budget,
    ) -> Result<Self> {
        let recompute: &[bool] = match optim.gradient_checkpointing {
            Some(true) => &[true],
            Some(false) => &[false],
            None => &[false, true],
        };
        let micro_batches = optim.micro_batch_tokens.map_or(micro_batches().to_vec(), |n| vec![n]);
        let mut least: Option<Plan> = None;
        for &gradient_checkpointing in recompute {
            for &micro_batch_tokens in &micro_batches {
                let mut plan = Plan { micro_batch_tokens, gradient_checkpointing, budget, ..NONE };
                plan.bytes = memory.peak(plan.pass(case));
                if plan.fits() {
                    return Ok(plan);
                }
                least = least.filter(|least| least.bytes <= plan.bytes).or(Some(plan));
            }
        }
        Err(least.map_or_else(|| Error::failure("no micro-batch was tried"), |p| p.refusal(case)))
    }

    /// The largest pass of a step.
    fn pass(&self, case: LongestCase) -> PassSize {
        let whole = self.micro_batch_tokens == 0;
        let at_once = if whole { case.step } else { self.micro_batch_tokens };
        let tokens = at_once.min(case.step).max(case.sequence);
        let gradient_checkpointing = self.gradient_checkpointing;
        PassSize { tokens, longest: case.family.min(tokens), gradient_checkpointing }
    }

    fn fits(&self) -> bool {
        self.budget.bytes.is_none_or(|budget| self.bytes <= budget)
    }

    /// The wanted sampling of sequences of `tokens` tokens with as many at once as the budget holds, at least
    /// one, and with matrices that stay rounded if it holds them too.
    pub fn sampling(&self, tokens: usize, memory: &MemoryModel, wanted: Sampling) -> Sampling {
        let Some(budget) = self.budget.bytes else { return wanted };
        let none = Sampling { sequences: 0, rounded: 0, ..wanted };
        // the pages that stay are those of the sequences
        let without = memory.sampling(tokens, none) - memory.kept_cache(none);
        let room = budget.saturating_sub(without);
        let fitting = room / memory.cached_sequence(tokens, wanted.kv_bytes).max(1);
        let all = Sampling { sequences: wanted.sequences.min(fitting).max(1), ..wanted };
        match memory.sampling(tokens, all) <= budget {
            true => all,
            false => Sampling { rounded: 0, ..all },
        }
    }

    /// The same cut of steps that begin with what the sampling of their completions computed; none if that
    /// does not fit.
    pub fn reusing(
        self,
        case: LongestCase,
        memory: &MemoryModel,
        sampling: Sampling,
    ) -> Option<Self> {
        let pass = PassSize { gradient_checkpointing: true, ..self.pass(case) };
        let kept = memory.kept_of_sampling(sampling) + memory.kept_cache(sampling);
        let update = memory.peak(pass) + memory.cheap(pass) + kept;
        // further updates on the same completions have nothing recorded, but a forward pass
        let bytes = memory.sampling(case.sequence, sampling).max(update).max(self.bytes);
        Some(Plan { reuse_activations: true, bytes, ..self }).filter(Plan::fits)
    }

    /// The keys of a configuration as the plan has them.
    pub fn resolve(&self, optim: &mut OptimArgs) {
        optim.micro_batch_tokens = Some(self.micro_batch_tokens);
        optim.gradient_checkpointing = Some(self.gradient_checkpointing);
    }

    /// Why the least that can be done is too much.
    fn refusal(&self, case: LongestCase) -> Error {
        let (needed, budget) = (size(self.bytes), size(self.budget.bytes.unwrap_or(0)));
        let set = match self.budget.auto {
            true => "free here",
            false => "its memory_budget",
        };
        let (recompute, advice) = match self.gradient_checkpointing {
            true => ("even with gradient_checkpointing", ""),
            false => ("without gradient_checkpointing", "turn gradient_checkpointing on, "),
        };
        Error::usage(format!(
            "the run would take about {needed} {recompute}, its longest sequence being {} tokens and \
             micro_batch_tokens {}, and {budget} is {set}: {advice}lower max_length or \
             max_completion_length or micro_batch_tokens, or set a larger memory_budget",
            case.sequence, self.micro_batch_tokens,
        ))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.micro_batch_tokens {
            0 => f.write_str("whole batches at once")?,
            tokens => write!(f, "micro-batches of {tokens} tokens")?,
        }
        let recompute = if self.gradient_checkpointing { "on" } else { "off" };
        write!(f, ", gradient_checkpointing {recompute}")?;
        if self.reuse_activations {
            f.write_str(", reuse_activations on")?;
        }
        write!(f, ", about {}", size(self.bytes))?;
        match self.budget.bytes {
            None => Ok(()),
            Some(budget) => write!(f, " of {}", size(budget)),
        }
    }
}

/// Bytes for a reader: `640 MiB`, `1.9 GiB`.
fn size(bytes: usize) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match mib < 1000.0 {
        true => format!("{mib:.0} MiB"),
        false => format!("{:.1} GiB", mib / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::testing::tiny_model;
    use crate::adapter::{Adapter, Steering, SteeringConfig};
    use candle_core::Device;

    fn choose(optim: &OptimArgs, case: LongestCase, bytes: Option<usize>) -> Result<Plan> {
        let config = tiny_model();
        let steering = SteeringConfig::post_block(&config);
        let steering = Steering::new(steering, &config, 0, &Device::Cpu).unwrap();
        let adapters: Vec<Box<dyn Adapter>> = vec![Box::new(steering)];
        let memory = MemoryModel::new(&config, &adapters, 0);
        Plan::choose(optim, case, &memory, Budget { bytes, auto: false })
    }

    const CASE: LongestCase = LongestCase { sequence: 100, family: 100, step: 100_000 };

    fn cut(plan: &Plan) -> (usize, bool) {
        (plan.micro_batch_tokens, plan.gradient_checkpointing)
    }

    #[test]
    fn less_memory_means_smaller_micro_batches_and_then_recomputation() {
        let optim = OptimArgs::default();
        let mut plan = choose(&optim, CASE, None).unwrap();
        let [largest, .., smallest] = micro_batches();
        assert_eq!(cut(&plan), (largest, false));
        let mut cuts = vec![cut(&plan)];
        let error = loop {
            match choose(&optim, CASE, Some(plan.bytes - 1)) {
                Ok(smaller) => plan = smaller,
                Err(error) => break error,
            }
            cuts.push(cut(&plan));
        };
        assert!(cuts.contains(&(smallest, false)), "{cuts:?}");
        assert_eq!(cuts.last(), Some(&(smallest, true)), "{cuts:?}");
        assert!(cuts.is_sorted_by_key(|(tokens, again)| (*again, usize::MAX - tokens)), "{cuts:?}");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("even with gradient_checkpointing"), "{error}");
    }

    #[test]
    fn set_keys_win_and_the_longest_sequence_is_the_least() {
        let set = OptimArgs {
            micro_batch_tokens: Some(64),
            gradient_checkpointing: Some(true),
            ..Default::default()
        };
        let plan = choose(&set, CASE, None).unwrap();
        assert_eq!(cut(&plan), (64, true));
        let longer = LongestCase { sequence: 5000, family: 5000, ..CASE };
        assert!(choose(&set, longer, None).unwrap().bytes > plan.bytes);
        let error = choose(&set, longer, Some(plan.bytes)).unwrap_err().to_string();
        assert!(error.contains("5000 tokens and micro_batch_tokens 64"), "{error}");
        let whole = OptimArgs { micro_batch_tokens: Some(0), ..Default::default() };
        let all = choose(&whole, CASE, None).unwrap();
        assert!(all.bytes > 2 * choose(&OptimArgs::default(), CASE, None).unwrap().bytes);
    }

    #[test]
    fn what_sampling_computed_is_kept_where_there_is_room_for_it() {
        let config = tiny_model();
        let memory = MemoryModel::new(&config, &[], 0);
        let plan = choose(&OptimArgs::default(), CASE, None).unwrap();
        let none = Sampling { sequences: 4, kv_bytes: 4, ..Sampling::default() };
        let kept = |kept| Sampling { kept, kept_sequences: 4, ..none };
        let reusing = plan.reusing(CASE, &memory, kept(CASE.step)).unwrap();
        assert!(reusing.reuse_activations && reusing.bytes > memory.recorded(CASE.step));
        let of = |bytes| Plan { budget: Budget { bytes: Some(bytes), auto: false }, ..plan };
        assert!(of(reusing.bytes).reusing(CASE, &memory, kept(CASE.step)).is_some());
        assert!(of(reusing.bytes - 1).reusing(CASE, &memory, kept(CASE.step)).is_none());
        assert!(of(reusing.bytes).reusing(CASE, &memory, kept(2 * CASE.step)).is_none());
        let rounded = Sampling { rounded: reusing.bytes, ..kept(CASE.step) };
        assert!(of(reusing.bytes).reusing(CASE, &memory, rounded).is_none());
        let head = Sampling { head: reusing.bytes, ..kept(CASE.step) };
        assert!(of(reusing.bytes).reusing(CASE, &memory, head).is_none());
        let attention = Sampling { attention: true, ..kept(CASE.step) };
        let bytes = plan.reusing(CASE, &memory, attention).unwrap().bytes;
        assert!(bytes >= reusing.bytes + memory.cached_sequence(CASE.step, 4), "{bytes}");
        // half of them a number, and results of attention besides
        let rounded = Sampling { kv_bytes: 2, ..attention };
        let cache = memory.kept_cache(rounded);
        assert_eq!(2 * cache, memory.kept_cache(attention));
        let more = memory.kept_of_sampling(rounded) - memory.kept_of_sampling(attention);
        // of no layer, as none is adapted
        assert_eq!(more, 0);
        let steering = SteeringConfig::post_block(&config);
        let layers = vec![config.layers.len() - 1];
        let steering = SteeringConfig { layers, ..steering };
        let steering = Steering::new(steering, &config, 0, &Device::Cpu).unwrap();
        let adapters: Vec<Box<dyn Adapter>> = vec![Box::new(steering)];
        let memory = MemoryModel::new(&config, &adapters, 0);
        let more = memory.kept_of_sampling(rounded) - memory.kept_of_sampling(attention);
        let bytes_of_token = 2 * config.hidden_size + 4 * config.num_attention_heads;
        assert_eq!(more, CASE.step * bytes_of_token);
    }

    #[test]
    fn sequences_have_room_first_and_matrices_that_stay_rounded_next() {
        let memory = tiny_model();
        let memory = MemoryModel::new(&memory, &[], 0);
        let wanted = Sampling { kept: 10, head: 7, ..Sampling::default() };
        let wanted = Sampling { sequences: 4, kv_bytes: 4, rounded: 1000, ..wanted };
        let of = |bytes| {
            let budget = Budget { bytes, auto: false };
            Plan { budget, ..NONE }.sampling(100, &memory, wanted)
        };
        let all = memory.sampling(100, wanted);
        assert_eq!([of(None), of(Some(all))], [wanted; 2]);
        let plain = Sampling { rounded: 0, ..wanted };
        assert_eq!([of(Some(all - 1)), of(Some(all - 1000))], [plain; 2]);
        assert_eq!(of(Some(all - 1001)), Sampling { sequences: 3, ..wanted });
        assert_eq!(of(Some(0)), Sampling { sequences: 1, ..plain });
        // pages that stay are those of the sequences, not more of them
        let stay = Sampling { kept_sequences: 1, attention: true, ..wanted };
        let pages = memory.kept_cache(stay);
        assert!((1..memory.sampling(100, stay)).contains(&pages));
        let budget = Budget { bytes: Some(all), auto: false };
        assert_eq!(Plan { budget, ..NONE }.sampling(100, &memory, stay), stay);
    }

    #[test]
    fn a_plan_reads_as_a_line() {
        let budget = Budget { bytes: Some(4 << 30), auto: true };
        let (micro_batch_tokens, bytes) = (1024, 700 << 20);
        let plan = Plan { micro_batch_tokens, bytes, budget, ..NONE };
        let line =
            "micro-batches of 1024 tokens, gradient_checkpointing off, about 700 MiB of 4.0 GiB";
        assert_eq!(plan.to_string(), line);
        let reusing = Plan { reuse_activations: true, ..plan }.to_string();
        assert!(reusing.contains("checkpointing off, reuse_activations on, about"), "{reusing}");
    }
}
