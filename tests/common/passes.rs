//! Adapters of every kind at every site, and log-probs of passes with them.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use steersman::adapter::{
    Adapter, Lora, LoraConfig, Positions, Site, Steering, SteeringConfig, SteeringKind,
};
use steersman::model::{Batch, Policy};
use steersman::ops::{
    Engine, GradientSums, Gradients, MatmulPrecision, Tape, Target, Value, WeightDtype,
};

use super::{FAMILIES, policy_stored_as, reference, shared};

/// What is trained.
pub type Adapters = Vec<Box<dyn Adapter>>;

/// Every precision of products with every storage of matrices.
const FORMS: [(MatmulPrecision, WeightDtype); 6] = [
    (MatmulPrecision::Highest, WeightDtype::F32),
    (MatmulPrecision::Highest, WeightDtype::Bf16),
    (MatmulPrecision::High, WeightDtype::F32),
    (MatmulPrecision::High, WeightDtype::Bf16),
    (MatmulPrecision::Medium, WeightDtype::F32),
    (MatmulPrecision::Medium, WeightDtype::Bf16),
];

/// Calls `check` with the policy of every family in every form, and its name.
pub fn in_every_form(check: impl Fn(&Policy, &str)) {
    for family in FAMILIES {
        let Some(folder) = shared(&format!("fixtures/{family}")) else { return };
        for (precision, dtype) in FORMS {
            let policy = policy_stored_as(&folder, &Engine::new(Device::Cpu, precision), dtype);
            check(&policy, &format!("{family} {precision:?} {dtype:?}"));
        }
    }
}

/// Runs `work` on a pool of `threads`.
pub fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// Token ids that depend on `seed`.
pub fn text(policy: &Policy, seed: usize, len: usize) -> Vec<u32> {
    let vocab = policy.config().vocab_size;
    (0..len).map(|t| ((seed * 131 + t * t * 7 + t * 17) % vocab) as u32).collect()
}

/// Adapters whose every parameter is far from zero.
fn randomised(mut adapter: Box<dyn Adapter>) -> Box<dyn Adapter> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let fill = |tensor: &Tensor, next: &mut dyn FnMut() -> f32| {
        let values: Vec<f32> = (0..tensor.elem_count()).map(|_| 0.3 * next()).collect();
        Tensor::from_vec(values, tensor.shape(), tensor.device()).unwrap()
    };
    let parameters = adapter.parameters().clone();
    let filled = parameters.into_iter().map(|(key, old)| (key, fill(&old, &mut next)));
    let filled = filled.collect();
    adapter.set_parameters(filled);
    adapter
}

pub fn steering(
    policy: &Policy,
    kind: SteeringKind,
    site: Site,
    positions: Positions,
) -> Box<dyn Adapter> {
    let base = SteeringConfig::post_block(policy.config());
    let config = SteeringConfig { kind, site, positions, rank: 3, ..base };
    let fresh = Steering::new(config, policy.config(), 1, policy.engine().device()).unwrap();
    randomised(Box::new(fresh))
}

pub fn lora(policy: &Policy) -> Box<dyn Adapter> {
    let config = LoraConfig { r: 3, ..LoraConfig::all_linear() };
    let device = policy.engine().device();
    randomised(Box::new(Lora::new(config, policy.config(), 1, device).unwrap()))
}

/// Steering with LoRA.
pub fn joint(policy: &Policy) -> Adapters {
    let steering = steering(policy, SteeringKind::Linear, Site::PostBlock, Positions::All);
    vec![steering, lora(policy)]
}

/// Steering of all positions, steering of some, and LoRA at once.
pub fn several(policy: &Policy) -> Adapters {
    let ends = Positions::Ends { first: 2, last: 3 };
    let mut adapters = joint(policy);
    adapters.push(steering(policy, SteeringKind::Silu, Site::PostMlp, ends));
    adapters
}

/// The base, every kind at every site, some at some positions, LoRA, and steering with LoRA.
pub fn adapter_sets(policy: &Policy) -> Vec<(String, Adapters)> {
    let mut sets: Vec<(String, Adapters)> = vec![("base".into(), vec![])];
    for (kind, site) in SteeringKind::ALL.into_iter().flat_map(|k| Site::ALL.map(|s| (k, s))) {
        let adapters = vec![steering(policy, kind, site, Positions::All)];
        sets.push((format!("{kind} {site}"), adapters));
    }
    for positions in [Positions::Ends { first: 0, last: 1 }, Positions::Ends { first: 2, last: 3 }]
    {
        for kind in [SteeringKind::Vector, SteeringKind::Silu] {
            let adapters = vec![steering(policy, kind, Site::PostBlock, positions)];
            sets.push((format!("{kind} at {positions}"), adapters));
        }
    }
    sets.push(("lora".into(), vec![lora(policy)]));
    sets.push(("joint".into(), joint(policy)));
    sets
}

/// The reference sequences of a family.
pub fn sequences(folder: &Path) -> Vec<Vec<u32>> {
    let ids: Vec<Vec<i64>> = reference(folder)["input_ids"].to_vec2().unwrap();
    ids.into_iter().map(|row| row.into_iter().map(|id| id as u32).collect()).collect()
}

/// Log-probs of the targets, whose rows may come in any order, given the last block's output.
pub fn target_logps(policy: &Policy, hidden: Tensor, targets: &[Target]) -> Vec<f32> {
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|i| targets[*i].row);
    let sorted: Vec<Target> = order.iter().map(|i| targets[*i]).collect();
    let tape = Tape::off(policy.engine());
    let found = policy.token_logps(&tape, &Value::constant(hidden), &sorted).unwrap().1.logps;
    let mut logps = vec![0.0; found.len()];
    order.iter().zip(found).for_each(|(i, logp)| logps[*i] = logp);
    logps
}

/// Targets of tokens 1.. of a packed sequence that starts at row `start`.
pub fn targets(start: usize, ids: &[u32]) -> impl Iterator<Item = Target> {
    (1..ids.len()).map(move |t| Target { row: (start + t - 1) as u32, token: ids[t] })
}

/// Log-probs of tokens 1.. of a sequence in a pass of its own; its first `prompt` are the prompt.
pub fn alone(policy: &Policy, adapters: &Adapters, ids: &[u32], prompt: usize) -> Vec<f32> {
    packed(policy, adapters, &[(ids.to_vec(), prompt)]).remove(0)
}

/// Log-probs of tokens 1.. of each sequence, all packed into one pass.
pub fn packed(policy: &Policy, adapters: &Adapters, all: &[(Vec<u32>, usize)]) -> Vec<Vec<f32>> {
    let (mut batch, mut wanted) = (Batch::new(), Vec::new());
    for (ids, prompt) in all {
        wanted.extend(targets(batch.len(), ids));
        batch.push(ids, *prompt, None);
    }
    let logps = target_logps(policy, policy.hidden(&batch, adapters).unwrap(), &wanted);
    let mut rest = &logps[..];
    let mut of = |ids: &Vec<u32>| rest.split_off(..ids.len() - 1).unwrap().to_vec();
    all.iter().map(|(ids, _)| of(ids)).collect()
}

/// Gradients of the targets' mean negative log-likelihood, and the log-probs that the trainer sees.
/// Each pass is a batch and its targets in the order of their rows.
pub fn gradients(
    policy: &Policy,
    adapters: &Adapters,
    passes: &[(Batch, Vec<Target>)],
    checkpointing: bool,
) -> (Gradients, Vec<f32>) {
    let n: usize = passes.iter().map(|(_, targets)| targets.len()).sum();
    let (mut sums, mut logps) = (GradientSums::new(), Vec::new());
    for (batch, targets) in passes {
        let embedded = policy.embed(&batch.input_ids).unwrap();
        let trace = policy.trace(batch, embedded, adapters, checkpointing).unwrap();
        let tape = Tape::recording(policy.engine());
        let h = tape.input(trace.output());
        let weights = vec![-1.0 / n as f32; targets.len()];
        let (loss, said) = policy.weighted_logps(&tape, &h, targets, &weights).unwrap();
        logps.extend(said.logps);
        let one = Tensor::ones(1, DType::F32, policy.engine().device()).unwrap();
        let dh = tape.backward_to_input(&loss, one, &h).unwrap().0.unwrap();
        trace.backward_into(dh, &mut sums).unwrap();
    }
    (sums.finish(policy.engine()).unwrap(), logps)
}

pub fn assert_same_bits(a: &Gradients, b: &Gradients, what: &str) {
    let bits = |tensor: &Tensor| -> Vec<u32> {
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    assert!(a.keys().eq(b.keys()), "{what}: other parameters");
    for (key, gradient) in a {
        assert!(bits(gradient) == bits(&b[key]), "{what}: {key}");
    }
}
