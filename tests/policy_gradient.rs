//! Policy-gradient steps: log-probs in training are those of sampling to the bit under every processor,
//! and gradients are the same however a step is cut, ordered, or computed.

mod common;

use std::collections::BTreeSet;

use common::passes::{Adapters, adapter_sets, assert_same_bits, joint, lora, several, text};
use common::{policy_stored_as, relative, shared};
use steersman::adapter::{Lora, LoraConfig, Site, Steering, SteeringConfig};
use steersman::config::{KlEstimator, LossType};
use steersman::model::{ModelConfig, ModelSource, Policy, Recorded, Weights};
use steersman::ops::MatmulPrecision::{High, Highest, Medium};
use steersman::ops::{Engine, Gradients, WeightDtype};
use steersman::rollout::{
    GenerateOptions, Generator, Group, Record, SamplingParams, sample_groups,
};
use steersman::train::loss::policy::{Normaliser, PolicyLoss};
use steersman::train::policy_gradient::{
    Cut, Objective, OffPolicy, Step, Sums, gradients, plain_logps,
};

const G: usize = 4;

/// All that sampling can keep.
const ALL: Record = Record { attention: true, head: true };

fn policy(family: &str) -> Option<Policy> {
    let folder = shared(&format!("fixtures/{family}"))?;
    Some(policy_stored_as(&folder, &Engine::cpu(), WeightDtype::Bf16))
}

/// The same with another softcap of the logits.
fn policy_with_cap(family: &str, cap: Option<f64>) -> Option<Policy> {
    let folder = shared(&format!("fixtures/{family}"))?;
    let json = std::fs::read(folder.join("config.json")).unwrap();
    let config = ModelConfig::from_json(&serde_json::from_slice(&json).unwrap()).unwrap();
    let config = ModelConfig { final_logit_softcapping: cap, ..config };
    let weights = Weights::open(&ModelSource::Folder(folder)).unwrap();
    Some(Policy::load(&config, &weights, &Engine::cpu(), WeightDtype::Bf16).unwrap())
}

/// Three groups of completions of up to nine tokens.
fn sampled(policy: &Policy, adapters: &Adapters, sampling: SamplingParams) -> Vec<Group> {
    let options = GenerateOptions { sampling, ..Default::default() };
    groups((policy, adapters), &options, (5, None))
}

/// The same, with what the blocks computed; the first prompt has `prompt` tokens.
fn recorded(policy: &Policy, adapters: &Adapters, how: (usize, usize)) -> Vec<Group> {
    recorded_at((policy, adapters), how, (1.0, Record::default()))
}

/// The same, at a temperature, with what is wanted.
fn recorded_at(
    of: (&Policy, &Adapters),
    (prompt, max_batch): (usize, usize),
    (temperature, record): (f64, Record),
) -> Vec<Group> {
    let sampling = SamplingParams { temperature, ..Default::default() };
    let options = GenerateOptions { sampling, max_batch, ..Default::default() };
    groups(of, &options, (prompt, Some(record)))
}

fn groups(
    (policy, adapters): (&Policy, &Adapters),
    options: &GenerateOptions,
    (prompt, record): (usize, Option<Record>),
) -> Vec<Group> {
    let prompt = |i: usize| (i as u64, i, text(policy, i, prompt + 3 * i));
    // some completions end early
    let (max_new_tokens, eos_token_ids) = (9, (0..40).collect());
    let options = GenerateOptions { max_new_tokens, eos_token_ids, ..options.clone() };
    let generator = Generator::new(policy, adapters, &options, None);
    let prompts = (0..3).map(prompt).collect();
    sample_groups(&generator, prompts, (G, 0), record, &mut |_| {}).unwrap()
}

/// The same completions without what was computed of them.
fn without_recordings(groups: &[Group]) -> Vec<Group> {
    let mut groups = groups.to_vec();
    for group in &mut groups {
        group.recorded = None;
        group.completions.iter_mut().for_each(|completion| completion.recorded = None);
    }
    groups
}

/// Every token that a pass took up is recorded, and the gradient of every one that was drawn if wanted.
fn assert_recorded(groups: &[Group], record: Record) {
    for group in groups {
        let rows = |recorded: &Option<Recorded>| recorded.as_ref().map(|r| r.rows.len());
        assert_eq!(rows(&group.recorded), Some(group.prompt.len()));
        for completion in &group.completions {
            assert_eq!(rows(&completion.recorded), Some(completion.tokens.len() - 1));
            let drawn = completion.recorded.as_ref().map(|recorded| recorded.drawn.len());
            let wanted = record.head;
            assert_eq!(drawn, Some(if wanted { completion.tokens.len() } else { 0 }));
        }
    }
}

fn advantages() -> Vec<Option<f64>> {
    (0..3 * G).map(|i| (i != 5).then(|| [1.5, -0.5, 0.25, -1.25][i % 4])).collect()
}

fn objective(loss: PolicyLoss, entropy_coef: f64, sampling: SamplingParams) -> Objective {
    Objective { loss, entropy_coef, sampling }
}

/// A step on `groups`, with the reference's log-probs if there is a divergence in the loss.
fn step(
    (policy, adapters): (&Policy, &Adapters),
    (groups, advantages): (&[Group], &[Option<f64>]),
    objective: &Objective,
    (micro_batch_tokens, gradient_checkpointing, on_policy): (usize, bool, bool),
) -> (Sums, Gradients) {
    let temperature = objective.sampling.temperature;
    let reference = match objective.loss.beta != 0.0 {
        true => plain_logps(policy, &[], groups, temperature, micro_batch_tokens).unwrap(),
        false => Vec::new(),
    };
    let completions: Vec<_> = groups.iter().flat_map(|group| &group.completions).collect();
    let counted = completions.iter().zip(advantages).filter(|(_, advantage)| advantage.is_some());
    let normaliser = Normaliser {
        completions: counted.clone().count(),
        tokens: counted.map(|(completion, _)| completion.tokens.len()).sum(),
        max_completion_length: 9,
    };
    let (reference, chosen) = (&reference[..], &[][..]);
    let off_policy = None;
    let step = Step { groups, advantages, reference, chosen, normaliser, on_policy, off_policy };
    let cut = Cut { micro_batch_tokens, gradient_checkpointing };
    gradients(policy, adapters, &step, objective, cut).unwrap()
}

/// Why an on-policy step is refused.
fn refusal(
    (policy, adapters): (&Policy, &Adapters),
    (groups, advantages): (&[Group], &[Option<f64>]),
) -> String {
    let (reference, chosen) = (&[][..], &[][..]);
    let normaliser = Normaliser { completions: 11, tokens: 60, max_completion_length: 9 };
    let (on_policy, off_policy) = (true, None);
    let step = Step { groups, advantages, reference, chosen, normaliser, on_policy, off_policy };
    let cut = Cut { micro_batch_tokens: 0, gradient_checkpointing: false };
    let objective = objective(PolicyLoss::default(), 0.0, SamplingParams::default());
    let error = gradients(policy, adapters, &step, &objective, cut).err();
    error.map_or("none".to_string(), |error| error.to_string())
}

fn all_sampling() -> Vec<SamplingParams> {
    let plain = SamplingParams::default();
    vec![
        plain,
        SamplingParams { temperature: 0.7, ..plain },
        SamplingParams { top_p: 0.8, ..plain },
        SamplingParams { top_k: 7, temperature: 1.3, ..plain },
        SamplingParams { repetition_penalty: 1.4, ..plain },
        SamplingParams {
            temperature: 0.8,
            top_p: 0.9,
            top_k: 50,
            min_p: 0.01,
            repetition_penalty: 1.2,
        },
    ]
}

#[test]
fn on_policy_the_ratio_is_one_to_the_bit_under_every_processor_and_adapter() {
    for family in ["llama3-scaled-rope", "qwen3", "gemma3"] {
        let Some(policy) = policy(family) else { return };
        for (name, adapters) in adapter_sets(&policy) {
            for sampling in all_sampling() {
                let groups = sampled(&policy, &adapters, sampling);
                let objective = objective(PolicyLoss::default(), 0.0, sampling);
                // a log-prob that is not the sampled one is an error
                let (sums, _) = step(
                    (&policy, &adapters),
                    (&groups, &advantages()),
                    &objective,
                    (0, false, true),
                );
                assert_eq!((sums.ratio_min, sums.ratio_max), (1.0, 1.0), "{family} {name}");
                let (again, _) = step(
                    (&policy, &adapters),
                    (&groups, &advantages()),
                    &objective,
                    (0, false, false),
                );
                assert_eq!((again.ratio_min, again.ratio_max), (1.0, 1.0), "{family} {name}");
                assert_eq!(sums.entropy, again.entropy);
            }
        }
    }
}

#[test]
fn updates_from_what_sampling_computed_have_the_bits_of_updates_from_a_forward_pass() {
    for (family, cap) in [("llama3-scaled-rope", None), ("qwen3", None), ("gemma3", Some(5.0))] {
        let Some(policy) = policy_with_cap(family, cap) else { return };
        let mut sets = adapter_sets(&policy);
        let top = vec![policy.config().layers.len() - 1];
        for site in Site::ALL {
            let base = SteeringConfig::post_block(policy.config());
            let config = SteeringConfig { site, layers: top.clone(), ..base };
            let steering = Steering::new(config, policy.config(), 1, policy.engine().device());
            sets.push((format!("top {site}"), vec![Box::new(steering.unwrap())]));
        }
        for (name, adapters) in sets {
            for how in [(5, 64), (5, 3), (1, 1), (70, 64)] {
                let blocks = Record::default();
                let records = [(blocks, 1.0, Highest), (ALL, 0.7, Highest), (ALL, 1.0, Medium)];
                for (record, temperature, precision) in records {
                    let what = format!("{family} {name} {how:?} {record:?} {precision:?}");
                    let policy = policy.at_precision(precision);
                    let groups = recorded_at((&policy, &adapters), how, (temperature, record));
                    assert_recorded(&groups, record);
                    let without = without_recordings(&groups);
                    let of = |groups: &[Group], tokens| {
                        let sampling = SamplingParams { temperature, ..Default::default() };
                        let objective = objective(PolicyLoss::default(), 0.0, sampling);
                        let way = (tokens, false, true);
                        step((&policy, &adapters), (groups, &advantages()), &objective, way)
                    };
                    for tokens in [0, 30] {
                        let (sums, gradients) = of(&groups, tokens);
                        let (want, wanted) = of(&without, tokens);
                        assert_eq!(sums, want, "{what}");
                        assert_same_bits(&gradients, &wanted, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn one_batch_learns_from_several_samplings() {
    let Some(policy) = policy("llama3-scaled-rope") else { return };
    let policy = policy.at_precision(Medium);
    let adapters: Adapters = vec![lora(&policy)];
    let of = |prompt| recorded_at((&policy, &adapters), (prompt, 64), (1.0, ALL));
    let groups = [of(5), of(66)].concat();
    let advantages = [advantages(), advantages()].concat();
    let objective = objective(PolicyLoss::default(), 0.0, SamplingParams::default());
    let of = |groups: &[Group]| {
        step((&policy, &adapters), (groups, &advantages), &objective, (0, false, true))
    };
    let (sums, gradients) = of(&groups);
    let (want, wanted) = of(&without_recordings(&groups));
    assert_eq!(sums, want);
    assert_same_bits(&gradients, &wanted, "both");
}

#[test]
fn keys_of_another_sequence_stop_the_step() {
    for (family, precision) in
        [("llama3-scaled-rope", Highest), ("qwen3", High), ("gemma3", Medium)]
    {
        let Some(policy) = policy(family) else { return };
        let policy = policy.at_precision(precision);
        let adapters: Adapters = vec![lora(&policy)];
        let groups = recorded_at((&policy, &adapters), (5, 64), (1.0, ALL));
        assert_eq!(refusal((&policy, &adapters), (&groups, &advantages())), "none");
        for version in 0..2 * policy.config().layers.len() as u64 {
            let mut groups = groups.clone();
            groups.iter_mut().for_each(|group| group.version = version);
            let all = groups.iter_mut().flat_map(|group| &mut group.completions);
            let mut learnt = all.zip(advantages()).filter(|(_, advantage)| advantage.is_some());
            let (mine, _) = learnt.find(|(own, _)| own.tokens.len() == 9).unwrap();
            let (other, _) = learnt.find(|(own, _)| own.tokens.len() == 9).unwrap();
            let slot = other.recorded.as_ref().unwrap().slot;
            mine.recorded.as_mut().unwrap().slot = slot;
            let error = refusal((&policy, &adapters), (&groups, &advantages()));
            assert!(error.contains("makes in training what it did not make"), "{family}: {error}");
        }
    }
}

#[test]
fn prompts_that_other_adapters_passed_stop_the_step() {
    for family in ["llama3-scaled-rope", "qwen3", "gemma3"] {
        let Some(policy) = policy(family) else { return };
        for (name, adapters) in adapter_sets(&policy).split_off(1) {
            let mut groups = recorded(&policy, &adapters, (5, 64));
            let others = recorded(&policy, &Vec::new(), (5, 64));
            for (group, other) in groups.iter_mut().zip(others) {
                group.recorded = other.recorded;
            }
            let error = refusal((&policy, &adapters), (&groups, &advantages()));
            let told = ["makes in training what it did not", "the importance ratio is not 1"];
            assert!(told.iter().any(|told| error.contains(told)), "{family} {name}: {error}");
        }
    }
}

#[test]
fn gradients_at_the_head_that_are_not_those_of_training_stop_a_step_that_draws_their_completion() {
    let Some(policy) = policy("qwen2") else { return };
    let adapters: Adapters = vec![lora(&policy)];
    let groups = recorded_at((&policy, &adapters), (5, 64), (1.0, ALL));
    assert_eq!(refusal((&policy, &adapters), (&groups, &advantages())), "none");
    let learnt = (0..3 * G).filter(|i| advantages()[*i].is_some());
    for (g, c) in learnt.map(|i| (i / G, i % G)) {
        let mut groups = groups.clone();
        // the gradient of another completion's first token
        let other = groups[g].completions[(c + 1) % G].recorded.as_ref().unwrap().drawn[0];
        groups[g].completions[c].recorded.as_mut().unwrap().drawn[0] = other;
        let refused = (0..200).any(|version| {
            groups.iter_mut().for_each(|group| group.version = version);
            let error = refusal((&policy, &adapters), (&groups, &advantages()));
            assert!(error == "none" || error.contains("at the head that sampling took"), "{error}");
            error != "none"
        });
        assert!(refused, "{g} {c}");
    }
}

#[test]
fn what_other_adapters_computed_stops_the_step() {
    let Some(policy) = policy("qwen2") else { return };
    // a LoRA that is fresh does nothing
    let fresh = LoraConfig { r: 3, ..LoraConfig::all_linear() };
    let fresh = Lora::new(fresh, policy.config(), 1, policy.engine().device()).unwrap();
    let others: Adapters = vec![Box::new(fresh)];
    let groups = recorded(&policy, &others, (5, 64));
    let adapters: Adapters = vec![lora(&policy)];
    let mut layers = BTreeSet::new();
    for version in 0..12 {
        let of_version = |group: &Group| Group { version, ..group.clone() };
        let groups: Vec<Group> = groups.iter().map(of_version).collect();
        let error = refusal((&policy, &adapters), (&groups, &advantages()));
        assert!(error.contains("makes in training what it did not make"), "{error}");
        layers.insert(error.split(' ').nth(1).map(str::to_string));
    }
    assert_eq!(layers.len(), policy.config().layers.len(), "{layers:?}");
}

#[test]
fn recorded_entropies_are_those_of_training() {
    let Some(policy) = policy("llama3-scaled-rope") else { return };
    let adapters = several(&policy);
    for sampling in all_sampling() {
        let groups = sampled(&policy, &adapters, sampling);
        let objective = objective(PolicyLoss::default(), 0.0, sampling);
        let advantages = vec![Some(1.0); 3 * G];
        let (sums, _) =
            step((&policy, &adapters), (&groups, &advantages), &objective, (0, false, true));
        let recorded = groups.iter().flat_map(|group| &group.completions);
        let recorded: f64 =
            recorded.flat_map(|c| &c.entropies).map(|entropy| f64::from(*entropy)).sum();
        assert!((sums.entropy - recorded).abs() < 1e-9 * recorded, "{} {recorded}", sums.entropy);
    }
}

#[test]
fn a_log_prob_that_was_not_sampled_stops_the_step() {
    let Some(policy) = policy("qwen2") else { return };
    let adapters: Adapters = vec![lora(&policy)];
    let mut groups = sampled(&policy, &adapters, SamplingParams::default());
    groups[1].completions[2].logps[0] += 1e-6;
    let error = refusal((&policy, &adapters), (&groups, &advantages()));
    assert!(error.contains("the importance ratio is not 1 on-policy"), "{error}");
}

#[test]
fn gradients_do_not_depend_on_the_cut_the_order_or_the_way_they_are_computed() {
    let Some(policy) = policy("llama3-scaled-rope") else { return };
    let adapters = joint(&policy);
    let filters = SamplingParams {
        top_p: 0.9,
        temperature: 0.9,
        repetition_penalty: 1.1,
        ..Default::default()
    };
    for sampling in [SamplingParams::default(), filters] {
        let groups = sampled(&policy, &adapters, sampling);
        for (loss, entropy_coef) in [
            (PolicyLoss::default(), 0.01),
            (PolicyLoss::default(), 0.0),
            (PolicyLoss { loss_type: LossType::Grpo, beta: 0.1, ..Default::default() }, 0.01),
            (PolicyLoss { beta: 0.1, kl_estimator: KlEstimator::K2, ..Default::default() }, 0.0),
        ] {
            let objective = objective(loss, entropy_coef, sampling);
            let both = (&policy, &adapters);
            let of = |groups: &[Group], advantages: &[Option<f64>], way| {
                step(both, (groups, advantages), &objective, way)
            };
            let (sums, whole) = of(&groups, &advantages(), (0, false, true));
            let near = |other: &Gradients, what: &str| {
                let off = whole.iter().map(|(key, g)| squares(&(g - &other[key]).unwrap()));
                let error = (off.sum::<f64>() / whole.values().map(squares).sum::<f64>()).sqrt();
                assert!(error < 1e-6, "{what}: {error}");
            };
            for tokens in [1, 12, 30] {
                let (cut, gradients) = of(&groups, &advantages(), (tokens, false, true));
                near(&gradients, &format!("micro-batches of {tokens}"));
                assert!((cut.loss - sums.loss).abs() < 1e-9, "{} {}", cut.loss, sums.loss);
            }
            let (_, again) = of(&groups, &advantages(), (0, true, true));
            assert_same_bits(&whole, &again, "checkpointing");
            let (_, later) = of(&groups, &advantages(), (0, false, false));
            near(&later, "log-probs taken first");
            if entropy_coef != 0.0 || sampling.has_rules() {
                assert_same_bits(&whole, &later, "log-probs taken first");
            }
            let mut turned = groups.clone();
            turned.reverse();
            turned.iter_mut().for_each(|group| group.completions.reverse());
            let mut signs = advantages();
            signs.reverse();
            near(&of(&turned, &signs, (0, false, true)).1, "reversed");
        }
    }
}

#[test]
fn the_entropy_bonus_is_the_mean_over_the_tokens_that_count() {
    let Some(policy) = policy("llama3-scaled-rope") else { return };
    let adapters: Adapters = vec![lora(&policy)];
    let groups = &sampled(&policy, &adapters, SamplingParams::default())[..];
    let completions: Vec<_> = groups.iter().flat_map(|group| &group.completions).collect();
    let advantages = &vec![Some(0.0); completions.len()][..];
    // every second token, and none of the first completion
    let chosen: Vec<Vec<bool>> = completions
        .iter()
        .enumerate()
        .map(|(i, completion)| (0..completion.tokens.len()).map(|t| i > 0 && t % 2 == 0).collect())
        .collect();
    let counted = completions.iter().zip(&chosen).flat_map(|(completion, chosen)| {
        completion.entropies.iter().zip(chosen).filter(|(_, chosen)| **chosen)
    });
    let entropies: Vec<f64> = counted.map(|(entropy, _)| f64::from(*entropy)).collect();
    let tokens = completions.iter().map(|completion| completion.tokens.len()).sum();
    let normaliser = Normaliser { completions: 12, tokens, max_completion_length: 9 };
    let (reference, chosen, on_policy, off_policy) = (&[][..], &chosen[..], true, None);
    let step = Step { groups, advantages, reference, chosen, normaliser, on_policy, off_policy };
    let cut = Cut { micro_batch_tokens: 12, gradient_checkpointing: false };
    let objective = objective(PolicyLoss::default(), 0.5, SamplingParams::default());
    let (sums, _) = gradients(&policy, &adapters, &step, &objective, cut).unwrap();
    let want = -0.5 * entropies.iter().sum::<f64>() / entropies.len() as f64;
    assert!((sums.loss - want).abs() < 1e-6, "{} {want}", sums.loss);
}

#[test]
fn completions_of_another_sampler_weigh_what_their_probabilities_say() {
    let Some(policy) = policy("llama3-scaled-rope") else { return };
    let adapters: Adapters = vec![lora(&policy)];
    let mut groups = sampled(&policy, &adapters, SamplingParams::default());
    // as if the sampler had been less precise
    let logps =
        groups.iter_mut().flat_map(|group| &mut group.completions).flat_map(|c| &mut c.logps);
    logps.enumerate().for_each(|(i, logp)| *logp += 0.01 * (i % 7) as f32 - 0.02);
    let objective = objective(PolicyLoss::default(), 0.0, SamplingParams::default());
    let (reference, chosen, advantages) = (&[][..], &[][..], &advantages()[..]);
    let normaliser = Normaliser { completions: 11, tokens: 60, max_completion_length: 9 };
    let groups = &groups[..];
    let of = |groups: &[Group], old: &[Vec<f32>], cap: f64, on_policy: bool| {
        let off_policy = Some(OffPolicy { old, cap });
        let step =
            Step { groups, advantages, reference, chosen, normaliser, on_policy, off_policy };
        let cut = Cut { micro_batch_tokens: 0, gradient_checkpointing: false };
        gradients(&policy, &adapters, &step, &objective, cut).unwrap()
    };
    let (sums, weighted) = of(groups, &[], 10.0, true);
    assert_eq!((sums.ratio_min, sums.ratio_max), (1.0, 1.0), "the ratio is to the trainer's own");
    assert!(sums.correction != sums.tokens as f64, "the sampler was the trainer");
    assert!((sums.correction / sums.tokens as f64 - 1.0).abs() < 0.05, "{}", sums.correction);
    // weights that are all capped scale the gradient
    let (_, capped) = of(groups, &[], 1e-3, true);
    let mut plain = groups.to_vec();
    for (place, logps) in &sums.old {
        plain[place / G].completions[place % G].logps.clone_from(logps);
    }
    let (_, unweighted) = of(&plain, &[], 10.0, true);
    for (key, gradient) in &unweighted {
        assert!(relative(&(&capped[key] * 1e3).unwrap(), gradient) < 1e-5, "{key}");
        let off = relative(&weighted[key], gradient);
        assert!(off > 0.0 && off < 0.2, "{key}: {off}");
    }
    // the stored log-probs take their place in later steps
    let mut old = vec![Vec::new(); 3 * G];
    sums.old.iter().for_each(|(place, logps)| old[*place].clone_from(logps));
    let (again, later) = of(groups, &old, 10.0, false);
    assert_eq!((again.ratio_min, again.ratio_max), (1.0, 1.0));
    assert_same_bits(&weighted, &later, "stored log-probs");
}

#[test]
fn fused_and_composed_paths_agree() {
    let Some(fused) = policy("gemma3") else { return };
    let Some(composed) = policy("gemma3").map(Policy::composed) else { return };
    let adapters = joint(&fused);
    for sampling in all_sampling() {
        let groups = sampled(&fused, &adapters, sampling);
        let loss = PolicyLoss { beta: 0.1, ..Default::default() };
        let objective = objective(loss, 0.02, sampling);
        let of = |policy: &Policy| {
            step((policy, &adapters), (&groups, &advantages()), &objective, (0, false, false))
        };
        let ((a, fused), (b, composed)) = (of(&fused), of(&composed));
        assert!((a.loss - b.loss).abs() < 1e-5, "{} {}", a.loss, b.loss);
        assert!((a.entropy - b.entropy).abs() < 1e-4 * a.entropy, "{} {}", a.entropy, b.entropy);
        for (key, gradient) in &fused {
            let error = relative(&composed[key], gradient);
            assert!(error < 2e-4, "{sampling:?} {key}: {error}");
        }
    }
}

#[test]
fn gradients_are_the_slope_of_the_loss() {
    let Some(policy) = policy("llama3-scaled-rope") else { return };
    let mut adapters: Adapters = vec![lora(&policy)];
    let filters = SamplingParams { top_p: 0.9, temperature: 0.9, ..Default::default() };
    for sampling in [SamplingParams::default(), filters] {
        let groups = sampled(&policy, &adapters, sampling);
        let loss = PolicyLoss { beta: 0.2, ..Default::default() };
        let objective = objective(loss, 0.05, sampling);
        let way = (0, false, false);
        let (_, gradients) = step((&policy, &adapters), (&groups, &advantages()), &objective, way);
        // along the gradient the slope is its squared norm
        let start = adapters[0].parameters().clone();
        let norm: f64 = gradients.values().map(squares).sum();
        let mut loss_at = |by: f64| {
            let moved = start.iter().map(|(key, value)| match gradients.get(key) {
                Some(g) => (key.clone(), (value + (g * by).unwrap()).unwrap()),
                None => (key.clone(), value.clone()),
            });
            let moved = moved.collect();
            adapters[0].set_parameters(moved);
            step((&policy, &adapters), (&groups, &advantages()), &objective, way).0.loss
        };
        let by = 2e-3 / norm.sqrt();
        let slope = (loss_at(by) - loss_at(-by)) / (2.0 * by);
        loss_at(0.0);
        assert!((slope / norm - 1.0).abs() < 2e-3, "{sampling:?}: {slope} {norm}");
    }
}

fn squares(tensor: &candle_core::Tensor) -> f64 {
    f64::from(tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
}
