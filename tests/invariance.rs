//! Cached = full = packed = shared prefix, for every family, with and without adapters.

mod common;

use candle_core::{Device, Tensor};
use common::passes::{
    Adapters, adapter_sets, alone, assert_same_bits, gradients, packed, sequences, steering,
    target_logps, targets,
};
use common::{FAMILIES, policy, policy_stored_as, relative, shared};
use steersman::adapter::{
    Lora, LoraConfig, Positions, Site, Steering, SteeringConfig, SteeringKind,
};
use steersman::model::{Batch, Policy, part_tokens};
use steersman::ops::{Engine, Gradients, KvCache, MatmulPrecision, Target, WeightDtype};
use steersman::rollout::{GenerateOptions, Generator, Request, SamplingParams};

const PROMPT: usize = 13;

/// The prompt in one pass, then the rest in pieces of `piece` tokens, from the cache.
fn cached(policy: &Policy, adapters: &Adapters, ids: &[u32], piece: usize) -> Vec<f32> {
    let mut cache = policy.kv_cache();
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
    let targets: Vec<Target> = targets(0, ids).collect();
    target_logps(policy, Tensor::cat(&hidden, 0).unwrap(), &targets)
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
    let logps = target_logps(policy, policy.hidden(&batch, adapters).unwrap(), &targets);
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
    check_passes(MatmulPrecision::High, WeightDtype::F32);
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
            let all_packed: Vec<_> = all.iter().map(|ids| (ids.clone(), PROMPT)).collect();
            let full = packed(&policy, &adapters, &all_packed);
            for (ids, full) in all.iter().zip(&full) {
                assert_eq!(alone(&policy, &adapters, ids, PROMPT), *full, "{family} {name} alone");
            }
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
        let adapters =
            vec![steering(&policy, SteeringKind::Linear, Site::PostBlock, Positions::All)];
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
            let prompt = request.prompt.len();
            assert_eq!(alone(&policy, &adapters, &whole, prompt)[prompt - 1..], *drawn);
        }
    }
}

#[test]
fn forks_share_pages_until_they_write_and_give_them_back() {
    let Some(folder) = shared("fixtures/qwen3") else { return };
    let medium = Engine::cpu().with_precision(MatmulPrecision::Medium);
    for (engine, tolerance, pages) in
        [(Engine::cpu(), 0.0, 15), (medium, 0.0, 15), (Engine::cpu().composed(), 1e-5, 0)]
    {
        let policy = policy(&folder, &engine);
        let base = Adapters::new();
        let ids: Vec<u32> = sequences(&folder)[0].iter().copied().cycle().take(130).collect();
        let mut cache = policy.kv_cache();
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

#[test]
fn a_cache_of_another_precision_is_refused() {
    let Some(folder) = shared("fixtures/qwen3") else { return };
    let policy = policy(&folder, &Engine::cpu());
    let mut cache = policy.at_precision(MatmulPrecision::Medium).kv_cache();
    let (slot, mut batch) = (cache.open(), Batch::new());
    batch.push_cached(&[1, 2, 3], 3, 0);
    let error = policy.hidden_cached(&batch, &Adapters::new(), &mut cache, &[slot]).unwrap_err();
    assert!(error.to_string().contains("another matmul_precision"), "{error}");
}

/// Gradients of all tokens of the groups' sequences after the prompt, a pass for each group.
fn gradients_of(
    policy: &Policy,
    adapters: &Adapters,
    groups: &[Vec<Vec<u32>>],
    checkpointing: bool,
) -> Gradients {
    let pass = |group: &Vec<Vec<u32>>| {
        let (mut batch, mut wanted) = (Batch::new(), Vec::new());
        for ids in group {
            wanted.extend(targets(batch.len(), ids).skip(PROMPT - 1));
            batch.push(ids, PROMPT, None);
        }
        (batch, wanted)
    };
    let passes: Vec<_> = groups.iter().map(pass).collect();
    gradients(policy, adapters, &passes, checkpointing).0
}

#[test]
fn micro_batches_change_no_bit_of_a_gradient() {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        let policy = policy(&folder, &Engine::cpu());
        let all = sequences(&folder);
        let apart: Vec<_> = all.iter().map(|ids| vec![ids.clone()]).collect();
        for (name, adapters) in adapter_sets(&policy).into_iter().skip(1) {
            let packed = gradients_of(&policy, &adapters, std::slice::from_ref(&all), false);
            let unpacked = gradients_of(&policy, &adapters, &apart, false);
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
        let kept = gradients_of(&policy, &adapters, std::slice::from_ref(&all), false);
        let again = gradients_of(&policy, &adapters, std::slice::from_ref(&all), true);
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
        let kept = gradients_of(&policy, &adapters, std::slice::from_ref(&all), false);
        let again = gradients_of(&policy, &adapters, std::slice::from_ref(&all), true);
        assert_same_bits(&kept, &again, &format!("{name} recomputed"));
        let halves: Vec<_> = all.chunks(count / 2).map(<[_]>::to_vec).collect();
        let halves = gradients_of(&policy, &adapters, &halves, false);
        assert_same_bits(&kept, &halves, &format!("{name} in halves"));
        let all: Vec<_> = all.iter().map(|ids| (ids.clone(), PROMPT)).collect();
        let last = packed(&policy, &adapters, &all).pop();
        assert_eq!(last, Some(alone(&policy, &adapters, &all[count - 1].0, PROMPT)), "{name}");
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
