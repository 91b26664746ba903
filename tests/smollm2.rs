//! The default model from its GGUF file against transformers on the same dequantised weights.
//!
//! Wants `steer model fetch smollm2-135m-instruct` and the GSM8K file; skips visibly without them.

mod common;

use common::shared;
use serde_json::{Map, json};
use sha2::{Digest, Sha256};
use steersman::model::{LoadedModel, TextModel, fetch};
use steersman::ops::{Engine, WeightDtype};
use steersman::rollout::{GenerateOptions, Generator, Request};

fn digest(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn greedy_answers_to_ten_questions_equal_those_of_transformers() {
    let Some(questions) = shared("data/gsm8k/test.jsonl") else { return };
    let path = fetch::smollm2_path().unwrap();
    if !path.is_file() {
        eprintln!(
            "SKIPPED: {} is missing; run `steer model fetch {}`",
            path.display(),
            fetch::SMOLLM2
        );
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
        eos_token_ids: model.generation.eos_token_ids.clone(),
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
