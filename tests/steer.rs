//! The real `steer`: sizes from configurations, numbers equal to transformers' and PEFT's, generation,
//! evaluation.

mod common;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use candle_core::{Device, Tensor};
use common::program::{STEER, command, ran, run, text};
use common::{FAMILIES, max_diff, reference, relative, shared};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use steersman::model::fetch;

type Tensors = HashMap<String, Tensor>;

fn llama(sizes: [usize; 6], tied: bool) -> Value {
    let [hidden, layers, heads, kv_heads, intermediate, vocab] = sizes;
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
    })
}

fn gemma_3_1b() -> Value {
    json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "intermediate_size": 6912, "vocab_size": 262144, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
    })
}

fn qwen3_4b() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
        "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": true,
    })
}

/// The number behind a row's name in what `steer model inspect` prints.
fn number(printed: &str, name: &str) -> usize {
    let line = printed.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    let word = line[name.len()..].split_whitespace().next().unwrap_or_default();
    word.replace(',', "").parse().unwrap_or_else(|_| panic!("no '{name}' in:\n{printed}"))
}

#[test]
fn inspect_reproduces_the_published_counts_from_configurations_alone() {
    let smollm2 = llama([576, 30, 9, 3, 1536, 49152], true);
    let llama_1b = llama([2048, 16, 32, 8, 8192, 128256], true);
    let llama_8b = llama([4096, 32, 32, 8, 14336, 128256], false);
    for (config, parameters, linear) in [
        (smollm2, 134_515_008, 276_480),
        (llama_1b.clone(), 1_235_814_400, 524_288),
        (llama_8b, 8_030_261_248, 2_097_152),
        (gemma_3_1b(), 999_885_952, 479_232),
        (qwen3_4b(), 4_022_468_096, 1_474_560),
    ] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let args = ["model", "inspect", "--model-name-or-path", text(folder.path())];
        let printed = run(STEER, &args).ok().stdout;
        assert_eq!(number(&printed, "parameters"), parameters, "{printed}");
        assert_eq!(number(&printed, "steering linear, rank 8"), linear, "{printed}");
        if config == llama_1b {
            assert_eq!(number(&printed, "steering vector"), 32_768);
            assert_eq!(number(&printed, "lora, rank 8, all linear"), 5_636_096);
            assert_eq!(number(&printed, "joint, rank 8"), 524_288 + 5_636_096);
            let printed = run(STEER, &[&args[..], &["--rank", "4"]].concat()).ok().stdout;
            assert_eq!(number(&printed, "steering linear, rank 4"), 524_288 / 2);
        }
    }
}

/// A model of the shared fixtures with its reference numbers and a folder for files.
struct Family {
    folder: PathBuf,
    refs: Tensors,
    temporary: tempfile::TempDir,
}

impl Family {
    fn new(name: &str) -> Option<Self> {
        let folder = shared(&format!("fixtures/{name}"))?;
        let refs = reference(&folder);
        Some(Family { folder, refs, temporary: tempfile::tempdir().unwrap() })
    }

    fn layers(&self) -> usize {
        (0..).take_while(|i| self.refs.contains_key(&format!("steer_linear.layers.{i}.up"))).count()
    }

    /// `steer forward` on the reference ids and on `more` input tensors.
    fn forward(&self, flags: &[&str], more: &[(&str, Tensor)]) -> Tensors {
        let (input, output) = (self.path("in.safetensors"), self.path("out.safetensors"));
        let mut tensors: Tensors = HashMap::new();
        for name in ["input_ids", "loss_mask"] {
            tensors.insert(name.to_string(), self.refs[name].clone());
        }
        tensors.extend(more.iter().map(|(name, tensor)| (name.to_string(), tensor.clone())));
        candle_core::safetensors::save(&tensors, &input).unwrap();
        let mut args = vec!["forward", "--model-name-or-path", text(&self.folder)];
        args.extend(["--input", text(&input), "--output", text(&output), "--dtype", "f32"]);
        args.extend(flags);
        let said = run(STEER, &args).ok();
        let not_noted = said.stderr.lines().filter(|line| !line.starts_with("note: "));
        assert_eq!((said.stdout.as_str(), not_noted.collect::<String>().as_str()), ("", ""));
        candle_core::safetensors::load(&output, &Device::Cpu).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temporary.path().join(name)
    }

    /// A steering folder with the reference's parameters of `layers`.
    fn steering(&self, kind: &str, layers: std::ops::Range<usize>, positions: &str) -> PathBuf {
        let folder = self.path(&format!("{kind}-{}-{positions}", layers.start));
        fs::create_dir_all(&folder).unwrap();
        let config = json!({
            "format": "steersman-steering", "version": 1, "kind": kind, "site": "post_block",
            "rank": 4, "alpha": 1.0, "layers": layers.clone().collect::<Vec<_>>(),
            "positions": positions, "base_model_name_or_path": "fixture",
        });
        fs::write(folder.join("steering_config.json"), config.to_string()).unwrap();
        let mut tensors: Tensors = HashMap::new();
        for layer in layers {
            for part in ["down", "up"] {
                let key = format!("layers.{layer}.{part}");
                let values = self.refs[&format!("steer_{kind}.{key}")].clone();
                tensors.insert(format!("{key}.weight"), values);
            }
        }
        let file = folder.join("steering_model.safetensors");
        candle_core::safetensors::save(&tensors, file).unwrap();
        folder
    }

    /// Compares an output with the reference named by `prefix`.
    fn check(&self, found: &Tensors, prefix: &str, tolerance: f32) {
        let what = format!("{} {prefix}", self.folder.display());
        let name = |what: &str| match prefix {
            "" => what.to_string(),
            prefix => format!("{prefix}.{what}"),
        };
        let logits = max_diff(&found["logits"], &self.refs[&name("logits")]);
        assert_eq!(found["logits"].dims(), self.refs["logits"].dims());
        assert!(logits <= tolerance, "{what}: logits differ by {logits}");
        let loss = max_diff(&found["loss"], &self.refs[&name("loss")]);
        assert!(loss <= 1e-5, "{what}: the loss differs by {loss}");
        let gradients = found.keys().filter_map(|key| key.strip_prefix("grad."));
        for key in gradients {
            let steering = format!("{prefix}.{}.grad", key.trim_end_matches(".weight"));
            let lora = format!("{prefix}.grad.{key}");
            let wanted = self.refs.get(&steering).unwrap_or_else(|| &self.refs[&lora]);
            let off = relative(&found[&format!("grad.{key}")], wanted);
            assert!(off <= 1e-4, "{what}: the gradient of {key} is off by {off}");
        }
    }
}

fn gradient_count(found: &Tensors) -> usize {
    found.keys().filter(|key| key.starts_with("grad.")).count()
}

#[test]
fn forward_equals_transformers_and_peft_for_every_family() {
    for name in FAMILIES {
        let Some(family) = Family::new(name) else { return };
        let base = family.forward(&["--gradients"], &[]);
        assert_eq!(gradient_count(&base), 0);
        family.check(&base, "", 1e-4);
        for kind in ["linear", "silu"] {
            let folder = family.steering(kind, 0..family.layers(), "all");
            let found = family.forward(&["--adapter", text(&folder), "--gradients"], &[]);
            assert_eq!(gradient_count(&found), 2 * family.layers());
            family.check(&found, &format!("steer_{kind}"), 1e-3);
        }
        let lora = family.folder.join("lora");
        let found = family.forward(&["--adapter", text(&lora), "--gradients", "true"], &[]);
        assert_eq!(gradient_count(&found), 14 * family.layers());
        family.check(&found, "lora", 1e-4);
    }
}

#[test]
fn logps_are_those_of_the_logits_and_the_loss_counts_masked_targets() {
    let Some(family) = Family::new("qwen3") else { return };
    let found = family.forward(&[], &[]);
    let ids: Vec<Vec<i64>> = family.refs["input_ids"].to_vec2().unwrap();
    let mask: Vec<Vec<i64>> = family.refs["loss_mask"].to_vec2().unwrap();
    let logits: Vec<Vec<Vec<f32>>> = found["logits"].to_vec3().unwrap();
    let logps: Vec<Vec<f32>> = found["logps"].to_vec2().unwrap();
    let (mut sum, mut count) = (0.0, 0.0);
    for b in 0..ids.len() {
        assert_eq!(logps[b].len(), ids[b].len() - 1);
        for t in 1..ids[b].len() {
            let row = &logits[b][t - 1];
            let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            let logp = f64::from(row[ids[b][t] as usize]) - total.ln();
            assert!((logp - f64::from(logps[b][t - 1])).abs() < 1e-5);
            if mask[b][t] == 1 {
                (sum, count) = (sum - logp, count + 1.0);
            }
        }
    }
    let loss = f64::from(found["loss"].to_vec1::<f32>().unwrap()[0]);
    assert!((loss - sum / count).abs() < 1e-5, "{loss} is not {}", sum / count);
}

#[test]
fn the_loss_of_no_target_is_a_plain_zero() {
    let Some(family) = Family::new("qwen3") else { return };
    let mask = family.refs["loss_mask"].zeros_like().unwrap();
    let found = family.forward(&[], &[("loss_mask", mask)]);
    let loss = found["loss"].to_vec1::<f32>().unwrap();
    assert_eq!(loss.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>(), [0]);
}

#[test]
fn every_command_of_model_has_help() {
    for (args, wanted) in [
        (["model", "--help"].as_slice(), "steer model fetch"),
        (&["model", "fetch", "--help"], "usage: steer model fetch"),
        (&["model", "inspect", "--help"], "--model_name_or_path"),
    ] {
        let printed = run(STEER, args).ok().stdout;
        assert!(printed.contains(wanted), "{printed}");
    }
}

#[test]
fn several_adapters_add_up_in_any_order() {
    let Some(family) = Family::new("gemma3") else { return };
    let lora = family.folder.join("lora");
    let steering = family.steering("silu", 0..family.layers(), "all");
    let (a, b) = (text(&steering), text(&lora));
    let one = family.forward(&["--adapter", a, "--adapter", b, "--gradients"], &[]);
    assert_eq!(gradient_count(&one), 16 * family.layers());
    let both = family.path("both");
    fs::create_dir(&both).unwrap();
    for (folder, stem) in [(&steering, "steering"), (&lora, "adapter")] {
        for end in ["_config.json", "_model.safetensors"] {
            let name = format!("{stem}{end}");
            fs::write(both.join(&name), fs::read(folder.join(&name)).unwrap()).unwrap();
        }
    }
    for flags in [vec!["--adapter", b, a], vec!["--adapter", text(&both)]] {
        let other = family.forward(&flags, &[]);
        assert_eq!(max_diff(&other["logits"], &one["logits"]), 0.0, "{flags:?}");
    }
    let alone = family.forward(&["--adapter", a], &[]);
    assert!(max_diff(&alone["logits"], &one["logits"]) > 1e-3, "LoRA does nothing");
}

/// Whether row `t` of sequence `b` is the same to the bit.
fn same(found: &Tensors, other: &Tensors, b: usize, t: usize) -> bool {
    let row = |tensors: &Tensors| tensors["logits"].get(b).unwrap().get(t).unwrap();
    max_diff(&row(found), &row(other)) == 0.0
}

#[test]
fn positions_within_the_prompt_are_steered_and_no_others() {
    for name in ["llama3-scaled-rope", "gemma3"] {
        let Some(family) = Family::new(name) else { return };
        let (b, t) = family.refs["input_ids"].dims2().unwrap();
        let lengths: Vec<i64> = (0..b as i64).map(|b| 5 + b).collect();
        let lengths = [("prompt_lengths", Tensor::new(lengths, &Device::Cpu).unwrap())];
        let last = family.layers() - 1;
        let run = |layer: usize, positions: &str| {
            let folder = family.steering("linear", layer..layer + 1, positions);
            family.forward(&["--adapter", text(&folder)], &lengths)
        };
        let base = family.forward(&[], &[]);
        for (positions, steered) in
            [("last", vec![4]), ("first=2,last=1", vec![0, 1, 4]), ("last=2", vec![3, 4])]
        {
            let (all, some) = (run(last, "all"), run(last, positions));
            let below = run(0, positions);
            for (b, t) in (0..b).flat_map(|b| (0..t).map(move |t| (b, t))) {
                let from_end = |p: &usize| if *p >= 3 { p + b } else { *p };
                let here = steered.iter().map(from_end).any(|p| p == t);
                assert_eq!(same(&some, &all, b, t), here, "{name} {positions} {b} {t}");
                assert_eq!(same(&some, &base, b, t), !here, "{name} {positions} {b} {t}");
                let first = steered.iter().map(from_end).min().unwrap();
                assert_eq!(same(&below, &base, b, t), t < first, "{name} {positions} {b} {t}");
            }
        }
    }
}

#[test]
fn positions_need_prompt_lengths_and_a_parameter_out_of_reach_has_a_zero_gradient() {
    let Some(family) = Family::new("qwen3") else { return };
    let adapter = family.steering("linear", 0..family.layers(), "last");
    let flags = ["--adapter", text(&adapter), "--gradients"];
    let (b, _) = family.refs["input_ids"].dims2().unwrap();
    let lengths = Tensor::zeros(b, candle_core::DType::I64, &Device::Cpu).unwrap();
    let found = family.forward(&flags, &[("prompt_lengths", lengths)]);
    assert_eq!(gradient_count(&found), 2 * family.layers());
    for (key, grad) in found.iter().filter(|(key, _)| key.starts_with("grad.")) {
        let sum: f32 = grad.abs().unwrap().sum_all().unwrap().to_scalar().unwrap();
        assert_eq!(sum, 0.0, "{key}");
    }
    family.forward(&[], &[]);
    let (input, output) = (family.path("in.safetensors"), family.path("none.safetensors"));
    let args = ["forward", "--model-name-or-path", text(&family.folder), "--input", text(&input)];
    let said = run(STEER, &[&args[..], &["--output", text(&output)], &flags].concat());
    assert!(said.only_sentence(1).contains("'prompt_lengths' is missing"));
}

#[test]
fn ids_and_masks_of_other_types_beside_other_tensors_are_read() {
    let Some(family) = Family::new("qwen3") else { return };
    let wanted = family.forward(&[], &[]);
    let values = |name: &str| family.refs[name].flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let ids: Vec<u8> =
        values("input_ids").iter().flat_map(|id| (*id as i32).to_le_bytes()).collect();
    let mask: Vec<u8> = values("loss_mask").iter().map(|counts| *counts as u8).collect();
    let shape = family.refs["input_ids"].dims().to_vec();
    let view = |dtype, data| TensorView::new(dtype, shape.clone(), data).unwrap();
    let tensors = [
        ("input_ids", view(Dtype::I32, &ids)),
        ("loss_mask", view(Dtype::BOOL, &mask)),
        ("notes", view(Dtype::I8, &mask)),
    ];
    let (input, output) = (family.path("types.safetensors"), family.path("out.safetensors"));
    fs::write(&input, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let args = ["forward", "--model-name-or-path", text(&family.folder), "--dtype", "f32"];
    let files = ["--input", text(&input), "--output", text(&output)];
    run(STEER, &[&args[..], &files].concat()).ok();
    let found = candle_core::safetensors::load(&output, &Device::Cpu).unwrap();
    for name in ["logits", "loss"] {
        assert_eq!(max_diff(&found[name], &wanted[name]), 0.0, "{name}");
    }
}

/// The tiny story model, with a chat template beside it.
struct Stories {
    model: PathBuf,
    folder: tempfile::TempDir,
}

impl Stories {
    fn new() -> Option<Self> {
        let model = shared("models/stories260k")?;
        Some(Stories { model, folder: tempfile::tempdir().unwrap() })
    }

    fn template(&self) -> PathBuf {
        let path = self.folder.path().join("template.jinja");
        let text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
        fs::write(&path, text).unwrap();
        path
    }

    /// What `steer generate` prints.
    fn generate(&self, flags: &[&str]) -> String {
        let fixed =
            ["generate", "--model_name_or_path", text(&self.model), "--max_new_tokens", "40"];
        run(STEER, &[&fixed[..], flags].concat()).ok().stdout
    }
}

const ONCE: [&str; 3] = ["--raw", "--prompt", "Once upon a time"];

#[test]
fn greedy_text_is_the_same_every_time_and_ends_before_a_stop_string() {
    let Some(stories) = Stories::new() else { return };
    let story = stories.generate(&ONCE);
    assert_eq!(story, stories.generate(&ONCE));
    assert!(story.contains("little girl named"), "{story}");
    assert_eq!(story, stories.generate(&[&ONCE[..], &["--seed", "5"]].concat()));

    let stop = ["--stop", "never there", "--stop", " named"];
    let ended = stories.generate(&[&ONCE[..], &stop].concat());
    assert_eq!(ended.trim_end_matches('\n'), story.split(" named").next().unwrap());
    let short = stories.generate(&[&ONCE[..], &["--max-new-tokens", "3"]].concat());
    assert!(story.starts_with(short.trim_end_matches('\n')) && short.len() < story.len() / 3);
}

#[test]
fn the_seed_decides_what_is_sampled() {
    let Some(stories) = Stories::new() else { return };
    let sampled = |seed: &str, more: &[&str]| {
        let flags = ["--temperature", "1", "--seed", seed];
        stories.generate(&[&ONCE[..], &flags, more].concat())
    };
    assert_eq!(sampled("1", &[]), sampled("1", &[]));
    assert_ne!(sampled("1", &[]), sampled("2", &[]));
    assert_eq!(sampled("1", &["--top_k", "1"]), stories.generate(&ONCE));
    assert_eq!(sampled("1", &["--top_p", "1e-6"]), stories.generate(&ONCE));
    assert_eq!(sampled("1", &["--min_p", "1"]), stories.generate(&ONCE));
}

#[test]
fn a_chat_answers_every_line_or_says_that_there_is_no_template() {
    let Some(stories) = Stories::new() else { return };
    let template = stories.template();
    let chat = |flags: &[&str]| {
        let fixed = ["generate", "--model_name_or_path", text(&stories.model)];
        let args = [&fixed[..], &["--max_new_tokens", "12"], flags].concat();
        let input = stories.folder.path().join("input");
        fs::File::create(&input).unwrap().write_all(b"Tell me a story.\n\nAnd then?\n").unwrap();
        let mut command = command(STEER, &args);
        command.stdin(Stdio::from(fs::File::open(input).unwrap()));
        ran(command)
    };
    let refused = chat(&[]);
    let said = refused.only_sentence(2);
    assert!(said.contains("has no chat template") && said.ends_with(", or give --raw"), "{said}");
    let answered = chat(&["--chat_template_path", text(&template)]).ok();
    assert!(answered.stdout.lines().filter(|line| !line.is_empty()).count() >= 2);
    let first = ["--chat_template_path", text(&template), "--max-new-tokens", "12"];
    let first = stories.generate(&[&first[..], &["--prompt", "Tell me a story."]].concat());
    assert!(answered.stdout.starts_with(&first) && answered.stdout.len() > first.len());
}

/// `steer eval` on four ListOps problems, with the answers it wrote.
fn eval_listops(model: &str, folder: &Path, flags: &[&str]) -> (String, Vec<Value>) {
    let output = folder.join("answers.jsonl");
    let mut args = vec!["eval", "--model_name_or_path", model, "--dataset_name", "listops"];
    args.extend(["--max_eval_samples", "4", "--max_completion_length", "8"]);
    args.extend(["--output", text(&output)]);
    args.extend(flags);
    let printed = run(STEER, &args).ok().stdout;
    let lines = fs::read_to_string(output).unwrap();
    (printed, lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

#[test]
fn eval_grades_every_problem_and_writes_the_answers() {
    let Some(stories) = Stories::new() else { return };
    let (template, folder) = (stories.template(), stories.folder.path());
    let flags = ["--chat_template_path", text(&template)];
    let (printed, answers) = eval_listops(text(&stories.model), folder, &flags);
    assert_eq!(answers.len(), 4);
    let outcomes = ["right", "wrong", "unparsable"];
    let count = |outcome| answers.iter().filter(|answer| answer["outcome"] == outcome).count();
    let [right, wrong, unparsable] = outcomes.map(count);
    assert_eq!(right + wrong + unparsable, 4);
    let counts = format!(" ({right}/4; {wrong} wrong, {unparsable} unparsable)\n");
    assert!(printed.starts_with("accuracy: ") && printed.contains(&counts), "{printed}");
}

#[test]
fn eval_runs_on_the_default_model() {
    let path = fetch::smollm2_path().unwrap();
    if !path.is_file() {
        eprintln!("SKIPPED: {} is missing; run `steer model fetch", path.display());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (printed, answers) = eval_listops(fetch::SMOLLM2, folder.path(), &[]);
    assert!(answers.len() == 4 && printed.starts_with("accuracy: "), "{printed}");
}

#[test]
fn lower_precisions_stay_within_their_error() {
    let Some(family) = Family::new("llama-tied") else { return };
    let highest = family.forward(&[], &[]);
    for (precision, tolerance) in [("high", 1e-4), ("medium", 0.05)] {
        let found = family.forward(&["--matmul-precision", precision], &[]);
        let off = relative(&found["logits"], &highest["logits"]);
        assert!(off < tolerance, "{precision}: {off}");
    }
}
