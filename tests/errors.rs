//! Bad input to the real programs: one clear sentence each, exit code 2 for a wrong request and 1 for
//! a failure, and nothing half-written.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{Device, Tensor};
use common::program::{
    Ran, SFT, STEER, adapter_files, checkpoints, command, copy_model, metrics, names, ran, run,
    text, toy_rows,
};
use common::shared;

/// A model that can be spoilt, rows, and paths for what must not appear.
struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
    rows: PathBuf,
}

impl Place {
    fn new() -> Option<Self> {
        let model = shared("models/stories260k")?;
        let folder = tempfile::tempdir().unwrap();
        let model = copy_model(&model, &folder.path().join("model"));
        let rows = toy_rows(folder.path(), 16);
        Some(Place { folder, model, rows })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A short run with further flags, the last of which win.
    fn sft(&self, flags: &[&str]) -> Ran {
        let out = self.path("out");
        let (model, rows) = (text(&self.model), text(&self.rows));
        let mut args = vec!["--model_name_or_path", model, "--dataset_name", rows];
        args.extend(["--output_dir", text(&out), "--max_steps", "2"]);
        args.extend(flags);
        run(SFT, &args)
    }

    /// A run that is refused before it begins: its sentence says `wanted`, and there is no folder.
    fn refused(&self, flags: &[&str], code: i32, wanted: &[&str]) {
        let ran = self.sft(flags);
        says(ran.only_sentence(code), wanted);
        assert!(!self.path("out").exists(), "{flags:?} left {:?}", names(&self.path("out")));
    }

    /// `steer forward` on ids of our choice is refused, and there is no output.
    fn forward_refused(&self, ids: &Tensor, flags: &[&str], code: i32, wanted: &[&str]) {
        let (input, output) = (self.path("in.safetensors"), self.path("forward/out.safetensors"));
        fs::create_dir_all(self.path("forward")).unwrap();
        let tensors = HashMap::from([("input_ids".to_string(), ids.clone())]);
        candle_core::safetensors::save(&tensors, &input).unwrap();
        let mut args = vec!["forward", "--model_name_or_path", text(&self.model)];
        args.extend(["--input", text(&input), "--output", text(&output)]);
        args.extend(flags);
        says(run(STEER, &args).only_sentence(code), wanted);
        assert_eq!(names(&self.path("forward")), [""; 0]);
    }

    fn write(&self, name: &str, content: &str) -> String {
        fs::write(self.path(name), content).unwrap();
        text(&self.path(name)).to_string()
    }

    /// Replaces a text in a file of the model.
    fn spoil(&self, name: &str, from: &str, to: &str) {
        let path = self.model.join(name);
        let before = fs::read_to_string(&path).unwrap();
        assert!(before.contains(from));
        fs::write(path, before.replace(from, to)).unwrap();
    }
}

fn says(sentence: &str, wanted: &[&str]) {
    for part in wanted {
        assert!(sentence.contains(part), "no '{part}' in: {sentence}");
    }
}

fn ids(ids: &[i64]) -> Tensor {
    Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
}

#[test]
fn a_missing_model_or_data_file() {
    let Some(place) = Place::new() else { return };
    let none = place.path("none");
    let none = text(&none);
    place.refused(&["--model_name_or_path", none], 2, &[none, "not found", "give a folder"]);
    place.refused(&["--model_name_or_path", "smolm2-135m-instruct"], 2, &["did you mean"]);
    let rows = format!("{none}.jsonl");
    place.refused(&["--dataset_name", &rows], 2, &[&rows, "no such file"]);
    place.refused(&["--dataset_name", "listop"], 2, &["did you mean listops"]);
    place.refused(&["--chat_template_path", none], 1, &[none, "no such file"]);
    fs::remove_file(place.model.join("model.safetensors")).unwrap();
    place.refused(&[], 1, &["has no model.safetensors"]);
    fs::remove_file(place.model.join("config.json")).unwrap();
    place.refused(&[], 1, &["has no config.json"]);
}

#[test]
fn truncated_and_foreign_weights() {
    let Some(place) = Place::new() else { return };
    let path = place.model.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for bytes in [&whole[..whole.len() - 1], &whole[..whole.len() / 2], &whole[..5], &[]] {
        fs::write(&path, bytes).unwrap();
        place.refused(&[], 1, &["model.safetensors"]);
    }
    fs::write(&path, "not a safetensors file at all").unwrap();
    place.refused(&[], 1, &["model.safetensors"]);
    fs::write(&path, &whole).unwrap();
    place.spoil("config.json", "\"num_hidden_layers\": 5", "\"num_hidden_layers\": 6");
    place.refused(&[], 1, &["model.layers.5"]);
    place.spoil("config.json", "\"num_hidden_layers\": 6", "\"num_hidden_layers\": 5");
    place.spoil("config.json", "\"intermediate_size\": 172", "\"intermediate_size\": 170");
    place.refused(&[], 1, &["_proj.weight", "170", "172"]);
}

#[test]
fn an_unknown_family_and_a_damaged_config() {
    let Some(place) = Place::new() else { return };
    place.spoil("config.json", "\"model_type\": \"llama\"", "\"model_type\": \"mamba2\"");
    place.refused(&[], 2, &["mamba2", "llama"]);
    place.spoil("config.json", "\"hidden_size\": 64", "\"hidden_size\": ");
    place.refused(&[], 1, &["config.json"]);
}

#[test]
fn a_vocabulary_that_is_not_the_tokenizers() {
    let Some(place) = Place::new() else { return };
    place.spoil("config.json", "\"vocab_size\": 512", "\"vocab_size\": 500");
    place.refused(&[], 2, &["tokenizer", "500"]);
    fs::remove_file(place.model.join("tokenizer.json")).unwrap();
    place.refused(&[], 1, &["tokenizer"]);
}

#[test]
fn unknown_keys_and_values() {
    let Some(place) = Place::new() else { return };
    let recipe = place.write("a.toml", "seed = 1\n\nlearning_rat = 1e-3\n");
    place.refused(&[&recipe], 2, &["a.toml:3", "learning_rat", "did you mean learning_rate"]);
    let recipe = place.write("b.toml", "seed = 1\nmax_length = \"long\"\n");
    place.refused(&[&recipe], 2, &["b.toml:2", "max_length"]);
    let recipe = place.write("c.toml", "seed = \n");
    place.refused(&[&recipe], 2, &["c.toml:1"]);
    place.refused(&["none.toml"], 2, &["none.toml", "no such"]);
    place.refused(&["--learning-rat", "1"], 2, &["did you mean --learning_rate"]);
    place.refused(&["--dtype", "bf61"], 2, &["--dtype", "bf61", "bf16"]);
    place.refused(&["--adapter", "steerin"], 2, &["did you mean", "steering"]);
    place.refused(&["--steering_layers", "3-9"], 2, &["steering_layers", "0 to 4"]);
    place.refused(&["--lora_target_modules", "q_pro", "--adapter", "lora"], 2, &["q_proj"]);
    place.refused(&["--learning_rate"], 2, &["--learning_rate", "needs a value"]);
    place.refused(&["--learning_rate", "-1"], 2, &["learning_rate"]);
    place.refused(
        &["--eval_accuracy", "ends"],
        2,
        &["gold answers (gsm8k, aqua, addsub, multiarith, singleeq, arithmetic, listops)"],
    );
}

#[test]
fn malformed_rows() {
    let Some(place) = Place::new() else { return };
    let good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    for (name, bad, wanted) in [
        ("json", "{\"prompt\": \"a\", \"completion\"\n", "not a JSON object"),
        ("array", "[1, 2]\n", "a row is an object"),
    ] {
        let file = format!("{name}.jsonl");
        let rows = place.write(&file, &format!("{good}{good}{bad}{good}"));
        place.refused(&["--dataset_name", &rows], 1, &[&format!("{file}:3"), wanted]);
    }
    for (name, bad, wanted) in [
        ("column", "{\"question\": \"a\"}\n", "question"),
        ("type", "{\"prompt\": \"a\", \"completion\": 3}\n", "completion"),
    ] {
        let file = format!("{name}.jsonl");
        let rows = place.write(&file, &format!("{good}{good}{bad}{}", good.repeat(9)));
        for held_out in ["0", "6"] {
            let flags = ["--dataset_name", &rows, "--max_eval_samples", held_out];
            place.refused(&flags, 2, &[&format!("{file}: row 3: "), wanted]);
        }
    }
    fs::create_dir(place.path("split")).unwrap();
    place.write("split/train.jsonl", good);
    let folder = place.path("split");
    place.write("split/test.jsonl", "{\"prompt\": ");
    place.refused(&["--dataset_name", text(&folder)], 1, &["test.jsonl:1", "not a JSON object"]);
    fs::remove_file(folder.join("test.jsonl")).unwrap();
    let flags = ["--dataset_name", text(&folder), "--dataset_test_split", "dev"];
    place.refused(&flags, 2, &["no split dev"]);
    place.sft(&["--dataset_name", text(&folder), "--dry_run"]).ok();
    let empty = place.write("empty.jsonl", "");
    place.refused(&["--dataset_name", &empty], 2, &["empty.jsonl: the file holds no row"]);
    let other = place.write("rows.txt", good);
    place.refused(&["--dataset_name", &other], 2, &["rows.txt"]);
    place.refused(&["--prompt_template", "{{ nam }}"], 2, &["rows.jsonl: row 1: ", "nam"]);
    place.refused(&["--prompt_template", "{{ prompt"], 2, &["prompt_template"]);
}

#[test]
fn keys_that_the_rows_cannot_serve() {
    let Some(place) = Place::new() else { return };
    for dry_run in ["false", "true"] {
        let refused = |flags: &[&str], wanted: &[&str]| {
            let flags = [flags, &["--dry_run", dry_run]].concat();
            place.refused(&flags, 2, wanted);
        };
        refused(&["--eval_steps", "1"], &["no row is held out", "set max_eval_samples"]);
        refused(
            &["--eval_accuracy", "ends"],
            &["gold answers (gsm8k, aqua, addsub, multiarith, singleeq, arithmetic, listops)"],
        );
        refused(&["--assistant_only_loss"], &["row 1", "messages", "completion_only_loss"]);
        let plain = place.write("plain.jsonl", "{\"text\": \"once upon a time\"}\n");
        let flags = ["--dataset_name", &plain, "--steering_positions", "last"];
        refused(&flags, &["row 1 has no prompt", "steering_positions = \"last\""]);
        let task = ["--dataset_name", "listops"];
        refused(&[&task[..], &["--system_prompt", "x"]].concat(), &["system_prompt", "listops"]);
        refused(&[&task[..], &["--columns", "prompt=a"]].concat(), &["columns", "listops"]);
    }
    let model = ["--model_name_or_path", text(&place.model)];
    let zero = ["generate", "--prompt", "a", "--raw", "--max_new_tokens", "0"];
    says(run(STEER, &[&zero[..], &model].concat()).only_sentence(2), &["max_new_tokens"]);
    let unused = ["eval", "--dataset_name", "listops", "--packing"];
    says(run(STEER, &[&unused[..], &model].concat()).only_sentence(2), &["packing"]);
}

#[test]
fn a_row_that_is_too_long() {
    let Some(place) = Place::new() else { return };
    let row = |n: usize| format!("{{\"text\": \"{}\"}}\n", "once upon a time ".repeat(n));
    let rows = place.write("long.jsonl", &(row(1).repeat(4) + &row(200) + &row(1)));
    for held_out in ["0", "3"] {
        let flags = ["--dataset_name", &rows, "--max_eval_samples", held_out, "--max_length"];
        let wanted = ["long.jsonl", "row 5", "the model's context of 512: shorten"];
        place.refused(&[&flags[..], &["0"]].concat(), 1, &wanted);
        let wanted = ["long.jsonl", "row 5", "max_length of 16: raise max_length"];
        place.refused(&[&flags[..], &["16"]].concat(), 1, &wanted);
    }
    let flags = ["--dataset_name", &rows, "--max_eval_samples", "0", "--max_length", "16"];
    let cut = place.sft(&[&flags[..], &["--truncation_mode", "keep_start"]].concat());
    assert_eq!(cut.code, Some(0), "{}", cut.stderr);
    says(&cut.stderr, &["long.jsonl train: 1 of 6 rows were cut to 16 tokens"]);
    let row = format!("{{\"prompt\": \"{}\", \"completion\": \"a\"}}\n", "once upon ".repeat(20));
    let rows = place.write("prompts.jsonl", &row.repeat(2));
    let flags = ["--dataset_name", &rows, "--max_eval_samples", "0", "--max_length", "8"];
    let flags = [&flags[..], &["--truncation_mode", "keep_start", "--dry_run"]].concat();
    let none = place.sft(&flags);
    says(none.only_sentence(1), &["prompts.jsonl train", "first 8: raise max_length"]);
}

#[test]
fn a_conversation_for_a_model_without_a_template() {
    let Some(place) = Place::new() else { return };
    let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n";
    let rows = place.write("chat.jsonl", row);
    place.refused(&["--dataset_name", &rows], 2, &["chat template", "chat_template_path"]);
}

#[test]
fn adapters_that_do_not_fit() {
    let Some(place) = Place::new() else { return };
    place.sft(&["--steering_rank", "2"]).ok();
    let good = place.path("good");
    fs::rename(place.path("out"), &good).unwrap();
    let tokens = ids(&[1, 2, 3]);
    let refuse = |dir: &Path, code: i32, wanted: &[&str]| {
        place.refused(&["--adapter_name_or_path", text(dir)], code, wanted);
        place.forward_refused(&tokens, &["--adapter", text(dir)], code, wanted);
    };
    refuse(&place.path("none"), 2, &["none: no such folder"]);
    refuse(&place.model, 2, &["no adapter here", "steering_config.json", "adapter_config.json"]);

    let spoilt = |name: &str, from: &str, to: &str| {
        let dir = copy_model(&good, &place.path(name));
        let path = dir.join("steering_config.json");
        let config = fs::read_to_string(&path).unwrap();
        assert!(config.contains(from), "{config}");
        fs::write(path, config.replace(from, to)).unwrap();
        dir
    };
    let wanted = ["steering_model.safetensors", "layers.0.down.weight", "[2, 64]", "[3, 64]"];
    refuse(&spoilt("rank", "\"rank\": 2", "\"rank\": 3"), 1, &wanted);
    refuse(&spoilt("kind", "\"linear\"", "\"vector\""), 1, &["steering_model.safetensors"]);
    refuse(&spoilt("word", "\"linear\"", "\"liner\""), 1, &["steering_config.json", "liner"]);
    refuse(&spoilt("json", "{", "["), 1, &["steering_config.json"]);
    let dir = copy_model(&good, &place.path("truncated"));
    let bytes = fs::read(dir.join("steering_model.safetensors")).unwrap();
    fs::write(dir.join("steering_model.safetensors"), &bytes[..bytes.len() - 9]).unwrap();
    refuse(&dir, 1, &["steering_model.safetensors"]);
    fs::remove_file(dir.join("steering_model.safetensors")).unwrap();
    refuse(&dir, 1, &["steering_model.safetensors", "no such file"]);
    let twice = ["--adapter", text(&good), "--adapter", text(&good)];
    place.forward_refused(&tokens, &twice, 2, &["another adapter has"]);
}

#[test]
fn bad_input_to_forward() {
    let Some(place) = Place::new() else { return };
    let zeros = Tensor::zeros((1, 600), candle_core::DType::I64, &Device::Cpu).unwrap();
    place.forward_refused(&zeros, &[], 1, &["in.safetensors", "600", "context of 512"]);
    place.forward_refused(&ids(&[1, 512]), &[], 1, &["512", "outside the vocabulary of 512"]);
    place.forward_refused(&ids(&[1, -1]), &[], 1, &["-1", "outside the vocabulary"]);
    place.forward_refused(&ids(&[1]), &[], 1, &["input_ids", "two tokens"]);
    let flat = Tensor::new(&[1i64, 2], &Device::Cpu).unwrap();
    place.forward_refused(&flat, &[], 1, &["input_ids", "[B, T]"]);
    let noise = place.write("noise.safetensors", "these are not tensors");
    let good = ids(&[1, 2]);
    place.forward_refused(&good, &["--input", &noise], 1, &["noise.safetensors"]);
    let none = place.path("none.safetensors");
    place.forward_refused(&good, &["--input", text(&none)], 1, &["no such file"]);
    let below = format!("{noise}/out.safetensors");
    place.forward_refused(&good, &["--output", &below], 1, &["out.safetensors"]);
    place.forward_refused(&good, &["--outputs", "x"], 2, &["did you mean --output"]);
    place.forward_refused(&good, &["--matmul_precision", "hihg"], 2, &["did you mean", "high"]);
    says(run(STEER, &["forward"]).only_sentence(2), &["--input", "--output"]);
    says(run(STEER, &["foward"]).only_sentence(2), &["did you mean", "forward"]);
    says(run(STEER, &["model", "inspekt"]).only_sentence(2), &["did you mean", "inspect"]);
}

#[test]
fn forward_refuses_what_it_would_not_read_or_would_overwrite() {
    let Some(place) = Place::new() else { return };
    let good = ids(&[1, 2, 3]);
    let input = place.path("in.safetensors");
    let around = place.path("model/../in.safetensors");
    for output in [&input, &around] {
        let flags = ["--output", text(output)];
        place.forward_refused(&good, &flags, 2, &["in.safetensors", "--input", "another"]);
    }
    let tensors = ["input_ids", "attention_mask"].map(|name| (name.to_string(), good.clone()));
    let other = place.path("other.safetensors");
    candle_core::safetensors::save(&HashMap::from(tensors), &other).unwrap();
    let wanted = ["other.safetensors", "attention_mask is not read"];
    place.forward_refused(&good, &["--input", text(&other)], 2, &wanted);
}

#[test]
fn a_standard_output_that_is_full_or_closed() {
    let Some(place) = Place::new() else { return };
    let model = ["--model_name_or_path", text(&place.model)];
    let inspect = [&["model", "inspect"], &model[..]].concat();
    let answer = ["generate", "--raw", "--prompt", "Once upon a time", "--max_new_tokens", "30"];
    let answer = [&answer[..], &model].concat();
    let steer: [&[&str]; 3] = [&[], &inspect, &answer];
    let programs = steer.map(|args| (STEER, args)).into_iter().chain([(SFT, &["--help"][..])]);
    for (program, args) in programs {
        let mut full = command(program, args);
        full.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
        says(ran(full).only_sentence(1), &["standard output: no space left"]);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut closed = command(program, args);
        closed.stdout(writer);
        let quiet = ran(closed);
        assert_eq!((quiet.code, quiet.stderr.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn a_model_given_to_inspect_without_its_flag() {
    for model in ["path/to/model", "model.gguf"] {
        let wanted = ["--model_name_or_path ", model];
        says(run(STEER, &["model", "inspect", model]).only_sentence(2), &wanted);
    }
    let folder = tempfile::tempdir().unwrap();
    let args = ["model", "inspect", "--rank", "4", text(folder.path())];
    says(run(STEER, &args).only_sentence(2), &["no configuration file"]);
}

#[test]
fn an_output_folder_that_cannot_be_written() {
    let Some(place) = Place::new() else { return };
    let file = place.write("file", "mine");
    for folder in [file.clone(), format!("{file}/out")] {
        let wanted = format!("output_dir {folder}: cannot be created: ");
        place.refused(&["--output_dir", &folder], 1, &[&wanted]);
        place.refused(&["--output_dir", &folder, "--dry_run"], 1, &[&wanted]);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

/// A tmpfs of a few KiB, unmounted when dropped.
struct TinyDisk(tempfile::TempDir);

impl TinyDisk {
    fn mount(kib: usize) -> Option<Self> {
        let disk = TinyDisk(tempfile::tempdir().unwrap());
        if disk.option(&format!("size={kib}k")) {
            return Some(disk);
        }
        eprintln!("SKIPPED: mounting a tmpfs needs root and a kernel that allows it");
        None
    }

    fn option(&self, option: &str) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", option, "tmpfs"]).arg(self.0.path());
        mount.output().is_ok_and(|output| output.status.success())
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
fn a_full_disk_stops_a_run_that_can_be_resumed_when_there_is_room() {
    let Some(place) = Place::new() else { return };
    let keys = "--save_steps 2 --max_steps 8 --logging_steps 1 --max_eval_samples 4";
    let keys: Vec<&str> = keys.split(' ').collect();
    place.sft(&keys).ok();
    let whole = adapter_files(&place.path("out"));
    let mut stopped = 0;
    for kib in [4, 8, 16, 40, 72, 100, 180, 400, 900] {
        let Some(disk) = TinyDisk::mount(kib) else { return };
        let out = disk.0.path().join("run");
        let keys = [&keys[..], &["--output_dir", text(&out)]].concat();
        let ran = place.sft(&keys);
        if ran.code != Some(0) {
            stopped += 1;
            says(ran.sentence(1), &["no space left on the disk", text(disk.0.path())]);
        }
        assert!(names(&out).iter().all(|name| !name.starts_with('.')), "{:?}", names(&out));
        if out.join("metrics.jsonl").exists() {
            metrics(&out);
        }
        for step in checkpoints(&out) {
            let held = names(&out.join(format!("checkpoint-{step}")));
            assert!(held.contains(&"manifest.json".to_string()) && held.len() == 6, "{held:?}");
        }
        assert!(disk.option("remount,size=9m"));
        let resume = ["--resume_from_checkpoint", "latest"];
        place.sft(&[&keys[..], &resume].concat()).ok();
        assert!(adapter_files(&out) == whole, "{kib} KiB: the resumed run differs");
    }
    assert!((5..9).contains(&stopped), "{stopped} of 9 disks were too small");
}

#[test]
fn a_full_disk_leaves_no_output_of_forward() {
    let Some(place) = Place::new() else { return };
    let Some(disk) = TinyDisk::mount(8) else { return };
    let output = disk.0.path().join("out.safetensors");
    let wanted = ["out.safetensors", "no space left on the disk"];
    place.forward_refused(&ids(&[1; 40]), &["--output", text(&output)], 1, &wanted);
    assert_eq!(names(disk.0.path()), [""; 0]);
}
