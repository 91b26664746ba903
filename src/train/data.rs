//! The rows of a supervised run: found, rendered, checked, tokenised.

use std::path::{Path, PathBuf};

use datasets::{Example, Grader, Problem, Row, Task, TaskOptions, Template};
use datasets::{aqua, gsm8k, locate};
use datasets::{has_split, read_rows, read_split, split_off};
use rayon::prelude::*;
use reward::check_gold;
use tracing::debug_span;

use super::example::TokenExample;
use super::tokenize::{Encoder, Limit};
use crate::config::{DataArgs, SequenceArgs};
use crate::model::hub;
use crate::notice;
use crate::{Error, Result};

/// The data of a supervised run before tokenisation.
pub struct SftData {
    train: Vec<Numbered<Example>>,
    test: Vec<Numbered<Example>>,
    problems: Option<(Vec<Problem>, Grader)>,
}

/// Something with the number of its row in the file or split, from 1.
pub(super) type Numbered<T> = (usize, T);

impl SftData {
    /// Loads what `dataset_name` names: a task, a file, a folder or a hub id.
    ///
    /// A task's gold answers must all grade right, or nothing is trained; its generated problems
    /// are the same for every seed of a run. Of a single file, `max_eval_samples` rows that `seed`
    /// picks are held out, at most half of them.
    ///
    /// # Errors
    /// If nothing of that name exists, a row is malformed (file and line), or a gold answer does
    /// not grade right.
    pub fn load(args: &DataArgs, sequence: &SequenceArgs, seed: u64) -> Result<Self> {
        let _phase = debug_span!("read rows").entered();
        match Task::find(args.dataset()?) {
            Some(task) => Self::of_task(task, args, sequence),
            None => Self::of_rows(args, sequence, seed),
        }
    }

    fn of_task(task: Task, args: &DataArgs, sequence: &SequenceArgs) -> Result<Self> {
        refuse_keys_of_rows(task, args)?;
        refuse_key_of_rows(task, "completion_template", sequence.completion_template.is_some())?;
        let (train, test) = (&args.dataset_train_split, &args.dataset_test_split);
        let options = both_splits(task, args)?;
        let Some(grader) = task.grader() else {
            return Ok(SftData {
                train: numbered(task.examples(train, options.max_train, &options)?),
                test: numbered(task.examples(test, options.max_test, &options)?),
                problems: None,
            });
        };
        let trained = task.problems(train, options.max_train, &options)?;
        let problems = task.problems(test, options.max_test, &options)?;
        check(grader, trained.iter().chain(&problems))?;
        let examples = |problems: &[Problem]| -> Vec<Numbered<Example>> {
            numbered(problems.iter().map(Problem::example).collect())
        };
        let (train, test) = (examples(&trained), examples(&problems));
        Ok(SftData { train, test, problems: Some((problems, grader)) })
    }

    fn of_rows(args: &DataArgs, sequence: &SequenceArgs, seed: u64) -> Result<Self> {
        let OwnRows { path, train, test } = own_rows(args, seed)?;
        let template = Template {
            prompt_template: args.prompt_template.clone(),
            completion_template: sequence.completion_template.clone(),
            system_prompt: args.system_prompt.clone(),
            columns: args.columns.0.clone(),
        };
        let example = |(number, row): &Numbered<Row>| -> Result<Numbered<Example>> {
            let named = |error| Error::usage(format!("{}: row {number}: {error}", path.display()));
            Ok((*number, template.apply(row).map_err(named)?))
        };
        let examples = |rows: &[Numbered<Row>]| rows.iter().map(example).collect::<Result<_>>();
        Ok(SftData { train: examples(&train)?, test: examples(&test)?, problems: None })
    }

    /// Token ids with loss masks, training rows first.
    ///
    /// # Errors
    /// If a row is longer than `max_length` or the model's context and is not to be cut, or has nothing to
    /// learn from.
    pub fn tokenise(
        &self,
        encoder: &Encoder,
        (args, sequence): (&DataArgs, &SequenceArgs),
        context: usize,
    ) -> Result<(Vec<TokenExample>, Vec<TokenExample>)> {
        let _phase = debug_span!("tokenize").entered();
        let limit =
            Limit { max_length: sequence.max_length, context, mode: sequence.truncation_mode };
        let tokens = |examples: &[Numbered<Example>], what: &str| -> Result<Vec<TokenExample>> {
            let encode = |(number, example): &Numbered<Example>| {
                let named = |error: Error| match error {
                    Error::Usage(said) => Error::Usage(format!("{what}: row {number}: {said}")),
                    other => other,
                };
                let tokens = token_example(encoder, example, sequence).map_err(named)?;
                let long = tokens.input_ids.len() > limit.tokens();
                let tokens = TokenExample { row: *number, ..tokens };
                Ok((long, limit.fit(tokens, &format!("{what}: row {number}"))?))
            };
            let encoded: Vec<Result<_>> = examples.par_iter().map(encode).collect();
            let encoded = encoded.into_iter().collect::<Result<Vec<_>>>()?;
            tell_cut(&encoded, &limit, what)?;
            Ok(encoded.into_iter().filter_map(|(_, example)| example).collect())
        };
        let name = args.dataset()?;
        let train = tokens(&self.train, &format!("{name} {}", args.dataset_train_split))?;
        Ok((train, tokens(&self.test, &format!("{name} {}", args.dataset_test_split))?))
    }

    /// The held-out problems and how their answers are graded.
    ///
    /// # Errors
    /// If the data has no gold answers.
    pub fn graded(&self) -> Result<(&[Problem], Grader)> {
        let graded = self.problems.as_ref().map(|(problems, grader)| (&problems[..], *grader));
        graded.ok_or_else(|| {
            let names = Task::names().into_iter();
            let graded =
                names.filter(|name| Task::find(name).is_some_and(|t| t.grader().is_some()));
            let tasks = graded.collect::<Vec<_>>().join(", ");
            Error::usage(format!("accuracy wants a data set with gold answers ({tasks})"))
        })
    }
}

/// Says how many rows were too long, and how many of those had nothing left to learn from.
///
/// # Errors
/// If that are all rows.
fn tell_cut(rows: &[(bool, Option<TokenExample>)], limit: &Limit, what: &str) -> Result<()> {
    let long = rows.iter().filter(|(long, _)| *long).count();
    let lost = rows.iter().filter(|(_, example)| example.is_none()).count();
    let (all, most) = (rows.len(), limit.tokens());
    if lost > 0 && lost == all {
        return Err(Error::failure(format!(
            "{what}: no row has a token that counts in the loss among its first {most}: raise max_length"
        )));
    }
    let out = match lost {
        0 => String::new(),
        n => format!("; {n} of those had no token left that counts in the loss, and are left out"),
    };
    if long > 0 {
        notice::warn(&format!("{what}: {long} of {all} rows were cut to {most} tokens{out}"));
    }
    Ok(())
}

/// Rows of a user's own data.
pub(super) struct OwnRows {
    /// The file or folder.
    pub(super) path: PathBuf,
    /// The rows to train on.
    pub(super) train: Vec<Numbered<Row>>,
    /// The rows to evaluate on.
    pub(super) test: Vec<Numbered<Row>>,
}

/// Reads the rows of a file, a folder or a hub id.
pub(super) fn own_rows(args: &DataArgs, seed: u64) -> Result<OwnRows> {
    let path = locate(args.dataset()?)?;
    let (mut train, mut test) = if path.is_file() {
        let rows = numbered(read_rows(&path)?);
        if rows.is_empty() {
            return Err(Error::usage(format!("{}: the file holds no row", path.display())));
        }
        let held_out = args.max_eval_samples.min(rows.len() / 2);
        split_off(rows, held_out, seed)?
    } else {
        let train = read_split(&path, &args.dataset_train_split)?;
        (numbered(train), numbered(test_split(&path, args)?))
    };
    limit(&mut train, args.max_train_samples);
    limit(&mut test, args.max_eval_samples);
    Ok(OwnRows { path, train, test })
}

/// The problems of a task's split, whose gold answers have been checked.
///
/// # Errors
/// As [`SftData::load`]; also if the data set is no task.
pub fn problems(args: &DataArgs) -> Result<(Vec<Problem>, Grader)> {
    let task = Task::by_name(args.dataset()?)?;
    let split = &args.dataset_test_split;
    let options = task_options(task, args, &[split])?;
    let problems = task.problems(split, options.max_test, &options)?;
    let tasks = || format!("accuracy wants a task with gold answers; {} has none", task.name());
    let grader = task.grader().ok_or_else(|| Error::usage(tasks()))?;
    check(grader, problems.iter())?;
    Ok((problems, grader))
}

/// A row as tokens.
///
/// # Errors
/// If its template or tokeniser refuses it.
pub fn token_example(
    encoder: &Encoder,
    example: &Example,
    args: &SequenceArgs,
) -> Result<TokenExample> {
    let whole = !args.completion_only_loss;
    if args.assistant_only_loss && !matches!(example, Example::Messages(_)) {
        return Err(Error::usage(
            "assistant_only_loss is for rows with a column of messages, and this row has none: use \
             completion_only_loss",
        ));
    }
    match example {
        Example::Text(text) => encoder.text(text),
        Example::Messages(messages) => encoder.messages(messages, args.assistant_only_loss),
        Example::PromptCompletion { prompt, completion } => {
            encoder.plain(prompt, completion, whole)
        }
        Example::Chat { prompt, completion } => encoder.chat(prompt, completion, whole),
    }
}

/// Refuses keys that say how rows of any columns become prompts.
pub(super) fn refuse_keys_of_rows(task: Task, args: &DataArgs) -> Result<()> {
    refuse_key_of_rows(task, "prompt_template", args.prompt_template.is_some())?;
    refuse_key_of_rows(task, "system_prompt", args.system_prompt.is_some())?;
    refuse_key_of_rows(task, "columns", !args.columns.0.is_empty())
}

fn refuse_key_of_rows(task: Task, key: &str, given: bool) -> Result<()> {
    match given {
        false => Ok(()),
        true => {
            let name = task.name();
            let what = format!("{key} is for your own rows: {name} brings its own prompts");
            Err(Error::usage(what))
        }
    }
}

/// What is loaded of a task that is trained on one split and evaluated on another.
pub(super) fn both_splits(task: Task, args: &DataArgs) -> Result<TaskOptions> {
    let (train, test) = (&args.dataset_train_split, &args.dataset_test_split);
    if train == test {
        return Err(Error::usage(format!("split '{train}' is both trained and evaluated on")));
    }
    task_options(task, args, &[train, test])
}

/// What is loaded of a task, of which `splits` are used.
fn task_options(task: Task, args: &DataArgs, splits: &[&str]) -> Result<TaskOptions> {
    Ok(TaskOptions {
        path: fetch(task, splits)?,
        train_split: args.dataset_train_split.clone(),
        test_split: args.dataset_test_split.clone(),
        max_train: args.max_train_samples,
        max_test: args.max_eval_samples,
        listops: datasets::listops::Limits {
            max_depth: args.listops_max_depth,
            min_args: args.listops_min_args,
            max_args: args.listops_max_args,
            max_tokens: None,
        },
        ..TaskOptions::default()
    })
}

/// A task's copy on the hub: its id and the folder of its configuration.
fn on_hub(task: Task) -> Option<(&'static str, &'static str)> {
    match task {
        Task::Gsm8k => Some(("openai/gsm8k", "main")),
        Task::Aqua => Some(("deepmind/aqua_rat", "raw")),
        _ => None,
    }
}

/// The folder and the file that hold a split of a task that is on the hub.
fn file_of(task: Task, split: &str) -> datasets::Result<(&'static str, String)> {
    match task {
        Task::Aqua => aqua::file_of(split).map(|(folder, file)| (folder, file.to_string())),
        _ => gsm8k::file_of(split).map(|file| (gsm8k::FOLDER, file)),
    }
}

/// The folder of the hub's copy of a task, unless the files of all `splits` are on this machine; a
/// line on stderr says that it is used.
fn fetch(task: Task, splits: &[&str]) -> Result<Option<PathBuf>> {
    let Some((id, configuration)) = on_hub(task) else { return Ok(None) };
    let files = splits.iter().map(|split| file_of(task, split));
    let files = files.collect::<datasets::Result<Vec<_>>>()?;
    let missing = files.iter().find(|(folder, file)| locate::find(folder, file).is_err());
    let Some((wanted, missing)) = missing else { return Ok(None) };
    let fetched = hub::fetch_dataset(id).map_err(|error| {
        let besides = format!(", and {id} could not be fetched: {error}");
        Error::failure(locate::missing(wanted, missing, &besides).to_string())
    })?;
    let folder = fetched.join(configuration);
    let place = folder.display();
    eprintln!("{wanted}/{missing} was not found: {id} of the hub is used, in {place}");
    Ok(Some(folder))
}

/// Demands that every problem's own answer grades right.
pub(super) fn check<'a>(grader: Grader, problems: impl Iterator<Item = &'a Problem>) -> Result<()> {
    let rows = problems.map(|problem| (problem.id, &*problem.target, &*problem.gold));
    check_gold(grader, rows).map_err(|error| Error::failure(error.to_string()))
}

/// The file or folder that a name stands for.
fn locate(name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if let Some(near) = Task::nearest(name) {
        return Err(Error::usage(format!("no data set '{name}'; did you mean {near}?")));
    }
    let parts: Vec<&str> = name.split('/').collect();
    let id = parts.len() == 2 && parts.iter().all(|part| !part.is_empty() && *part != "..");
    let file = path
        .extension()
        .is_some_and(|end| ["json", "jsonl", "parquet"].map(Some).contains(&end.to_str()));
    if id && !file {
        return hub::fetch_dataset(name);
    }
    if file {
        return Err(Error::usage(format!("dataset_name: {name}: no such file")));
    }
    let tasks = Task::names().join(", ");
    Err(Error::usage(format!(
        "no data set '{name}': give a task ({tasks}), a JSONL, JSON or parquet file, a folder, or \
         a hub id owner/name"
    )))
}

/// The held-out split of a folder; none if the default name is not there.
fn test_split(path: &Path, args: &DataArgs) -> Result<Vec<Row>> {
    let split = &args.dataset_test_split;
    if *split == DataArgs::default().dataset_test_split && !has_split(path, split)? {
        return Ok(Vec::new());
    }
    Ok(read_split(path, split)?)
}

fn numbered<T>(rows: Vec<T>) -> Vec<Numbered<T>> {
    (1..).zip(rows).collect()
}

fn limit<T>(rows: &mut Vec<T>, most: usize) {
    if most > 0 {
        rows.truncate(most);
    }
}
