//! Cached = full = packed = shared prefix, for every family, with and without adapters.

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{FAMILIES, policy, policy_stored_as, reference, relative, shared};
use steersman::adapter::{
    Adapter, Lora, LoraConfig, Positions, Site, Steering, SteeringConfig, SteeringKind,
};
use steersman::model::{Batch, Policy, part_tokens};
use steersman::ops::{
    Engine, GradientSums, Gradients, KvCache, MatmulPrecision, Tape, Target, Value, WeightDtype,
};

use steersman::rollout::{GenerateOptions, Generator, Request, SamplingParams};

type Adapters = Vec<Box<dyn Adapter>>;

/// Adapters whose every parameter is far from zero.
fn randomised(mut adapter: Box<dyn Adapter>) -> Box<dyn Adapter> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let fill = |tensor: &Tensor, next: &mut dyn FnMut() -> f32| {
        let values: Vec<f32> = (0..tensor.elem_count()).map(|_| 0.3 * next()).collect();
        Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap()
    };
    let parameters = adapter.parameters().clone();
    let filled = parameters.into_iter().map(|(key, old)| (key, fill(&old, &mut next)));
    let filled = filled.collect();
    adapter.set_parameters(filled);
    adapter
}

fn steering(policy: &Policy, kind: SteeringKind, site: Site, positions: Positions) -> Adapters {
    let base = SteeringConfig::post_block(policy.config());
    let config = SteeringConfig { kind, site, positions, rank: 3, ..base };
    let fresh = Steering::new(config, policy.config(), 1, &Device::Cpu).unwrap();
    vec![randomised(Box::new(fresh))]
}

/// One of each kind, site and position, LoRA, and steering with LoRA.
fn adapter_sets(policy: &Policy) -> Vec<(String, Adapters)> {
    let mut sets: Vec<(String, Adapters)> = vec![("base".into(), vec![])];
    for kind in SteeringKind::ALL {
        let adapters = steering(policy, kind, Site::PostBlock, Positions::All);
        sets.push((format!("{kind} post_block"), adapters));
    }
    for site in Site::ALL {
        let adapters = steering(policy, SteeringKind::Linear, site, Positions::All);
        sets.push((format!("linear {site}"), adapters));
    }
    for positions in [Positions::Ends { first: 0, last: 1 }, Positions::Ends { first: 2, last: 3 }]
    {
        for kind in [SteeringKind::Vector, SteeringKind::Silu] {
            let adapters = steering(policy, kind, Site::PostBlock, positions);
            sets.push((format!("{kind} at {positions}"), adapters));
        }
    }
    let lora = || {
        let config = LoraConfig { r: 3, ..LoraConfig::all_linear() };
        let fresh = Lora::new(config, policy.config(), 1, &Device::Cpu).unwrap();
        randomised(Box::new(fresh))
    };
    sets.push(("lora".into(), vec![lora()]));
    let mut joint = steering(policy, SteeringKind::Linear, Site::PostBlock, Positions::All);
    joint.push(lora());
    sets.push(("joint".into(), joint));
    sets
}

const PROMPT: usize = 13;

fn sequences(folder: &Path) -> Vec<Vec<u32>> {
    let ids: Vec<Vec<i64>> = reference(folder)["input_ids"].to_vec2().unwrap();
    ids.into_iter().map(|row| row.into_iter().map(|id| id as u32).collect()).collect()
}

/// Log-probs of tokens 1.. of a packed sequence that starts at row `start`.
fn logps(policy: &Policy, hidden: &Tensor, start: usize, ids: &[u32]) -> Vec<f32> {
    let target = |t: usize| Target { row: (start + t - 1) as u32, token: ids[t] };
    let targets: Vec<Target> = (1..ids.len()).map(target).collect();
    let tape = Tape::off(policy.engine());
    policy.token_logps(&tape, &Value::constant(hidden.clone()), &targets).unwrap().1.logps
}

fn alone(policy: &Policy, adapters: &Adapters, ids: &[u32]) -> Vec<f32> {
    let mut batch = Batch::new();
    batch.push(ids, PROMPT, None);
    logps(policy, &policy.hidden(&batch, adapters).unwrap(), 0, ids)
}

fn packed(policy: &Policy, adapters: &Adapters, all: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut batch = Batch::new();
    for ids in all {
        batch.push(ids, PROMPT, None);
    }
    let hidden = policy.hidden(&batch, adapters).unwrap();
    let starts = all.iter().scan(0, |next, ids| Some(std::mem::replace(next, *next + ids.len())));
    starts.zip(all).map(|(start, ids)| logps(policy, &hidden, start, ids)).collect()
}

/// The prompt in one pass, then the rest in pieces of `piece` tokens, from the cache.
fn cached(policy: &Policy, adapters: &Adapters, ids: &[u32], piece: usize) -> Vec<f32> {
    let mut cache = KvCache::new(policy.config().layers.len());
    let slot = cache.open();
    let mut hidden = Vec::new();
    let mut done = 0;
    while done < ids.len() {
        let len = if done == 0 { PROMPT } else { piece.min(ids.len() - done) };
        let mut batch = Batch::new();
        batch.push_cached(&ids[done..done + len], PROMPT, done);
        hidden.push(policy.hidden_cached(&batch, adapters, &mut cache, &[slot]).unwrap());
        done += len;
    }
    logps(policy, &Tensor::cat(&hidden, 0).unwrap(), 0, ids)
}

/// Log-probs of each sequence's tokens after the prompt, which all share.
fn shared_prefix(policy: &Policy, adapters: &Adapters, all: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut batch = Batch::new();
    let parent = batch.push(&all[0][..PROMPT], PROMPT, None);
    let mut targets = Vec::new();
    for ids in all {
        let start = batch.len();
        batch.push(&ids[PROMPT..], PROMPT, Some(parent));
        let row = |t: usize| if t == PROMPT { PROMPT - 1 } else { start + t - PROMPT - 1 };
        targets.extend((PROMPT..ids.len()).map(|t| Target { row: row(t) as u32, token: ids[t] }));
    }
    let hidden = Value::constant(policy.hidden(&batch, adapters).unwrap());
    let tape = Tape::off(policy.engine());
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|i| targets[*i].row);
    let sorted: Vec<Target> = order.iter().map(|i| targets[*i]).collect();
    let found = policy.token_logps(&tape, &hidden, &sorted).unwrap().1.logps;
    let mut logps = vec![0.0; found.len()];
    order.iter().zip(found).for_each(|(i, logp)| logps[*i] = logp);
    logps.chunks(all[0].len() - PROMPT).map(<[f32]>::to_vec).collect()
}

#[test]
fn cached_full_packed_and_shared_prefix_agree_to_the_bit() {
    check_passes(MatmulPrecision::Highest, WeightDtype::F32);
}

#[test]
fn passes_agree_to_the_bit_with_bf16_weights() {
    check_passes(MatmulPrecision::Highest, WeightDtype::Bf16);
}

#[test]
fn passes_agree_to_the_bit_at_high_and_medium_precision() {
    check_passes(MatmulPrecision::High, WeightDtype::Bf16);
    check_passes(MatmulPrecision::Medium, WeightDtype::Bf16);
    check_passes(MatmulPrecision::Medium, WeightDtype::F32);
}

/// Holds full, packed, cached and shared-prefix log-probs against each other.
fn check_passes(precision: MatmulPrecision, dtype: WeightDtype) {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        let policy = policy_stored_as(&folder, &Engine::new(Device::Cpu, precision), dtype);
        let mut all = sequences(&folder);
        let prompt = all[0][..PROMPT].to_vec();
        all[1][..PROMPT].copy_from_slice(&prompt);
        for (name, adapters) in adapter_sets(&policy) {
            let full: Vec<_> = all.iter().map(|ids| alone(&policy, &adapters, ids)).collect();
            assert_eq!(packed(&policy, &adapters, &all), full, "{family} {name} packed");
            for piece in [1, 5] {
                let cached = cached(&policy, &adapters, &all[1], piece);
                assert_eq!(cached, full[1], "{family} {name} cached by {piece}");
            }
            let ends: Vec<_> = full.iter().map(|logps| logps[PROMPT - 1..].to_vec()).collect();
            assert_eq!(shared_prefix(&policy, &adapters, &all), ends, "{family} {name} shared");
        }
    }
}

#[test]
fn samples_of_a_prompt_drawn_together_are_those_drawn_alone_with_the_trainers_log_probs() {
    for family in ["llama3-scaled-rope", "gemma3"] {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        let policy = policy_stored_as(&folder, &Engine::cpu(), WeightDtype::Bf16);
        let adapters = steering(&policy, SteeringKind::Linear, Site::PostBlock, Positions::All);
        let prompts = sequences(&folder);
        let request = |i: usize| Request {
            prompt: prompts[0].iter().copied().cycle().take([1, PROMPT, 65][i / 5]).collect(),
            prompt_id: i as u64 / 5,
            sample: i as u64 % 5,
        };
        let requests: Vec<Request> = (0..15).map(request).collect();
        let draw = |max_batch: usize| -> Vec<(Vec<u32>, Vec<f32>)> {
            let options =
                GenerateOptions { max_new_tokens: 70, max_batch, ..GenerateOptions::default() };
            let options = GenerateOptions { sampling: SamplingParams::default(), ..options };
            let generator = Generator::new(&policy, &adapters, &options, None);
            let done = generator.run(&requests, &mut |_| {}).unwrap();
            done.into_iter().map(|completion| (completion.tokens, completion.logps)).collect()
        };
        let together = draw(15);
        assert_eq!(together, draw(1), "{family}");
        assert_eq!(together, draw(3), "{family}");
        assert_ne!(together[0].0, together[1].0, "{family}");
        for (request, (tokens, drawn)) in requests.iter().zip(&together) {
            let whole = [request.prompt.as_slice(), tokens].concat();
            assert_eq!(alone(&policy, &adapters, &whole)[request.prompt.len() - 1..], *drawn);
        }
    }
}

#[test]
fn forks_share_pages_until_they_write_and_give_them_back() {
    let Some(folder) = shared("fixtures/qwen3") else { return };
    for (engine, tolerance, pages) in
        [(Engine::cpu(), 0.0, 15), (Engine::cpu().composed(), 1e-5, 0)]
    {
        let policy = policy(&folder, &engine);
        let base = Adapters::new();
        let ids: Vec<u32> = sequences(&folder)[0].iter().copied().cycle().take(130).collect();
        let mut cache = KvCache::new(policy.config().layers.len());
        let pass = |cache: &mut KvCache, slot, from: usize, to: usize| {
            let mut batch = Batch::new();
            batch.push_cached(&ids[from..to], PROMPT, from);
            policy.hidden_cached(&batch, &base, cache, &[slot]).unwrap()
        };
        let parent = cache.open();
        let whole = pass(&mut cache, parent, 0, 130);
        let mut slots = vec![parent];
        for len in [1, 63, 64, 65, 128, 129] {
            let slot = cache.fork(parent, len).unwrap();
            assert_eq!(cache.len(slot), len);
            let rest = pass(&mut cache, slot, len, 130);
            let wanted = whole.narrow(0, len, 130 - len).unwrap();
            let off = relative(&rest, &wanted);
            assert!(off <= tolerance, "{len}: {off}");
            slots.push(slot);
        }
        // pages of 64: three of the parent's, then 3 + 3 + 2 + 2 + 1 + 1 that forks wrote to
        assert_eq!(cache.pages_held(), pages);
        slots.into_iter().for_each(|slot| cache.close(slot));
        assert!(cache.pages_held() == 0 && cache.is_empty());
    }
}

/// Gradients of the mean negative log-likelihood of all tokens of `all` after the prompt.
fn gradients(
    policy: &Policy,
    adapters: &Adapters,
    groups: &[Vec<Vec<u32>>],
    checkpointing: bool,
) -> Gradients {
    let n: usize = groups.iter().flatten().map(|ids| ids.len() - PROMPT).sum();
    let mut sums = GradientSums::new();
    for group in groups {
        let (mut batch, mut targets) = (Batch::new(), Vec::new());
        for ids in group {
            let start = batch.len();
            batch.push(ids, PROMPT, None);
            let target = |t: usize| Target { row: (start + t - 1) as u32, token: ids[t] };
            targets.extend((PROMPT..ids.len()).map(target));
        }
        let embedded = policy.embed(&batch.input_ids).unwrap();
        let trace = policy.trace(&batch, embedded, adapters, checkpointing).unwrap();
        let tape = Tape::recording(policy.engine());
        let h = tape.input(trace.output());
        let weights = vec![-1.0 / n as f32; targets.len()];
        let (loss, _) = policy.weighted_logps(&tape, &h, &targets, &weights).unwrap();
        let one = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
        let dh = tape.backward_to_input(&loss, one, &h).unwrap().0.unwrap();
        trace.backward_into(dh, &mut sums).unwrap();
    }
    sums.finish(policy.engine()).unwrap()
}

#[test]
fn micro_batches_change_no_bit_of_a_gradient() {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        let policy = policy(&folder, &Engine::cpu());
        let all = sequences(&folder);
        let apart: Vec<_> = all.iter().map(|ids| vec![ids.clone()]).collect();
        for (name, adapters) in adapter_sets(&policy).into_iter().skip(1) {
            let packed = gradients(&policy, &adapters, std::slice::from_ref(&all), false);
            let unpacked = gradients(&policy, &adapters, &apart, false);
            assert_eq!(packed.len(), adapters.iter().map(|a| a.parameters().len()).sum::<usize>());
            assert_same_bits(&packed, &unpacked, &format!("{family} {name}"));
        }
    }
}

#[test]
fn checkpointing_changes_no_bit_of_a_gradient() {
    let Some(folder) = shared("fixtures/gemma3") else { return };
    let policy = policy(&folder, &Engine::cpu());
    let all = sequences(&folder);
    for (name, adapters) in adapter_sets(&policy).into_iter().skip(1) {
        let kept = gradients(&policy, &adapters, std::slice::from_ref(&all), false);
        let again = gradients(&policy, &adapters, std::slice::from_ref(&all), true);
        assert_same_bits(&kept, &again, &name);
    }
}

/// A batch of several parts, whose ends are no ends of the sums' chains.
#[test]
fn passes_in_parts_change_no_bit() {
    let Some(folder) = shared("fixtures/llama-tied") else { return };
    let policy = policy(&folder, &Engine::cpu());
    let few = sequences(&folder);
    let count = 2 * part_tokens() / few[0].len() + 9;
    let all: Vec<_> = few.into_iter().cycle().take(count).collect();
    let tokens = all.iter().map(Vec::len).sum::<usize>();
    assert!(tokens > 2 * part_tokens() && all[0].len() % 256 != 0, "{tokens} tokens");
    for (name, adapters) in adapter_sets(&policy).into_iter().skip(1) {
        let kept = gradients(&policy, &adapters, std::slice::from_ref(&all), false);
        let again = gradients(&policy, &adapters, std::slice::from_ref(&all), true);
        assert_same_bits(&kept, &again, &format!("{name} recomputed"));
        let halves: Vec<_> = all.chunks(count / 2).map(<[_]>::to_vec).collect();
        let halves = gradients(&policy, &adapters, &halves, false);
        assert_same_bits(&kept, &halves, &format!("{name} in halves"));
        let last = packed(&policy, &adapters, &all).pop();
        assert_eq!(last, Some(alone(&policy, &adapters, &all[count - 1])), "{name}");
    }
}

fn assert_same_bits(a: &Gradients, b: &Gradients, what: &str) {
    let bits = |tensor: &Tensor| -> Vec<u32> {
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    assert!(a.keys().eq(b.keys()), "{what}: other parameters");
    for (key, gradient) in a {
        assert!(bits(gradient) == bits(&b[key]), "{what}: {key}");
    }
}

#[test]
fn a_fresh_adapter_leaves_every_logit_bit_identical() {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        let policy = policy(&folder, &Engine::cpu());
        let ids = &sequences(&folder)[0];
        let mut batch = Batch::new();
        batch.push(ids, PROMPT, None);
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        let logits = |adapters: &Adapters| -> Vec<Vec<u32>> {
            let hidden = policy.hidden(&batch, adapters).unwrap();
            let logits: Vec<Vec<f32>> = policy.logits(&hidden, &rows).unwrap().to_vec2().unwrap();
            logits.iter().map(|row| row.iter().map(|logit| logit.to_bits()).collect()).collect()
        };
        let base = logits(&vec![]);
        let config = policy.config();
        for kind in SteeringKind::ALL {
            for site in Site::ALL {
                let steering = SteeringConfig { kind, site, ..SteeringConfig::post_block(config) };
                let fresh = Steering::new(steering, config, 3, &Device::Cpu).unwrap();
                assert_eq!(logits(&vec![Box::new(fresh)]), base, "{family} {kind} {site}");
            }
        }
        let lora = Lora::new(LoraConfig::all_linear(), config, 3, &Device::Cpu).unwrap();
        assert_eq!(logits(&vec![Box::new(lora)]), base, "{family} lora");
    }
}
