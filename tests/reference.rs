//! The policy, its adapters and their gradients against numbers from transformers and PEFT.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};
use common::{FAMILIES, gpu, max_diff, policy, reference, relative, shared};
use steersman::adapter::{Adapter, BaseModel, Steering, SteeringConfig, SteeringKind, load, save};
use steersman::model::{Batch, Policy};
use steersman::ops::{Engine, Gradients, Tape, Target};
use steersman::rollout::{GenerateOptions, Generator, Request};

type Adapters = Vec<Box<dyn Adapter>>;

/// Everything that `steer forward` reports, through the library.
struct Run {
    logits: Tensor,
    loss: f32,
    grads: Gradients,
}

fn run(policy: &Policy, adapters: &Adapters, refs: &HashMap<String, Tensor>) -> Run {
    let ids: Vec<Vec<i64>> = refs["input_ids"].to_vec2().unwrap();
    let mask: Vec<Vec<i64>> = refs["loss_mask"].to_vec2().unwrap();
    let mut batch = Batch::new();
    let mut targets = Vec::new();
    for (ids, mask) in ids.iter().zip(&mask) {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        let start = batch.len() as u32;
        batch.push(&ids, 0, None);
        let chosen = (1..ids.len()).filter(|t| mask[*t] == 1);
        targets.extend(chosen.map(|t| Target { row: start + t as u32 - 1, token: ids[t] }));
    }
    let embedded = policy.embed(&batch.input_ids).unwrap();
    let trace = policy.trace(&batch, embedded, adapters, false).unwrap();
    let rows: Vec<u32> = (0..batch.len() as u32).collect();
    let logits = policy.logits(trace.output(), &rows).unwrap();
    let tape = Tape::recording(policy.engine());
    let h = tape.input(trace.output());
    let weights = vec![-1.0 / targets.len() as f32; targets.len()];
    let (loss, _) = policy.weighted_logps(&tape, &h, &targets, &weights).unwrap();
    let one = Tensor::ones(1, candle_core::DType::F32, policy.engine().device()).unwrap();
    let value = loss.tensor().to_vec1::<f32>().unwrap()[0];
    let dh = tape.backward_to_input(&loss, one, &h).unwrap().0.unwrap();
    Run { logits, loss: value, grads: trace.backward(dh).unwrap() }
}

fn steering(policy: &Policy, refs: &HashMap<String, Tensor>, kind: SteeringKind) -> Adapters {
    let config = SteeringConfig { kind, rank: 4, ..SteeringConfig::post_block(policy.config()) };
    let device = policy.engine().device();
    let fresh = Steering::new(config, policy.config(), 0, device).unwrap();
    let mut adapter: Box<dyn Adapter> = Box::new(fresh);
    let values: BTreeMap<String, Tensor> = adapter
        .parameters()
        .keys()
        .map(|key| {
            let name = format!("steer_{kind}.{}", key.trim_end_matches(".weight"));
            (key.clone(), refs[&name].to_device(device).unwrap())
        })
        .collect();
    adapter.set_parameters(values);
    vec![adapter]
}

fn check(label: &str, run: &Run, refs: &HashMap<String, Tensor>, prefix: &str, tolerance: f32) {
    let name =
        |what: &str| if prefix.is_empty() { what.into() } else { format!("{prefix}.{what}") };
    let logits = max_diff(&run.logits, &refs[&name("logits")]);
    assert!(logits <= tolerance, "{label}: logits differ by {logits}");
    let loss = refs[&name("loss")].to_vec1::<f32>().unwrap()[0];
    assert!((run.loss - loss).abs() <= 1e-5, "{label}: loss {} not {loss}", run.loss);
    for (key, grad) in &run.grads {
        let steering = format!("{prefix}.{}.grad", key.trim_end_matches(".weight"));
        let wanted = refs.get(&steering).unwrap_or_else(|| &refs[&format!("{prefix}.grad.{key}")]);
        let off = relative(grad, wanted);
        assert!(off <= 1e-4, "{label}: gradient of {key} is off by {off}");
    }
}

fn greedy(policy: &Policy, adapters: &Adapters, wanted: &Tensor) -> (Vec<u32>, Vec<u32>) {
    let wanted: Vec<u32> =
        wanted.flatten_all().unwrap().to_vec1::<i64>().unwrap().iter().map(|i| *i as u32).collect();
    let options = GenerateOptions { max_new_tokens: wanted.len() - 10, ..Default::default() };
    let request = Request { prompt: wanted[..10].to_vec(), prompt_id: 0, sample: 0 };
    let generator = Generator::new(policy, adapters, &options, None);
    let completion = generator.run(&[request], &mut |_| {}).unwrap().remove(0);
    (completion.tokens, wanted[10..].to_vec())
}

fn check_family(folder: &Path, engine: &Engine) {
    let refs = reference(folder);
    let policy = policy(folder, engine);
    let family = folder.display();
    let label = |what: &str| format!("{family} {what}");
    check(&label("base"), &run(&policy, &vec![], &refs), &refs, "", 1e-4);
    let (found, wanted) = greedy(&policy, &vec![], &refs["greedy"]);
    assert_eq!(found, wanted, "{family} greedy");
    for kind in [SteeringKind::Linear, SteeringKind::Silu] {
        let prefix = format!("steer_{kind}");
        let adapters = steering(&policy, &refs, kind);
        let steered = run(&policy, &adapters, &refs);
        assert_eq!(steered.grads.len(), 2 * policy.config().layers.len());
        check(&label(&prefix), &steered, &refs, &prefix, 1e-3);
        let (found, wanted) = greedy(&policy, &adapters, &refs[&format!("{prefix}.greedy")]);
        assert_eq!(found, wanted, "{family} {prefix} greedy");
    }
    let lora = load(&folder.join("lora"), policy.config(), engine.device()).unwrap();
    let adapted = run(&policy, &lora, &refs);
    assert_eq!(adapted.grads.len(), 14 * policy.config().layers.len());
    check(&label("lora"), &adapted, &refs, "lora", 1e-4);
}

#[test]
fn every_family_agrees_with_transformers_and_peft() {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        check_family(&folder, &Engine::cpu());
    }
}

#[test]
fn the_composed_twins_agree_with_transformers_and_peft() {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        check_family(&folder, &Engine::cpu().composed());
    }
}

#[test]
fn a_gpu_agrees_with_transformers_and_peft() {
    let Some(engine) = gpu() else { return };
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        check_family(&folder, &engine);
    }
}

#[test]
fn a_saved_adapter_loads_to_the_same_bytes() {
    let Some(folder) = shared("fixtures/qwen3") else { return };
    let (policy, refs) = (policy(&folder, &Engine::cpu()), reference(&folder));
    let mut adapters = steering(&policy, &refs, SteeringKind::Silu);
    adapters.extend(load(&folder.join("lora"), policy.config(), &Device::Cpu).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let base = BaseModel { name_or_path: "qwen3".into(), sha256: None };
    save(dir.path(), &adapters, &base).unwrap();
    let again = load(dir.path(), policy.config(), &Device::Cpu).unwrap();
    assert_eq!(again.len(), 2);
    for (before, after) in adapters.iter().zip(&again) {
        assert_eq!(before.files(&base).unwrap()[1], after.files(&base).unwrap()[1]);
    }
}
