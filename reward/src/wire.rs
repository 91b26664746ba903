//! How calls of a reward elsewhere and their answers are written: as JSON.
//!
//! A call is `{"prompts": [...], "completions": [...], "completion_ids": [...], columns...}`, a
//! list of one entry a completion each; the answer is `{"rewards": [1.0, null, ...]}`, `null`
//! for a completion that the reward is not for, or `{"error": "..."}`. A prompt of messages comes as a
//! list of them, and its completion then as a list of one message of the assistant, as in TRL.

use std::collections::BTreeSet;

use datasets::Prompt;
use serde_json::{Map, Value, json};

use crate::reward::{Sample, Score, miscounted};

/// Failures of a whole call.
pub(crate) fn failed(reason: &str, n: usize) -> Vec<Score> {
    vec![Score::Error(reason.to_string()); n]
}

/// The call for some samples.
pub(crate) fn request(samples: &[Sample]) -> Value {
    let mut fields = Map::new();
    let list = |of: &dyn Fn(&Sample) -> Value| Value::Array(samples.iter().map(of).collect());
    let names: BTreeSet<&String> =
        samples.iter().flat_map(|sample| sample.columns.keys()).collect();
    for name in names {
        let column = |sample: &Sample| sample.columns.get(name).cloned().unwrap_or(Value::Null);
        fields.insert(name.clone(), list(&column));
    }
    fields.insert("prompts".into(), list(&|sample| sample.prompt.to_json()));
    fields.insert("completions".into(), list(&completion));
    fields.insert("completion_ids".into(), list(&|sample| json!(sample.completion_ids)));
    Value::Object(fields)
}

fn completion(sample: &Sample) -> Value {
    match sample.prompt {
        Prompt::Text(_) => json!(sample.completion),
        Prompt::Messages(_) => json!([{"role": "assistant", "content": sample.completion}]),
    }
}

/// The scores of an answer for `n` samples.
pub(crate) fn scores(line: &str, n: usize) -> Result<Vec<Score>, String> {
    let start: String = line.chars().take(80).collect();
    let not_json = ["NaN", "Infinity"].iter().find(|name| line.contains(**name));
    let hint = not_json.map(|name| format!(" ({name} is no JSON: null stands for does not apply)"));
    let hint = hint.unwrap_or_default();
    let nonsense = || format!("it answered {start:?}, which is not {{\"rewards\": [...]}}{hint}");
    let answer: Value = serde_json::from_str(line).map_err(|_| nonsense())?;
    if let Some(error) = answer.get("error") {
        return Ok(failed(error.as_str().unwrap_or("it failed without a reason"), n));
    }
    let rewards = answer.get("rewards").and_then(Value::as_array).ok_or_else(nonsense)?;
    if rewards.len() != n {
        return Ok(failed(&miscounted("reward", rewards.len(), n), n));
    }
    let score = |reward: &Value| match reward {
        Value::Null => Score::NotApplicable,
        Value::String(reason) => Score::Error(reason.clone()),
        other => match other.as_f64() {
            Some(value) => Score::Value(value),
            None => Score::Error(format!("it gave {other}, which is no number")),
        },
    };
    Ok(rewards.iter().map(score).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use datasets::Row;

    #[test]
    fn calls_hold_every_column_and_completions_as_trl_gives_them() {
        let text = Prompt::Text("p".into());
        let chat = Prompt::Messages(vec![json!({"role": "user", "content": "q"})]);
        let (a, b): (Row, Row) = (
            [("answer".to_string(), json!("1"))].into_iter().collect(),
            [("level".to_string(), json!(2))].into_iter().collect(),
        );
        let samples = [
            Sample { prompt: &text, completion: "x", completion_ids: &[3, 4], columns: &a },
            Sample { prompt: &chat, completion: "y", completion_ids: &[5], columns: &b },
        ];
        let wanted = json!({
            "answer": ["1", null], "level": [null, 2],
            "prompts": ["p", [{"role": "user", "content": "q"}]],
            "completions": ["x", [{"role": "assistant", "content": "y"}]],
            "completion_ids": [[3, 4], [5]],
        });
        assert_eq!(request(&samples), wanted);
    }

    #[test]
    fn answers_are_scores_or_say_what_is_wrong() {
        let all = scores(r#"{"rewards": [1, null, "it gave nan"]}"#, 3).unwrap();
        let nan = Score::Error("it gave nan".into());
        assert_eq!(all, [Score::Value(1.0), Score::NotApplicable, nan]);
        let reason = |line: &str| match scores(line, 1) {
            Ok(scores) => match &scores[..] {
                [Score::Error(reason)] => reason.clone(),
                other => panic!("{other:?}"),
            },
            Err(reason) => reason,
        };
        assert_eq!(reason(r#"{"rewards": [1, 2]}"#), "it gave 2 rewards for 1 completion");
        assert_eq!(reason(r#"{"rewards": [true]}"#), "it gave true, which is no number");
        assert_eq!(reason(r#"{"error": "no"}"#), "no");
        assert!(
            reason("{\"rewards\": [NaN]}")
                .ends_with("(NaN is no JSON: null stands for does not apply)")
        );
        for nonsense in ["hello", "{\"rewards\": NaN}", "[1]", "{}", ""] {
            assert!(reason(nonsense).contains("which is not"), "{nonsense}");
        }
    }
}
