//! A GPU against the CPU: log-probs, gradients, sampling, and runs of the real programs.
//!
//! `scripts/build_cuda.sh` builds these tests; without a GPU they skip visibly.

mod common;

use common::passes::{
    Adapters, adapter_sets, alone, gradients, packed, target_logps, targets, text,
};
use common::program::{
    GRPO, Place, SFT, STEER, adapter_files, run, series, text as shown, timeless,
};
use common::{FAMILIES, gpu, policy, relative, shared};
use steersman::model::{Batch, Policy};
use steersman::ops::{Engine, Target};
use steersman::rollout::{GenerateOptions, Generator, Request, SamplingParams};

/// What rounding may do to a log-prob.
const TOLERANCE: f32 = 2e-4;

/// Two sequences packed, and their targets.
fn pass(policy: &Policy) -> (Batch, Vec<Target>) {
    let (mut batch, mut wanted) = (Batch::new(), Vec::new());
    for (seed, len) in [(0, 23), (1, 40)] {
        let ids = text(policy, seed, len);
        wanted.extend(targets(batch.len(), &ids));
        batch.push(&ids, 5, None);
    }
    (batch, wanted)
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Calls `check` with every family's policy on the CPU and on the GPU.
fn on_both(check: impl Fn(&Policy, &Policy, &str)) {
    let Some(engine) = gpu() else { return };
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        check(&policy(&folder, &Engine::cpu()), &policy(&folder, &engine), family);
    }
}

#[test]
fn every_adapters_gradients_are_the_cpus() {
    on_both(|cpu, gpu, family| {
        let all = adapter_sets(cpu).into_iter().zip(adapter_sets(gpu));
        for ((what, on_cpu), (_, on_gpu)) in all {
            let (batch, wanted) = pass(cpu);
            let logps = |policy: &Policy, adapters: &Adapters| {
                target_logps(policy, policy.hidden(&batch, adapters).unwrap(), &wanted)
            };
            let off = apart(&logps(cpu, &on_cpu), &logps(gpu, &on_gpu));
            assert!(off <= TOLERANCE, "{family} {what}: log-probs {off} apart");
            for checkpointing in [false, true] {
                let of = |policy, adapters| {
                    gradients(policy, adapters, &[pass(policy)], checkpointing).0
                };
                let (found, wanted) = (of(gpu, &on_gpu), of(cpu, &on_cpu));
                assert!(found.keys().eq(wanted.keys()), "{family} {what}");
                for (key, gradient) in &found {
                    let off = relative(gradient, &wanted[key]);
                    assert!(off <= 1e-3, "{family} {what}: gradient of {key} off by {off}");
                }
            }
        }
    });
}

#[test]
fn packed_and_sampled_log_probs_are_near_those_of_a_sequence_alone() {
    on_both(|_, gpu, family| {
        for (what, adapters) in adapter_sets(gpu) {
            let all: Vec<_> = [(2, 9), (3, 30)].map(|(s, n)| (text(gpu, s, n), 4)).into();
            for ((ids, prompt), found) in all.iter().zip(packed(gpu, &adapters, &all)) {
                let off = apart(&found, &alone(gpu, &adapters, ids, *prompt));
                assert!(off <= TOLERANCE, "{family} {what}: packed {off} apart");
            }
            let options = GenerateOptions {
                max_new_tokens: 12,
                sampling: SamplingParams::default(),
                ..GenerateOptions::default()
            };
            let prompt = text(gpu, 7, 8);
            let request = |sample| Request { prompt: prompt.clone(), prompt_id: 0, sample };
            let requests: Vec<Request> = (0..3).map(request).collect();
            let generator = Generator::new(gpu, &adapters, &options, None);
            for completion in generator.run(&requests, &mut |_| {}).unwrap() {
                let whole = [&prompt[..], &completion.tokens].concat();
                let trained = &alone(gpu, &adapters, &whole, 8)[prompt.len() - 1..];
                let off = apart(trained, &completion.logps);
                assert!(off <= TOLERANCE, "{family} {what}: sampled {off} apart");
            }
        }
    });
}

#[test]
fn supervised_runs_learn_as_on_the_cpu_and_repeat_to_the_byte() {
    if gpu().is_none() {
        return;
    }
    let fixed = "--max_steps 12 --per_device_train_batch_size 4 --learning_rate 1e-2 \
                 --max_eval_samples 8 --save_steps 5";
    let Some(place) = Place::of(SFT, fixed, 64) else { return };
    for adapter in ["steering", "lora --lora_dropout 0.1", "joint --neftune_noise_alpha 5"] {
        let keys = format!("--adapter {adapter}");
        let name = adapter.split(' ').next().unwrap_or_default();
        place.run(&format!("{name}-cpu"), &keys).ok();
        for again in ["a", "b"] {
            place.run(&format!("{name}-{again}"), &format!("{keys} --device cuda")).ok();
        }
        let of = |end: &str| place.dir(&format!("{name}-{end}"));
        let losses = |end: &str| series(&of(end), "loss");
        let pairs = losses("cpu").into_iter().zip(losses("a"));
        assert!(pairs.clone().count() >= 2 && pairs.clone().all(|(a, b)| (a - b).abs() <= 1e-3));
        assert_eq!(timeless(&of("a")), timeless(&of("b")), "{adapter}");
        assert!(adapter_files(&of("a")) == adapter_files(&of("b")), "{adapter}: other bytes");
    }
}

#[test]
fn policy_gradient_runs_repeat_to_the_byte_with_ratios_near_one() {
    if gpu().is_none() {
        return;
    }
    let fixed = "--max_steps 5 --prompts_per_step 3 --num_generations 4 --max_eval_samples 4 \
                 --max_completion_length 12 --learning_rate 1e-2 --beta 0.04 --device cuda \
                 --reward_funcs repetition_penalty_reward(ngram=1) --temperature 0.8 --top_k 40";
    let Some(place) = Place::of(GRPO, fixed, 24) else { return };
    for adapter in ["steering", "lora", "joint"] {
        let of = |end: &str| place.dir(&format!("{adapter}-{end}"));
        for end in ["a", "b"] {
            place.run(&format!("{adapter}-{end}"), &format!("--adapter {adapter}")).ok();
        }
        for end in ["min", "max"] {
            let name = format!("sampling/importance_sampling_ratio/{end}");
            let ratios = series(&of("a"), &name);
            let near = |ratio: &f64| (ratio - 1.0).abs() <= 1e-3;
            assert!(ratios.len() >= 2 && ratios.iter().all(near), "{adapter} {end} {ratios:?}");
        }
        assert_eq!(timeless(&of("a")), timeless(&of("b")), "{adapter}");
        assert!(adapter_files(&of("a")) == adapter_files(&of("b")), "{adapter}: other bytes");
    }
}

#[test]
fn greedy_text_is_the_cpus() {
    if gpu().is_none() {
        return;
    }
    let Some(model) = shared("models/stories260k") else { return };
    let say = |device: &str| {
        let args =
            ["generate", "--model_name_or_path", shown(&model), "--prompt", "Once upon a time"];
        let more = ["--raw", "--max_new_tokens", "40", "--temperature", "0", "--device", device];
        run(STEER, &[&args[..], &more].concat()).ok().stdout
    };
    assert_eq!(say("cuda"), say("cpu"));
}
