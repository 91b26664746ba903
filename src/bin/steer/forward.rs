//! `steer forward`: logits, log-probs, loss and gradients of a file of token ids, for anyone who
//! wants to check the numbers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use clap::Args;
use serde::{Deserialize, Serialize};
use steersman::adapter::{Adapter, load_all, warn_of_other_model};
use steersman::config::{ModelArgs, ProfileArgs, Repeated, RunConfig};
use steersman::files::write_atomic;
use steersman::model::{Batch, LoadedModel, Policy};
use steersman::ops::{Tape, Target};
use steersman::{Error, Result};

use crate::forward_input::{Input, read_input};

/// Flags of `steer forward`.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(rename_all = "snake_case")]
#[serde(default)]
pub struct ForwardArgs {
    #[command(flatten)]
    #[serde(flatten)]
    model: ModelArgs,
    /// Adapter folder, ours or PEFT's LoRA; may be given several times
    adapter: Repeated,
    /// Safetensors file with `input_ids` [B, T] and optionally `loss_mask` [B, T], whose entry t
    /// counts the prediction of token t, and `prompt_lengths` `[B]`
    input: Option<PathBuf>,
    /// Safetensors file to write: `logits` [B, T, V], `logps` [B, T-1], `loss` `[1]`
    output: Option<PathBuf>,
    /// Write the gradient of the loss for each adapter parameter as `grad.<key>`
    gradients: bool,
    #[command(flatten)]
    #[serde(flatten)]
    profile: ProfileArgs,
}

impl RunConfig for ForwardArgs {
    const COMMAND: &'static str = "steer forward";
    const ABOUT: &'static str =
        "Logits, log-probs, loss and gradients of given token ids, as a file";

    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        let (Some(input), Some(output)) = (&self.input, &self.output) else {
            return Err(Error::usage("steer forward needs --input and --output"));
        };
        if same_file(input, output) {
            return Err(Error::usage(format!(
                "--output {} is the file of --input and would replace it; give another",
                output.display()
            )));
        }
        Ok(())
    }

    fn profile(&self) -> Option<&Path> {
        self.profile.path()
    }
}

/// Whether two paths lead to one file.
fn same_file(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// Runs the command.
pub fn run(args: &ForwardArgs) -> Result<()> {
    let (Some(path), Some(out)) = (&args.input, &args.output) else { return args.validate() };
    let engine = args.model.engine()?;
    let model = LoadedModel::load(&args.model.model_name_or_path, args.model.storage(), &engine)?;
    let policy = &model.policy;
    let adapters = load_all(&args.adapter.0, policy.config(), engine.device())?;
    warn_of_other_model(&args.adapter.0, || model.base())?;
    let Input { ids, mask, prompt_lengths } = read_input(path, policy)?;
    if prompt_lengths.is_none() && adapters.iter().any(|adapter| adapter.needs_prompt_lengths()) {
        return Err(Error::failure(format!(
            "{}: 'prompt_lengths' is missing, which an adapter of some positions needs",
            path.display()
        )));
    }
    let (b, t) = (ids.len(), ids[0].len());
    let prompt_lengths = prompt_lengths.unwrap_or_else(|| vec![0; b]);
    let (mut batch, mut all, mut weights) = (Batch::new(), Vec::new(), Vec::new());
    for ((ids, mask), prompt_length) in ids.iter().zip(&mask).zip(prompt_lengths) {
        let start = batch.len() as u32;
        batch.push(ids, prompt_length, None);
        for t in 1..ids.len() {
            all.push(Target { row: start + t as u32 - 1, token: ids[t] });
            weights.push(if mask[t] { -1.0 } else { 0.0 });
        }
    }
    let n = weights.iter().filter(|weight| **weight != 0.0).count().max(1);
    weights.iter_mut().for_each(|weight| *weight /= n as f32);
    let mut output = forward(policy, &adapters, &batch, (&all, &weights), args.gradients)?;
    let logits = output.remove("logits").map(|logits| logits.reshape((b, t, ())));
    output.extend(logits.transpose()?.map(|logits| ("logits".to_string(), logits)));
    let logps = output.remove("logps").map(|logps| logps.reshape((b, t - 1)));
    output.extend(logps.transpose()?.map(|logps| ("logps".to_string(), logps)));
    write_atomic(out, &steersman::adapter::to_safetensors(&output)?)
}

fn forward(
    policy: &Policy,
    adapters: &[Box<dyn Adapter>],
    batch: &Batch,
    (targets, weights): (&[Target], &[f32]),
    gradients: bool,
) -> Result<BTreeMap<String, Tensor>> {
    let embedded = policy.embed(&batch.input_ids)?;
    let trace = match gradients {
        true => Some(policy.trace(batch, embedded, adapters, false)?),
        false => None,
    };
    let hidden = match &trace {
        Some(trace) => trace.output().clone(),
        None => policy.hidden(batch, adapters)?,
    };
    let rows: Vec<u32> = (0..batch.len() as u32).collect();
    let mut output = BTreeMap::from([("logits".to_string(), policy.logits(&hidden, &rows)?)]);
    let tape = if gradients { Tape::recording } else { Tape::off }(policy.engine());
    let h = tape.input(&hidden);
    let (loss, said) = policy.weighted_logps(&tape, &h, targets, weights)?;
    output.insert("logps".to_string(), Tensor::new(said.logps, &Device::Cpu)?);
    // + 0 makes 0 of the -0 that a mask of zeros sums to
    output.insert("loss".to_string(), loss.tensor().affine(1.0, 0.0)?);
    if let Some(trace) = trace {
        let one = Tensor::ones(1, DType::F32, policy.engine().device())?;
        for (key, parameter) in adapters.iter().flat_map(|adapter| adapter.parameters()) {
            output.insert(format!("grad.{key}"), parameter.zeros_like()?);
        }
        if let (Some(dh), _) = tape.backward_to_input(&loss, one, &h)? {
            let gradients = trace.backward(dh)?;
            output.extend(gradients.into_iter().map(|(key, grad)| (format!("grad.{key}"), grad)));
        }
    }
    Ok(output)
}
