//! Completions that share their prompt: the log-probs of repeated prompts to the bit, the gradients
//! to rounding, and those of sampling, over KV pages and windows.

mod common;

use candle_core::Tensor;
use common::passes::{
    Adapters, adapter_sets, gradients, in_every_form, several, target_logps, targets, text,
};
use common::{FAMILIES, policy, relative, shared};
use steersman::model::{Batch, Policy};
use steersman::ops::{Engine, Gradients, Target};
use steersman::rollout::{GenerateOptions, Generator, Request, SamplingParams, StopReason};

/// A batch and its targets in the order of their rows.
type Pass = (Batch, Vec<Target>);

/// A prompt and its completions.
struct Group {
    prompt: Vec<u32>,
    completions: Vec<Vec<u32>>,
}

impl Group {
    fn new(policy: &Policy, prompt: usize, completions: &[usize]) -> Self {
        let completion = |(i, len): (usize, &usize)| text(policy, i + 1, *len);
        let completions = completions.iter().enumerate().map(completion).collect();
        Group { prompt: text(policy, 0, prompt), completions }
    }

    /// The prompt once; the last row of it predicts every completion's first token.
    fn shared(&self) -> Pass {
        let mut batch = Batch::new();
        let len = self.prompt.len();
        let parent = batch.push(&self.prompt, len, None);
        let first = |ids: &Vec<u32>| Target { row: len as u32 - 1, token: ids[0] };
        let mut wanted: Vec<Target> = self.completions.iter().map(first).collect();
        for ids in &self.completions {
            wanted.extend(targets(batch.len(), ids));
            batch.push(ids, len, Some(parent));
        }
        (batch, wanted)
    }

    /// The prompt before each completion.
    fn repeated(&self) -> Pass {
        let (mut batch, mut wanted) = (Batch::new(), Vec::new());
        for ids in &self.completions {
            let whole = [&self.prompt[..], ids].concat();
            wanted.extend(targets(batch.len(), &whole).skip(self.prompt.len() - 1));
            batch.push(&whole, self.prompt.len(), None);
        }
        (batch, wanted)
    }

    /// Numbers of the shared pass's targets in the order of the repeated one's.
    fn in_repeated_order(&self, numbers: &[f32]) -> Vec<f32> {
        let (firsts, mut rest) = numbers.split_at(self.completions.len());
        let mut ordered = Vec::new();
        for (first, ids) in firsts.iter().zip(&self.completions) {
            ordered.push(*first);
            ordered.extend(rest.split_off(..ids.len() - 1).unwrap());
        }
        ordered
    }
}

/// What the pass says without gradients.
fn logps(policy: &Policy, adapters: &Adapters, (batch, targets): &Pass) -> Vec<f32> {
    target_logps(policy, policy.hidden(batch, adapters).unwrap(), targets)
}

/// All numbers of a gradient.
fn whole(gradients: &Gradients) -> Tensor {
    let flat: Vec<Tensor> = gradients.values().map(|g| g.flatten_all().unwrap()).collect();
    Tensor::cat(&flat, 0).unwrap()
}

/// The gradients of a matrix are allowed a little more than the whole: where a few tokens of the prompt
/// are steered, its terms cancel.
#[test]
fn a_shared_prompt_has_the_log_probs_and_gradients_of_repeated_ones() {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        let policy = policy(&folder, &Engine::cpu());
        let group = Group::new(&policy, 70, &[1, 40, 3, 66]);
        let (once, repeated) = (group.shared(), group.repeated());
        for (name, adapters) in adapter_sets(&policy) {
            let wanted = logps(&policy, &adapters, &repeated);
            let found = group.in_repeated_order(&logps(&policy, &adapters, &once));
            assert_eq!(found, wanted, "{family} {name}");
            if adapters.is_empty() {
                continue;
            }
            let pass = std::slice::from_ref;
            let (wanted_gradients, trained) = gradients(&policy, &adapters, pass(&repeated), false);
            assert_eq!(trained, wanted, "{family} {name} trained");
            let (found, trained) = gradients(&policy, &adapters, pass(&once), false);
            assert_eq!(group.in_repeated_order(&trained), wanted, "{family} {name} trained");
            let off = relative(&whole(&found), &whole(&wanted_gradients));
            assert!(off <= 1e-6, "{family} {name}: the gradient is off by {off}");
            for (key, gradient) in &found {
                let off = relative(gradient, &wanted_gradients[key]);
                assert!(off <= 5e-6, "{family} {name}: {key} is off by {off}");
            }
        }
    }
}

#[test]
fn shared_is_repeated_to_the_bit_at_every_precision() {
    in_every_form(|policy, form| {
        let (group, adapters) = (Group::new(policy, 70, &[30, 1, 66, 7]), several(policy));
        let wanted = logps(policy, &adapters, &group.repeated());
        let found = logps(policy, &adapters, &group.shared());
        assert!(group.in_repeated_order(&found) == wanted, "{form}");
    });
}

/// 64 completions, 16 to a prompt, that end here and there while others go on.
#[test]
fn sampled_log_probs_are_those_of_training_on_the_group_at_every_precision() {
    in_every_form(|policy, form| {
        let adapters = several(policy);
        let prompt = |i: usize| text(policy, i, [1, 13, 64, 70][i]);
        let request = |i: usize| Request {
            prompt: prompt(i / 16),
            prompt_id: i as u64 / 16,
            sample: i as u64 % 16,
        };
        let requests: Vec<Request> = (0..64).map(request).collect();
        let options = GenerateOptions {
            max_new_tokens: 70,
            sampling: SamplingParams::default(),
            eos_token_ids: (0..8).collect(),
            ..GenerateOptions::default()
        };
        let generator = Generator::new(policy, &adapters, &options, None);
        let done = generator.run(&requests, &mut |_| {}).unwrap();
        let ended = done.iter().filter(|completion| completion.stop == StopReason::Eos).count();
        assert!((10..=63).contains(&ended), "{form}: {ended} ended early");
        for (i, samples) in done.chunks(16).enumerate() {
            let completions = samples.iter().map(|sample| sample.tokens.clone()).collect();
            let group = Group { prompt: prompt(i), completions };
            let (_, trained) = gradients(policy, &adapters, &[group.shared()], true);
            let drawn: Vec<f32> = samples.iter().flat_map(|sample| sample.logps.clone()).collect();
            assert!(group.in_repeated_order(&trained) == drawn, "{form}: prompt {i}");
        }
    });
}
