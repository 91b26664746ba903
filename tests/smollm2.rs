//! The default model from its GGUF file against transformers on the same dequantised weights.
//!
//! Wants `steer model fetch smollm2-135m-instruct` and the GSM8K file; skips visibly without them.

mod common;

use common::shared;
use datasets::{Task, TaskOptions};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};
use steersman::model::{LoadedModel, ModelSource, TextModel, fetch};
use steersman::ops::{Engine, WeightDtype};
use steersman::rollout::{GenerateOptions, Generator, Request};
use steersman::train::tokenize::Encoder;

fn digest(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the model is in the user's cache.
fn fetched() -> bool {
    let path = fetch::smollm2_path().unwrap();
    let found = path.is_file();
    if !found {
        let name = fetch::SMOLLM2;
        eprintln!("SKIPPED: {} is missing; run `steer model fetch {name}`", path.display());
    }
    found
}

#[test]
fn rows_of_tasks_are_the_prompt_that_is_generated_from_and_the_answer() {
    if !fetched() {
        return;
    }
    let source = ModelSource::find(fetch::SMOLLM2).unwrap();
    let text = TextModel::load(&source, None, 49152).unwrap();
    let encoder = Encoder::new(&text).unwrap();
    let path = shared("data/gsm8k");
    let tasks = [Some((Task::ListOps, None)), path.map(|path| (Task::Gsm8k, Some(path)))];
    for (task, path) in tasks.into_iter().flatten() {
        let options = TaskOptions { path, ..Default::default() };
        for problem in task.problems("train", 1600, &options).unwrap() {
            let messages: Vec<_> = problem.prompt.iter().map(|m| m.to_json()).collect();
            let example = encoder.chat(&messages, &problem.target, false).unwrap();
            let prompt = text.chat_prompt(&problem.prompt).unwrap();
            let answer = format!("{}<|im_end|>", problem.target);
            let answer = text.tokenizer.encode(&answer, false).unwrap();
            assert_eq!(example.input_ids, [&prompt[..], &answer].concat());
            assert_eq!((example.prompt_length, example.targets()), (prompt.len(), answer.len()));
        }
    }
}

#[test]
fn greedy_answers_to_ten_questions_equal_those_of_transformers() {
    let Some(questions) = shared("data/gsm8k/test.jsonl") else { return };
    if !fetched() {
        return;
    }
    let engine = Engine::cpu();
    let model = LoadedModel::load(fetch::SMOLLM2, Some(WeightDtype::F32), &engine).unwrap();
    let text = TextModel::load(&model.source, None, model.policy.config().vocab_size).unwrap();
    let rows = std::fs::read_to_string(questions).unwrap();
    let requests: Vec<Request> = rows
        .lines()
        .take(10)
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let messages = json!([{"role": "user", "content": row["question"]}]);
            let prompt = text.template().unwrap().render(&messages, true, &Map::new()).unwrap();
            let prompt = text.tokenizer.encode(&prompt, false).unwrap();
            Request { prompt, prompt_id: 0, sample: 0 }
        })
        .collect();
    let options = GenerateOptions {
        max_new_tokens: 128,
        eos_token_ids: text.stop_token_ids.clone(),
        ..Default::default()
    };
    let generator = Generator::new(&model.policy, &[], &options, None);
    let completions = generator.run(&requests, &mut |_| {}).unwrap();
    let wanted = include_str!("fixtures/gsm8k_greedy.txt").lines();
    for ((request, completion), line) in requests.iter().zip(&completions).zip(wanted) {
        let (prompt, new) = (&request.prompt, &completion.tokens);
        let found = format!("{} {} {} {}", prompt.len(), digest(prompt), new.len(), digest(new));
        assert_eq!(found, line, "{}", text.tokenizer.decode(new, false).unwrap());
    }
}
