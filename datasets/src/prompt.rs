//! What a completion is sampled for, and what a reward may know of it.

use serde_json::{Value, json};

use crate::{Message, Problem, Row};

/// The text up to the completion.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Plain text that goes on as plain text.
    Text(String),
    /// A conversation up to the assistant's answer; messages stay JSON for the chat template.
    Messages(Vec<Value>),
}

impl Prompt {
    /// The prompt as rewards see it: a string, or a list of `{"role", "content"}`.
    pub fn to_json(&self) -> Value {
        match self {
            Prompt::Text(text) => json!(text),
            Prompt::Messages(messages) => json!(messages),
        }
    }
}

/// A row to sample completions for.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptRow {
    /// Number of the row in its split, from 0.
    pub id: u64,
    /// What is given to the model.
    pub prompt: Prompt,
    /// Every further column of the row, for rewards. Tasks give `answer` (what a right answer comes
    /// to) and `target` (a worked answer).
    pub columns: Row,
}

impl Problem {
    /// The problem as a row to sample completions for.
    pub fn prompt_row(&self) -> PromptRow {
        let prompt = Prompt::Messages(self.prompt.iter().map(Message::to_json).collect());
        let columns = [("answer", &self.gold), ("target", &self.target)];
        let columns = columns.map(|(name, text)| (name.to_string(), json!(text)));
        PromptRow { id: self.id, prompt, columns: columns.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_of_a_task_see_its_gold_and_worked_answers() {
        let prompt = vec![Message::user("1 + 1?")];
        let problem = Problem { id: 3, prompt, target: "so #### 2".into(), gold: "2".into() };
        let row = problem.prompt_row();
        assert_eq!(row.id, 3);
        assert_eq!(row.prompt.to_json(), json!([{"role": "user", "content": "1 + 1?"}]));
        assert_eq!(Value::Object(row.columns), json!({"answer": "2", "target": "so #### 2"}));
        assert_eq!(Prompt::Text("a".into()).to_json(), json!("a"));
    }
}
