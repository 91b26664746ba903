//! The prompts of a policy-gradient run: found, rendered, tokenised.

use std::collections::BTreeSet;

use datasets::{Grader, Prompt, PromptRow, Row, Task, Template};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tracing::debug_span;

use super::data::{Numbered, OwnRows, both_splits, check, own_rows, refuse_keys_of_rows};
use crate::config::DataArgs;
use crate::model::TextModel;
use crate::{Error, Result};

/// Rows to sample completions for.
pub struct PromptData {
    /// What errors call it.
    pub name: String,
    /// Those that are trained on.
    pub train: Vec<PromptRow>,
    /// Those that are evaluated on.
    pub test: Vec<PromptRow>,
    /// How answers are graded, if the data is a task's.
    pub grader: Option<Grader>,
}

/// A row as tokens.
pub struct PromptTokens {
    /// The row.
    pub row: PromptRow,
    /// Token ids of its prompt.
    pub input_ids: Vec<u32>,
}

impl PromptData {
    /// Loads what `dataset_name` names: a task, whose gold answers must all grade right, or rows of a
    /// file, a folder or a hub id. Of a single file, `max_eval_samples` rows that `seed` picks are
    /// held out, at most half of them.
    ///
    /// # Errors
    /// If nothing of that name exists, a row is malformed or has no prompt, or a gold answer does not
    /// grade right.
    pub fn load(args: &DataArgs, seed: u64) -> Result<Self> {
        let _phase = debug_span!("read rows").entered();
        let data = match Task::find(args.dataset()?) {
            Some(task) => Self::of_task(task, args)?,
            None => Self::of_rows(args, seed)?,
        };
        match data.train.is_empty() {
            true => Err(Error::usage("the training split holds no row")),
            false => Ok(data),
        }
    }

    fn of_task(task: Task, args: &DataArgs) -> Result<Self> {
        refuse_keys_of_rows(task, args)?;
        let options = both_splits(task, args)?;
        let train = task.problems(&args.dataset_train_split, options.max_train, &options)?;
        let test = task.problems(&args.dataset_test_split, options.max_test, &options)?;
        if let Some(grader) = task.grader() {
            check(grader, train.iter().chain(&test))?;
        }
        let rows = |problems: &[datasets::Problem]| {
            problems.iter().map(datasets::Problem::prompt_row).collect()
        };
        let name = task.name().to_string();
        Ok(PromptData { name, train: rows(&train), test: rows(&test), grader: task.grader() })
    }

    fn of_rows(args: &DataArgs, seed: u64) -> Result<Self> {
        let OwnRows { path, train, test } = own_rows(args, seed)?;
        let template = Template {
            prompt_template: args.prompt_template.clone(),
            completion_template: None,
            system_prompt: args.system_prompt.clone(),
            columns: args.columns.0.clone(),
        };
        let row = |(number, row): &Numbered<Row>| -> Result<PromptRow> {
            let named = |error| Error::usage(format!("{}: row {number}: {error}", path.display()));
            template.prompt_row(*number as u64 - 1, row).map_err(named)
        };
        let rows = |rows: &[Numbered<Row>]| rows.iter().map(row).collect::<Result<_>>();
        let name = path.display().to_string();
        Ok(PromptData { name, train: rows(&train)?, test: rows(&test)?, grader: None })
    }

    /// What the user should know of the rows, as [`uneven`] says it.
    pub fn advice(&self) -> Vec<String> {
        let rows: Vec<&PromptRow> = self.train.iter().chain(&self.test).collect();
        uneven(&self.name, &rows)
    }

    /// Token ids of the prompts, training rows first; all rows get all columns, as [`fill`] does.
    ///
    /// # Errors
    /// If the chat template refuses a row, or a prompt leaves no room in the model's context.
    pub fn tokenise(
        mut self,
        text: &TextModel,
        context: usize,
    ) -> Result<(Vec<PromptTokens>, Vec<PromptTokens>)> {
        let _phase = debug_span!("tokenize").entered();
        fill(&mut self.train.iter_mut().chain(&mut self.test).collect::<Vec<_>>());
        let name = &self.name;
        let encode = |row: PromptRow| -> Result<PromptTokens> {
            let input_ids = match &row.prompt {
                Prompt::Text(prompt) => text.tokenizer.encode(prompt, true)?,
                Prompt::Messages(messages) => text.chat_prompt(messages)?,
            };
            let (number, len) = (row.id + 1, input_ids.len());
            match len {
                _ if is_empty(&row.prompt) || len == 0 => Err(Error::usage(format!(
                    "{name}: row {number}: the prompt is empty: write one or remove the row"
                ))),
                _ if len >= context => Err(Error::failure(format!(
                    "{name}: row {number}: the prompt has {len} tokens, and the model's context is \
                     {context}: shorten or remove it"
                ))),
                _ => Ok(PromptTokens { row, input_ids }),
            }
        };
        let all = |rows: Vec<PromptRow>| -> Result<Vec<PromptTokens>> {
            let encoded: Vec<Result<_>> = rows.into_par_iter().map(encode).collect();
            encoded.into_iter().collect()
        };
        Ok((all(self.train)?, all(self.test)?))
    }
}

/// Gives every row the columns that others have, as null.
pub fn fill(rows: &mut [&mut PromptRow]) {
    let names: BTreeSet<String> = rows.iter().flat_map(|row| row.columns.keys().cloned()).collect();
    for row in rows {
        for name in &names {
            row.columns.entry(name.clone()).or_insert(serde_json::Value::Null);
        }
    }
}

/// Whether there is nothing to answer to: the last message has no content.
fn is_empty(prompt: &Prompt) -> bool {
    let Prompt::Messages(messages) = prompt else { return false };
    let content = messages.last().map(|message| &message["content"]);
    content.and_then(|content| content.as_str()).is_some_and(|text| text.trim().is_empty())
}

/// Where rows of the data set `name` differ in what they hold: columns that only some of them have, and
/// prompts of text beside prompts of messages.
pub fn uneven(name: &str, rows: &[&PromptRow]) -> Vec<String> {
    let names: BTreeSet<&String> = rows.iter().flat_map(|row| row.columns.keys()).collect();
    let some = |is: &dyn Fn(&PromptRow) -> bool| -> Option<String> {
        let numbers = || rows.iter().filter(|row| is(row)).map(|row| row.id + 1);
        let (first, count) = (numbers().min()?, numbers().count());
        Some(format!("{name}: {count} of {} rows, row {first} the first,", rows.len()))
    };
    let lacking = |column: &&String| {
        let told = some(&|row| !row.columns.contains_key(*column))?;
        Some(format!("{told} have no column {column}: rewards get null for it"))
    };
    let is_text = |row: &PromptRow| matches!(row.prompt, Prompt::Text(_));
    let mixed = rows.iter().any(|row| !is_text(row)).then(|| some(&is_text)).flatten();
    let mixed = mixed.map(|told| {
        told + " have a prompt of text and the others one of messages: rewards get completions of both \
                kinds"
    });
    names.iter().filter_map(lacking).chain(mixed).collect()
}

/// SHA-256 of prompts, in hex: equal for the same tokens and columns in the same order.
pub fn digest(prompts: &[PromptTokens]) -> String {
    let mut hash = Sha256::new();
    for prompt in prompts {
        hash.update((prompt.input_ids.len() as u64).to_le_bytes());
        prompt.input_ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        let columns = serde_json::to_vec(&prompt.row.columns).unwrap_or_default();
        hash.update((columns.len() as u64).to_le_bytes());
        hash.update(columns);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn row(id: u64, prompt: Prompt, columns: Value) -> PromptRow {
        let Value::Object(columns) = columns else { panic!("no object") };
        PromptRow { id, prompt, columns: columns.into_iter().collect() }
    }

    fn chat(text: &str) -> Prompt {
        Prompt::Messages(vec![json!({"role": "user", "content": text})])
    }

    #[test]
    fn uneven_rows_are_told_with_the_first_of_them_and_filled() {
        let mut rows = [
            row(0, chat("a"), json!({"answer": 1})),
            row(4, Prompt::Text("b".into()), json!({})),
            row(7, chat("c"), json!({"answer": null})),
        ];
        let told = uneven("my.jsonl", &rows.iter().collect::<Vec<_>>());
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].starts_with("my.jsonl: 1 of 3 rows, row 5 the first, have no column answer")
        );
        assert!(
            told[1].starts_with("my.jsonl: 1 of 3 rows, row 5 the first, have a prompt of text")
        );
        fill(&mut rows.iter_mut().collect::<Vec<_>>());
        let answers: Vec<&Value> = rows.iter().map(|row| &row.columns["answer"]).collect();
        assert_eq!(answers, [&json!(1), &Value::Null, &Value::Null]);
    }

    #[test]
    fn a_message_without_content_is_no_prompt() {
        assert!(is_empty(&chat(" ")) && !is_empty(&chat("a")));
        assert!(!is_empty(&Prompt::Text(String::new())), "its tokens decide");
    }
}
