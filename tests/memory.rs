//! The memory that a run takes is the memory that its plan says.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use common::program::{SFT, adapter_files, command, run, text};
use common::shared;
use serde_json::json;
use steersman::model::part_tokens;

/// 60 rows of about 340 tokens each.
fn long_rows(folder: &Path) -> std::path::PathBuf {
    let sentence = "Lily and Tom went to the big red house to play with the dog. ";
    let row = |i: usize| {
        let completion = sentence.repeat(16);
        json!({"prompt": format!("{i}"), "completion": completion}).to_string() + "\n"
    };
    let path = folder.join("rows.jsonl");
    fs::write(&path, (0..60).map(row).collect::<String>()).unwrap();
    path
}

/// Bytes that the plan named, and the most that the program was resident with, MiB.
fn predicted_and_taken(args: &[&str], log: &Path) -> (f64, f64) {
    let mut program = command(SFT, args);
    let out = fs::File::create(log).unwrap();
    let mut child = program.stdout(Stdio::null()).stderr(out).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(&status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        peak = kib.unwrap_or(0.0).max(peak);
        std::thread::sleep(Duration::from_millis(2));
    }
    let said = fs::read_to_string(log).unwrap();
    let predicted = said.lines().find_map(|line| line.strip_prefix("memory: ")).expect(&said);
    let mib = predicted.split_once("about ").unwrap().1.split_once(" MiB").unwrap().0;
    (mib.parse().unwrap(), peak / 1024.0)
}

#[test]
fn a_run_takes_the_memory_that_its_plan_names() {
    let Some(model) = shared("models/stories260k") else { return };
    if cfg!(not(target_os = "linux")) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let rows = long_rows(dir.path());
    for (i, keys) in [
        "--adapter steering",
        "--adapter lora --lora_dropout 0.1",
        "--adapter steering --steering_site post_mlp --gradient_checkpointing",
        "--adapter joint --micro_batch_tokens 9000",
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let fixed = "--max_steps 1 --per_device_train_batch_size 60 --save_steps 0";
        let mut args = vec!["--model_name_or_path", text(&model), "--dataset_name", text(&rows)];
        args.extend(["--output_dir", text(&out), "--micro_batch_tokens", "0"]);
        args.extend(fixed.split(' ').chain(keys.split(' ')));
        let (predicted, taken) = predicted_and_taken(&args, &dir.path().join("log"));
        let off = (predicted / taken - 1.0).abs();
        assert!(off < 0.15, "{keys}: {predicted} MiB predicted, {taken} MiB taken");
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_training() {
    let Some(model) = shared("models/stories260k") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (rows, out) = (long_rows(dir.path()), dir.path().join("run"));
    let args = ["--model_name_or_path", text(&model), "--dataset_name", text(&rows)];
    let args = [&args[..], &["--output_dir", text(&out), "--memory_budget", "20MiB"]].concat();
    let ran = run(SFT, &args);
    let said = ran.only_sentence(2);
    assert!(said.contains("20 MiB is its memory_budget"), "{said}");
    assert!(said.contains("even with gradient_checkpointing"), "{said}");
    assert!(!out.exists(), "a refused run left files");
}

#[test]
fn a_plan_is_part_of_the_run_and_made_once() {
    let Some(model) = shared("models/stories260k") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (rows, out) = (long_rows(dir.path()), dir.path().join("run"));
    let fixed = "--per_device_train_batch_size 3 --save_steps 1 --max_steps";
    let args = ["--model_name_or_path", text(&model), "--dataset_name", text(&rows)];
    let args = [&args[..], &["--output_dir", text(&out)]].concat();
    let args: Vec<&str> = args.into_iter().chain(fixed.split(' ')).collect();
    let more = |keys: &'static str| [&args[..], &keys.split(' ').collect::<Vec<_>>()].concat();
    let planned = |file: &str| {
        let text = fs::read_to_string(out.join(file)).unwrap();
        let keys = ["micro_batch_tokens = ", "gradient_checkpointing = "];
        keys.map(|key| text.lines().find_map(|l| l.strip_prefix(key)).unwrap().to_string())
    };
    run(SFT, &more("1 --micro_batch_tokens 700 --gradient_checkpointing")).ok();
    assert_eq!(planned("checkpoint-1/config.toml"), ["700", "true"]);
    let ran = run(SFT, &more("2 --resume_from_checkpoint latest")).ok();
    assert!(ran.stderr.contains("micro-batches of 700 tokens"), "{}", ran.stderr);
    assert_eq!(planned("config.toml"), ["700", "true"]);
    assert_eq!(planned("checkpoint-2/config.toml"), ["700", "true"]);
    let resumed = adapter_files(&out);
    fs::remove_dir_all(&out).unwrap();
    run(SFT, &more("2")).ok();
    assert_eq!(planned("config.toml"), [part_tokens().to_string().as_str(), "false"]);
    assert!(adapter_files(&out) == resumed, "the plan changed the result");
}
