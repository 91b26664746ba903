//! Supervised runs of the real program on a tiny model: what a killed run leaves behind, and what the
//! keys of a run promise.

mod common;

use std::fs;
use std::path::Path;

use common::program::{
    Place, SFT, adapter_files, checkpoints, copy_model, lines, metrics, names, run, series, text,
    timeless,
};
use serde_json::{Value, json};
use steersman::config::{DataArgs, SequenceArgs};
use steersman::model::{ModelSource, TextModel};
use steersman::train::data::SftData;
use steersman::train::example::TokenExample;
use steersman::train::tokenize::Encoder;

/// Flags of every run.
const FIXED: &str = "--max_steps 40 --per_device_train_batch_size 4 --max_eval_samples 8 \
                     --learning_rate 1e-2 --logging_steps 3 --save_steps 7";

fn place() -> Option<Place> {
    Place::of(SFT, FIXED, 64)
}

fn assert_same_run(found: &Path, wanted: &Path, what: &str) {
    assert_eq!(timeless(found), timeless(wanted), "{what}: metrics");
    assert!(adapter_files(found).len() >= 2, "{what}: no adapter");
    assert!(adapter_files(found) == adapter_files(wanted), "{what}: the adapter differs");
    assert_eq!(names(found), names(wanted), "{what}");
    for step in checkpoints(wanted) {
        let file = format!("checkpoint-{step}/optimizer.safetensors");
        let same = fs::read(found.join(&file)).unwrap() == fs::read(wanted.join(&file)).unwrap();
        assert!(same, "{what}: {file} differs");
    }
}

/// A point in a run's life, told from its folder.
type Moment = fn(&Path) -> bool;

/// When runs are killed; where there are two moments, the resumed run is killed again.
const MOMENTS: [(&str, &[Moment]); 5] = [
    ("before the first checkpoint", &[|dir| lines(dir) >= 2]),
    (
        "while a checkpoint is written, then as one appears",
        &[|dir| dir.join(".checkpoint-7.tmp").exists(), |dir| dir.join("checkpoint-14").exists()],
    ),
    ("between two checkpoints", &[|dir| dir.join("checkpoint-14").exists() && lines(dir) >= 7]),
    (
        "twice, right behind a checkpoint",
        &[|dir| dir.join("checkpoint-21").exists(), |dir| dir.join("checkpoint-28").exists()],
    ),
    ("near the end", &[|dir| dir.join("checkpoint-35").exists() && lines(dir) >= 14]),
];

/// Kills runs at every moment and resumes them to their end: the same files as an unbroken run.
fn check_kills(extra: &str) {
    let Some(place) = place() else { return };
    place.run("unbroken", extra).ok();
    let unbroken = place.dir("unbroken");
    let resume = format!("{extra} --resume_from_checkpoint latest");
    for (i, (what, moments)) in MOMENTS.into_iter().enumerate() {
        let name = format!("killed-{i}");
        for (kill, moment) in moments.iter().enumerate() {
            place.kill(&name, if kill == 0 { extra } else { &resume }, *moment);
        }
        place.run(&name, &resume).ok();
        assert_same_run(&place.dir(&name), &unbroken, &format!("{extra}, {what}"));
    }
    place.run("unbroken", &resume).ok();
    assert_same_run(&unbroken, &place.dir("killed-0"), "a finished run, resumed");
}

#[test]
fn killed_steering_ends_in_the_same_bytes() {
    check_kills("--adapter steering --steering_kind linear --eval_steps 6");
}

#[test]
fn killed_lora_with_dropout_ends_in_the_same_bytes() {
    check_kills("--adapter lora --lora_dropout 0.1 --lora_r 2");
}

#[test]
fn killed_joint_with_neftune_ends_in_the_same_bytes() {
    check_kills("--adapter joint --neftune_noise_alpha 5 --lora_r 2 --weight_decay 0.01");
}

#[test]
fn killed_packing_with_the_best_at_the_end_ends_in_the_same_bytes() {
    check_kills(
        "--packing --max_length 32 --per_device_train_batch_size 2 --eval_steps 6 \
         --load_best_model_at_end --logging_steps 2",
    );
}

#[test]
fn a_damaged_checkpoint_is_skipped_with_a_warning() {
    let Some(place) = place() else { return };
    place.run("a", "").ok();
    let wanted = adapter_files(&place.dir("a"));
    let newest = *checkpoints(&place.dir("a")).last().unwrap();
    let file = place.dir("a").join(format!("checkpoint-{newest}/optimizer.safetensors"));
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let ran = place.run("a", "--resume_from_checkpoint latest").ok();
    let warning = ran.stderr.lines().find(|line| line.starts_with("warning: ")).unwrap();
    assert!(warning.contains("optimizer.safetensors is damaged"), "{warning}");
    assert!(place.dir("a").join(format!("checkpoint-{newest}.damaged")).is_dir());
    assert!(adapter_files(&place.dir("a")) == wanted);
}

#[test]
fn a_run_is_not_resumed_on_other_rows() {
    let Some(place) = place() else { return };
    place.run("a", "").ok();
    let (before, rows) = (adapter_files(&place.dir("a")), fs::read_to_string(&place.rows).unwrap());
    let resume = "--resume_from_checkpoint latest";
    let fewer: String = rows.lines().take(20).map(|row| format!("{row}\n")).collect();
    for (other, wanted) in [
        (fewer, "started on 56 rows in 14 steps an epoch, not 12 rows in 3 steps an epoch"),
        (rows.replace('a', "e"), "started on other rows, not these 56 rows"),
    ] {
        fs::write(&place.rows, other).unwrap();
        let ran = place.run("a", resume);
        assert!(ran.sentence(2).contains(wanted), "{}", ran.stderr);
        assert!(adapter_files(&place.dir("a")) == before);
    }
    fs::write(&place.rows, rows).unwrap();
    place.run("a", resume).ok();
}

#[test]
fn a_run_is_not_resumed_with_other_adapter_keys() {
    let Some(place) = place() else { return };
    place.run("a", "").ok();
    let config = || fs::read(place.dir("a").join("config.toml")).unwrap();
    let (before, adapter) = (config(), adapter_files(&place.dir("a")));
    for (flags, wanted) in [
        ("--steering_rank 4", "steering_rank was 8 and is now 4: "),
        ("--steering_rank 4 --dry_run", "steering_rank was 8 and is now 4: "),
        ("--steering_kind silu", "steering_kind was \"linear\" and is now \"silu\": "),
        ("--adapter lora", "adapter was \"steering\" and is now \"lora\": "),
    ] {
        let ran = place.run("a", &format!("--resume_from_checkpoint latest {flags}"));
        let said = ran.only_sentence(2);
        assert!(said.starts_with(wanted) && said.ends_with("in a new output_dir"), "{said}");
        assert!(config() == before && adapter_files(&place.dir("a")) == adapter);
    }
    let free = "--resume_from_checkpoint latest --save_steps 3 --logging_steps 7";
    let said = place.run("a", free).ok().stderr;
    assert!(!said.contains("warning"), "{said}");
}

#[test]
fn another_runs_folder_is_refused_and_left_as_it_is() {
    let Some(place) = place() else { return };
    place.run("a", "").ok();
    let (before, log) = (adapter_files(&place.dir("a")), metrics(&place.dir("a")));
    let ran = place.run("a", "--seed 7");
    assert!(ran.only_sentence(2).contains("already holds a run"), "{}", ran.stderr);
    assert!(adapter_files(&place.dir("a")) == before && metrics(&place.dir("a")) == log);
}

/// Rows on which training soon makes the held-out loss worse.
fn place_that_overfits() -> Option<Place> {
    let mut place = place()?;
    let folder = place.dir("split");
    fs::create_dir(&folder).unwrap();
    let rows = fs::read_to_string(&place.rows).unwrap();
    fs::write(folder.join("train.jsonl"), rows).unwrap();
    let other = "Once upon a time there was a little girl. She liked to play in the park.";
    fs::write(folder.join("test.jsonl"), format!("{{\"text\": \"{other}\"}}\n")).unwrap();
    place.rows = folder;
    Some(place)
}

#[test]
fn the_best_checkpoint_is_kept_and_restored() {
    let Some(place) = place_that_overfits() else { return };
    let keys = "--eval_steps 2 --load_best_model_at_end --save_total_limit 2";
    place.run("a", keys).ok();
    let dir = place.dir("a");
    let evaluations: Vec<(u64, f64)> = metrics(&dir)
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line.get("eval_loss")?.as_f64()?)))
        .filter(|(step, _)| *step > 0)
        .collect();
    let best = evaluations.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    assert!(best < 28, "the rows do not overfit: {evaluations:?}");
    let kept = checkpoints(&dir);
    assert_eq!((kept.len(), kept[0]), (3, best), "{kept:?}");
    assert!(adapter_files(&dir) == adapter_files(&dir.join(format!("checkpoint-{best}"))));
}

#[test]
fn the_accuracy_after_training_is_that_of_the_adapter_that_is_kept() {
    let Some(place) = place() else { return };
    let template = place.dir("template.jinja");
    fs::write(&template, "{% for m in messages %}{{ m.content }} = {% endfor %}").unwrap();
    let keys = format!(
        "--dataset_name listops --chat_template_path {} --eval_accuracy ends --eval_steps 4 \
         --max_completion_length 2 --max_train_samples 40 --max_steps 8",
        text(&template)
    );
    let accuracies = |name: &str| series(&place.dir(name), "eval_accuracy").len();
    let said = place.run("last", &keys).ok().stderr;
    assert!(said.contains("accuracy before: ") && said.contains("accuracy after: "), "{said}");
    assert_eq!(accuracies("last"), 2);
    let last = |name: &str| *series(&place.dir("last"), name).last().unwrap();
    let count = |outcome: &str| last(&format!("eval_reward_outcome/{outcome}"));
    let [right, wrong, unparsable] = ["right", "wrong", "unparsable"].map(count);
    assert_eq!(right + wrong + unparsable, last("eval_samples"));
    assert_eq!(right / last("eval_samples"), last("eval_accuracy"));
    let told = format!(" ({right}/8; {wrong} wrong, {unparsable} unparsable)\nadapter: ");
    assert!(said.contains(&told), "{said}");
    let told_again = place.run("last", &format!("{keys} --resume_from_checkpoint latest")).ok();
    assert!(told_again.stderr.ends_with(said.split_once("accuracy before").unwrap().1));
    assert_eq!(accuracies("last"), 2);

    let keys = format!("{keys} --load_best_model_at_end --greater_is_better true");
    let said = place.run("best", &keys).ok().stderr;
    assert!(said.contains("accuracy after: "), "{said}");
    assert_eq!(accuracies("best"), 2);
    let before = timeless(&place.dir("best"));
    assert_eq!(before.last().unwrap().get("eval_loss"), None, "the last is not the best");
    place.run("best", &format!("{keys} --resume_from_checkpoint latest")).ok();
    assert_eq!(timeless(&place.dir("best")), before);
}

#[test]
fn early_stopping_ends_a_run_that_no_longer_improves() {
    let Some(place) = place_that_overfits() else { return };
    place.run("a", "--eval_steps 2 --early_stopping_patience 2").ok();
    let found = series(&place.dir("a"), "eval_loss");
    assert!(found.len() < 21, "not stopped: {found:?}");
    let (rest, last) = found.split_at(found.len() - 2);
    let best = rest[1..].iter().fold(f64::INFINITY, |best, loss| best.min(*loss));
    assert!(last.iter().all(|loss| *loss >= best), "{found:?}");
    let steps: Vec<u64> = metrics(&place.dir("a"))
        .iter()
        .filter_map(|line| line.get("eval_loss").and(line["step"].as_u64()))
        .collect();
    assert!(steps.is_sorted_by(|a, b| a < b), "an evaluation came twice: {steps:?}");
}

#[test]
fn old_checkpoints_are_removed_and_the_last_step_is_saved() {
    let Some(place) = place() else { return };
    place.run("a", "--save_total_limit 2").ok();
    assert_eq!(checkpoints(&place.dir("a")), [35, 40]);
    place.run("b", "--save_steps 0").ok();
    assert_eq!(checkpoints(&place.dir("b")), [40]);
    let saved = place.dir("b").join("checkpoint-40");
    assert!(adapter_files(&place.dir("b")) == adapter_files(&saved));
}

#[test]
fn the_loss_falls_on_rows_that_can_be_learnt() {
    let Some(place) = place() else { return };
    for adapter in ["steering", "lora --lora_r 4"] {
        let name = &adapter[..4];
        place.run(name, &format!("--adapter {adapter} --eval_steps 10")).ok();
        let losses = series(&place.dir(name), "loss");
        let held_out = series(&place.dir(name), "eval_loss");
        assert!(losses[losses.len() - 1] < 0.5 * losses[0], "{adapter}: {losses:?}");
        assert!(held_out.len() == 5 && held_out.is_sorted_by(|a, b| a > b), "{held_out:?}");
    }
}

#[test]
fn what_changes_memory_only_changes_no_byte() {
    let Some(place) = place() else { return };
    let keys = "--max_steps 12 --logging_steps 1 --neftune_noise_alpha 5 --adapter joint \
                --lora_dropout 0.1 --learning_rate 1e-3 --save_steps 0";
    place.run("whole", &format!("{keys} --per_device_train_batch_size 8")).ok();
    let wanted = adapter_files(&place.dir("whole"));
    let losses = series(&place.dir("whole"), "loss");
    for (name, other) in [
        ("micro", "--per_device_train_batch_size 8 --micro_batch_tokens 20"),
        ("recompute", "--per_device_train_batch_size 8 --gradient_checkpointing"),
        ("accumulate", "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
    ] {
        place.run(name, &format!("{keys} {other}")).ok();
        assert!(adapter_files(&place.dir(name)) == wanted, "{name}: another adapter");
        let found = series(&place.dir(name), "loss");
        assert_eq!((found.len(), losses.len()), (12, 12));
        for (a, b) in found.iter().zip(&losses) {
            assert!((a - b).abs() <= 1e-12, "{name}: {found:?} instead of {losses:?}");
        }
    }
}

#[test]
fn a_measured_run_ends_in_the_same_bytes_and_a_trace_of_every_phase() {
    let Some(place) = place() else { return };
    let trace = place.dir("trace.json");
    let flags = "--adapter joint --lora_r 2 --max_steps 3";
    place.run("plain", flags).ok();
    let ran = place.run("measured", &format!("{flags} --profile {}", text(&trace))).ok();
    assert!(adapter_files(&place.dir("measured")) == adapter_files(&place.dir("plain")));
    let events: Vec<Value> = serde_json::from_slice(&fs::read(&trace).unwrap()).unwrap();
    let count = |kind: &str, name: &str| {
        events.iter().filter(|event| event["cat"] == kind && event["name"] == name).count()
    };
    assert_eq!(count("phase", "step"), 3);
    for phase in ["load", "read rows", "tokenize", "forward", "head", "backward", "optimizer"] {
        assert!(count("phase", phase) > 0, "no phase {phase}");
    }
    for op in ["linear", "attention", "low rank", "glu", "norm", "rotary", "weighted log-probs"] {
        assert!(count("op", op) > 0, "no operation {op}");
    }
    for op in ["linear", "attention", "low rank", "glu", "norm", "rotary"] {
        assert!(count("op", &format!("{op} backward")) > 0, "no backward pass of {op}");
    }
    assert!(ran.stderr.contains("opens in ui.perfetto.dev"), "{}", ran.stderr);
    assert!(ran.stderr.contains("GFLOP/s"), "{}", ran.stderr);
}

#[test]
fn a_dry_run_prints_a_recipe() {
    let Some(place) = place() else { return };
    let keys = "--adapter joint --lora_r 2 --warmup_steps 5 --steering_layers 0-2";
    place.run("by-flags", keys).ok();
    let wanted = adapter_files(&place.dir("by-flags"));
    let printed = place.run("dry", &format!("{keys} --dry_run")).ok().stdout;
    assert!(!place.dir("dry").exists(), "a dry run left files");
    assert!(printed.contains("warmup_steps = 5"), "{printed}");

    let recipe = place.dir("recipe.toml");
    fs::write(&recipe, printed).unwrap();
    run(SFT, &[text(&recipe), "--dry_run", "false"]).ok();
    assert_eq!(adapter_files(&place.dir("dry"))[1], wanted[1]);
    let resolved = place.dir("by-flags").join("config.toml");
    let again = place.dir("again");
    run(SFT, &[text(&resolved), "--output-dir", text(&again)]).ok();
    assert!(adapter_files(&again) == wanted);
}

#[test]
fn a_dry_run_checks_the_folder_and_the_weights() {
    let Some(mut place) = place() else { return };
    place.run("a", "--max_steps 1").ok();
    let before = names(&place.dir("a"));
    let ran = place.run("a", "--dry_run");
    assert!(ran.only_sentence(2).contains("already holds a run"), "{}", ran.stderr);
    place.run("a", "--dry_run --max_steps 1 --resume_from_checkpoint latest").ok();
    assert_eq!(names(&place.dir("a")), before);

    let copy = place.dir("model");
    place.model = copy_model(&std::mem::take(&mut place.model), &copy);
    let weights = place.model.join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let ran = place.run("dry/run", "--dry_run");
    assert!(ran.only_sentence(1).contains("model.safetensors is truncated"), "{}", ran.stderr);
    fs::remove_file(&weights).unwrap();
    let ran = place.run("dry/run", "--dry_run");
    assert!(ran.only_sentence(1).contains("has no model.safetensors"), "{}", ran.stderr);
    let index = r#"{"weight_map": {"model.norm.weight": "part-1.safetensors"}}"#;
    fs::write(place.model.join("model.safetensors.index.json"), index).unwrap();
    let ran = place.run("dry/run", "--dry_run");
    assert!(ran.only_sentence(1).contains("has no part-1.safetensors"), "{}", ran.stderr);
    fs::write(place.model.join("part-1.safetensors"), whole).unwrap();
    place.run("dry/run", "--dry_run").ok();
    assert!(!place.dir("dry").exists(), "a dry run left files");
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_leaves_a_dump() {
    let Some(place) = place() else { return };
    let ran = place.run("a", "--learning_rate 1e30 --warmup_steps 0");
    let said = ran.sentence(1);
    assert!(said.starts_with("step 2 (training rows ") && said.contains("NaN"), "{said}");
    let dump = place.dir("a").join("dump-2");
    assert!(said.ends_with(text(&dump)), "{said}");
    assert!(names(&dump).contains(&"error.txt".to_string()), "{:?}", names(&dump));
    assert!(adapter_files(&place.dir("a")).is_empty(), "a final adapter of a failed run");
}

#[test]
fn an_evaluation_that_is_no_number_is_not_hidden() {
    let Some(place) = place() else { return };
    let ran = place.run("a", "--learning_rate 1e30 --max_steps 1 --warmup_steps 0");
    let said = ran.sentence(1);
    assert!(said.contains("eval_loss") && said.contains("NaN"), "{said}");
    assert!(adapter_files(&place.dir("a")).is_empty(), "a final adapter of a failed run");
}

fn text_model(folder: &Path, template: Option<&Path>) -> TextModel {
    TextModel::load(&ModelSource::Folder(folder.to_path_buf()), template, 512).unwrap()
}

#[test]
fn prompt_and_completion_are_tokenised_as_the_one_text_that_they_are() {
    let Some(place) = place() else { return };
    let text = text_model(&place.model, None);
    let encoder = Encoder::new(&text).unwrap();
    let whole = text.tokenizer.encode("Once upon a time", true).unwrap();
    let end = text.tokenizer.eos_token().unwrap().id;
    for (prompt, completion) in
        [("Once upon", " a time"), ("Once upon ", "a time"), ("On", "ce upon a time")]
    {
        let example = encoder.plain(prompt, completion, false).unwrap();
        assert_eq!(example.input_ids, [&whole[..], &[end]].concat(), "{prompt:?}");
        let learnt: Vec<u32> = example.input_ids[example.prompt_length..].to_vec();
        let learnt = text.tokenizer.decode(&learnt, true).unwrap();
        assert!(learnt.trim_start().ends_with(completion.trim_start()), "{prompt:?}: {learnt:?}");
        assert!(example.targets() == example.input_ids.len() - example.prompt_length);
    }
}

#[test]
fn rows_are_tokenised_in_order_and_the_first_bad_one_is_named() {
    let Some(place) = place() else { return };
    let text = text_model(&place.model, None);
    let encoder = Encoder::new(&text).unwrap();
    let story = |i: usize| format!("Once upon a time {i:03}{}", " x".repeat(i / 240));
    let stories: Vec<String> = (0..500).map(story).collect();
    let lines = stories.iter().map(|story| json!({"text": story}).to_string() + "\n");
    fs::write(&place.rows, lines.collect::<String>()).unwrap();
    let dataset_name = Some(place.rows.to_str().unwrap().to_string());
    let args = DataArgs { dataset_name, ..Default::default() };
    let sequence = SequenceArgs { max_length: 0, ..Default::default() };
    let data = SftData::load(&args, &sequence, 1).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    let (train, _) = pool.install(|| data.tokenise(&encoder, (&args, &sequence), 512)).unwrap();
    assert_eq!(train.len(), stories.len());
    for (i, (example, story)) in train.iter().zip(&stories).enumerate() {
        let expected = TokenExample { row: i + 1, ..encoder.text(story).unwrap() };
        assert_eq!(*example, expected);
    }
    let short = train[0].input_ids.len();
    let error = pool
        .install(|| data.tokenise(&encoder, (&args, &sequence), short))
        .unwrap_err()
        .to_string();
    assert!(error.contains(": row 241 has "), "{error}");
}

#[test]
fn a_template_whose_prompt_is_no_beginning_of_the_conversation_is_refused() {
    let Some(place) = place() else { return };
    let path = place.dir("think.jinja");
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}\
                  {% if add_generation_prompt %}[assistant]THINK{% endif %}";
    let chat = |source: String| {
        fs::write(&path, source).unwrap();
        let text = text_model(&place.model, Some(&path));
        let messages = [json!({"role": "user", "content": "a"})];
        let encoded = Encoder::new(&text).unwrap().chat(&messages, "b", false);
        encoded.map(|example| (example.targets(), example.input_ids.last().copied()))
    };
    let error = chat(source.replace("THINK", "<think>")).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("chat_template_path"), "{error}");
    let (targets, last) = chat(source.replace("THINK", "")).unwrap();
    assert!(targets >= 2 && last == Some(2), "{targets} {last:?}");
}

#[test]
fn the_tokenizers_own_eos_ends_a_completion_and_a_text() {
    let Some(place) = place() else { return };
    let model = copy_model(&place.model, &place.dir("model"));
    let file = model.join("generation_config.json");
    let config = fs::read_to_string(&file).unwrap();
    fs::write(&file, config.replace("\"eos_token_id\": 2", "\"eos_token_id\": [5, 7]")).unwrap();
    let text = text_model(&model, None);
    assert_eq!(text.stop_token_ids, [5, 7, 2]);
    let example = Encoder::new(&text).unwrap().text("Once upon").unwrap();
    assert_eq!(example.input_ids.last(), Some(&2));
}

#[test]
fn every_step_is_in_the_metrics_and_evaluations_tell_their_epoch() {
    let Some(place) = place_that_overfits() else { return };
    let keys = "--eval_steps 2 --early_stopping_patience 2 --logging_steps 100";
    place.run("a", keys).ok();
    let lines = metrics(&place.dir("a"));
    let evaluated: Vec<&Value> = lines.iter().filter(|l| l.get("eval_loss").is_some()).collect();
    assert!(evaluated.iter().all(|line| line["epoch"].is_number()), "{evaluated:?}");
    let last = lines.iter().rfind(|line| line.get("loss").is_some()).expect("no line of metrics");
    assert_eq!(last["step"], evaluated[evaluated.len() - 1]["step"]);
    place.run("a", &format!("{keys} --resume_from_checkpoint latest")).ok();
    assert_eq!(metrics(&place.dir("a")), lines);
}
