//! The tasks, by name.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::{
    Error, Example, Message, PromptRow, Result, aqua, arithmetic, gsm8k, instruct, listops,
};

/// How an answer is compared with the gold one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grader {
    /// The final number, wherever and however it is written.
    Numeric,
    /// One digit and nothing else.
    Digit,
    /// The same text, but for white space around it.
    Exact,
    /// The letter of a multiple choice.
    Letter,
}

/// A question with its worked answer and what is right.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Number of the row in its split, from 0.
    pub id: u64,
    /// The conversation up to the answer.
    pub prompt: Vec<Message>,
    /// The answer that is trained on.
    pub target: String,
    /// What a right answer comes to.
    pub gold: String,
}

impl Problem {
    /// The problem as something to train on: an [`Example::Chat`].
    pub fn example(&self) -> Example {
        let prompt = self.prompt.iter().map(Message::to_json).collect();
        Example::Chat { prompt, completion: self.target.clone() }
    }
}

/// Which part of a task is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskOptions {
    /// The folder (instruct: or file) of the data; none = where [`crate::locate::find`] looks.
    /// Generated splits have none.
    pub path: Option<PathBuf>,
    /// The split that is trained on.
    pub train_split: String,
    /// The split that is evaluated on.
    pub test_split: String,
    /// Most rows of the training split, from its start; 0 = all.
    pub max_train: usize,
    /// Most rows of the test split, from its start; 0 = all.
    pub max_test: usize,
    /// Key of generated problems. Runs are comparable on the same test problems only, so a run's
    /// own seed should not change it.
    pub seed: u64,
    /// How large generated ListOps expressions are.
    pub listops: listops::Limits,
}

impl Default for TaskOptions {
    fn default() -> Self {
        TaskOptions {
            path: None,
            train_split: "train".to_string(),
            test_split: "test".to_string(),
            max_train: 0,
            max_test: 0,
            seed: 1,
            listops: listops::Limits::default(),
        }
    }
}

impl TaskOptions {
    /// The expressions that a generated ListOps split does not hold because the published test set
    /// is evaluated on.
    fn left_out_of(&self, split: &str) -> Result<BTreeSet<String>> {
        match split == self.train_split && self.test_split == "official" {
            true => listops::official_expressions(self.path.as_deref()),
            false => Ok(BTreeSet::new()),
        }
    }
}

/// The problems of a task whose answers can be graded.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskData {
    /// What is trained on.
    pub train: Vec<Problem>,
    /// What is evaluated on.
    pub test: Vec<Problem>,
    /// How answers are graded.
    pub grader: Grader,
    /// Tokens within which an answer is to end.
    pub max_completion_length: usize,
}

/// A named task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Grade-school maths word problems, see [`gsm8k`].
    Gsm8k,
    /// Algebra word problems with five options, see [`aqua`].
    Aqua,
    /// Addition and subtraction word problems, see [`arithmetic`].
    AddSub,
    /// Word problems of several steps, see [`arithmetic`].
    MultiArith,
    /// Word problems of one equation, see [`arithmetic`].
    SingleEq,
    /// AddSub and MultiArith together, the rows of the former first.
    Arithmetic,
    /// Nested operations on digits, see [`listops`].
    ListOps,
    /// Following instructions, see [`instruct`]; its answers cannot be graded.
    Instruct,
}

impl Task {
    const ALL: [Task; 8] = [
        Task::Gsm8k,
        Task::Aqua,
        Task::AddSub,
        Task::MultiArith,
        Task::SingleEq,
        Task::Arithmetic,
        Task::ListOps,
        Task::Instruct,
    ];

    /// The task of this name, or nothing: a data set's name may also be a path or a hub id.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// The task of this name.
    ///
    /// # Errors
    /// If there is none: names all tasks, and the one that may have been meant.
    pub fn by_name(name: &str) -> Result<Self> {
        Self::find(name).ok_or_else(|| {
            let near = Self::nearest(name).map(|near| format!("; did you mean {near}?"));
            let (near, all) = (near.unwrap_or_default(), Self::names().join(", "));
            Error::usage(format!("no task is called {name}{near}; the tasks are {all}"))
        })
    }

    /// The name nearest to a misspelt one, if any is within two edits.
    pub fn nearest(name: &str) -> Option<&'static str> {
        let name = name.to_lowercase();
        Self::names()
            .into_iter()
            .map(|known| (strsim::damerau_levenshtein(&name, known), known))
            .filter(|(distance, _)| *distance <= 2)
            .min_by_key(|(distance, _)| *distance)
            .map(|(_, known)| known)
    }

    /// The names of all tasks.
    pub fn names() -> Vec<&'static str> {
        Self::ALL.into_iter().map(Task::name).collect()
    }

    /// The task's name.
    pub fn name(self) -> &'static str {
        match self {
            Task::Gsm8k => "gsm8k",
            Task::Aqua => "aqua",
            Task::AddSub => "addsub",
            Task::MultiArith => "multiarith",
            Task::SingleEq => "singleeq",
            Task::Arithmetic => "arithmetic",
            Task::ListOps => "listops",
            Task::Instruct => "instruct",
        }
    }

    /// The names of the task's splits.
    pub fn splits(self) -> &'static [&'static str] {
        match self {
            Task::ListOps => &["train", "validation", "test", "official"],
            _ => &["train", "validation", "test"],
        }
    }

    /// How answers are graded; none if they cannot be.
    pub fn grader(self) -> Option<Grader> {
        match self {
            Task::Aqua => Some(Grader::Letter),
            Task::ListOps => Some(Grader::Digit),
            Task::Instruct => None,
            _ => Some(Grader::Numeric),
        }
    }

    /// Tokens within which an answer is to end.
    pub fn max_completion_length(self) -> usize {
        match self {
            Task::Gsm8k => 320,
            Task::AddSub | Task::MultiArith | Task::SingleEq | Task::Arithmetic => 128,
            Task::ListOps => 8,
            Task::Aqua | Task::Instruct => 256,
        }
    }

    /// At most `max` problems (0 = all) of a split; path, seed and limits are those of `options`.
    /// Generated problems of the training split are none of those in the test split.
    ///
    /// Only a generated training split avoids `official`. Where `official` itself is trained on and
    /// a generated split evaluated on, nothing is left out of either, and they may share problems.
    ///
    /// # Errors
    /// If answers of the task cannot be graded, or as its loader.
    pub fn problems(self, split: &str, max: usize, options: &TaskOptions) -> Result<Vec<Problem>> {
        let path = options.path.as_deref();
        let mut problems = match self {
            Task::Gsm8k => gsm8k::load(path, split)?,
            Task::Aqua => aqua::load(path, split)?,
            Task::AddSub => arithmetic::load("AddSub", path, split)?,
            Task::MultiArith => arithmetic::load("MultiArith", path, split)?,
            Task::SingleEq => arithmetic::load("SingleEq", path, split)?,
            Task::Arithmetic => {
                let parts =
                    ["AddSub", "MultiArith"].map(|name| arithmetic::load(name, path, split));
                let [first, second] = parts;
                let both = first?.into_iter().chain(second?);
                (0..).zip(both).map(|(id, problem)| Problem { id, ..problem }).collect()
            }
            Task::ListOps if split == "official" => listops::official(path)?,
            Task::ListOps => {
                let left_out = options.left_out_of(split)?;
                listops::generate_without(left_out, split, max, options.seed, &options.listops)?
            }
            Task::Instruct => return Err(ungraded()),
        };
        problems.truncate(most(max));
        Ok(problems)
    }

    /// At most `max` rows (0 = all) of a split to sample completions for.
    ///
    /// # Errors
    /// As [`Task::problems`].
    pub fn prompt_rows(
        self,
        split: &str,
        max: usize,
        options: &TaskOptions,
    ) -> Result<Vec<PromptRow>> {
        Ok(self.problems(split, max, options)?.iter().map(Problem::prompt_row).collect())
    }

    /// At most `max` examples (0 = all) of a split to train on, or to take a loss on.
    ///
    /// # Errors
    /// As the task's loader.
    pub fn examples(self, split: &str, max: usize, options: &TaskOptions) -> Result<Vec<Example>> {
        if self != Task::Instruct {
            let problems = self.problems(split, max, options)?;
            return Ok(problems.iter().map(Problem::example).collect());
        }
        let mut examples = instruct::load(options.path.as_deref(), split)?;
        examples.truncate(most(max));
        Ok(examples)
    }

    /// Both splits of a task whose answers can be graded.
    ///
    /// # Errors
    /// As [`Task::problems`], and if both splits are the same.
    pub fn load(self, options: &TaskOptions) -> Result<TaskData> {
        let (train, test) = (&options.train_split, &options.test_split);
        if train == test {
            let message =
                format!("{}: split {train} is both trained and evaluated on", self.name());
            return Err(Error::usage(message));
        }
        Ok(TaskData {
            train: self.problems(train, options.max_train, options)?,
            test: self.problems(test, options.max_test, options)?,
            grader: self.grader().ok_or_else(ungraded)?,
            max_completion_length: self.max_completion_length(),
        })
    }
}

fn ungraded() -> Error {
    let graded = Task::ALL.into_iter().filter(|task| task.grader().is_some()).map(Task::name);
    let graded = graded.collect::<Vec<_>>().join(", ");
    Error::usage(format!("instruct has no gold answers to grade; the tasks with some are {graded}"))
}

fn most(max: usize) -> usize {
    if max == 0 { usize::MAX } else { max }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::shared;

    #[test]
    fn tasks_are_found_by_name_and_misspelt_ones_suggested() {
        for name in Task::names() {
            assert_eq!(Task::by_name(name).unwrap().name(), name);
        }
        let error = Task::by_name("listop").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(
            error.to_string(),
            "no task is called listop; did you mean listops?; the tasks are gsm8k, aqua, addsub, \
             multiarith, singleeq, arithmetic, listops, instruct"
        );
        assert!(!Task::by_name("weather").unwrap_err().to_string().contains("mean"));
    }

    #[test]
    fn limits_cut_the_splits_and_zero_means_all() {
        let options = TaskOptions { max_train: 7, max_test: 3, ..TaskOptions::default() };
        let data = Task::ListOps.load(&options).unwrap();
        assert_eq!((data.train.len(), data.test.len()), (7, 3));
        assert_eq!((data.grader, data.max_completion_length), (Grader::Digit, 8));
        assert_eq!(Task::ListOps.problems("test", 0, &options).unwrap().len(), 1000);
        let Some(path) = shared("gsm8k") else { return };
        let options = TaskOptions { path: Some(path), ..options };
        assert_eq!(Task::Gsm8k.load(&options).unwrap().train.len(), 7);
        assert_eq!(Task::Gsm8k.problems("validation", 0, &options).unwrap().len(), 473);
    }

    #[test]
    fn no_published_expression_is_trained_on_where_they_are_evaluated_on() {
        let Some(path) = shared("listops") else { return };
        let plain = TaskOptions { path: Some(path), ..TaskOptions::default() };
        let texts = |problems: Vec<Problem>| -> Vec<String> {
            problems.into_iter().map(|problem| problem.prompt[1].content.clone()).collect()
        };
        let usual = texts(Task::ListOps.load(&plain).unwrap().train);
        let options = TaskOptions { test_split: "official".to_string(), ..plain };
        let data = Task::ListOps.load(&options).unwrap();
        let official: BTreeSet<_> = texts(data.test).into_iter().collect();
        let train = texts(data.train);
        assert_eq!(train.len(), 10_000);
        assert!(train.iter().all(|text| !official.contains(text)));
        assert!(usual.iter().any(|text| official.contains(text)), "nothing had to be left out");
        let mut kept = usual.iter().zip(&train).filter(|(usual, _)| !official.contains(*usual));
        assert!(kept.all(|(usual, text)| usual == text));
        for example in Task::ListOps.examples("train", 0, &options).unwrap() {
            let Example::Chat { prompt, .. } = example else { panic!("{example:?}") };
            assert!(!official.contains(prompt[1]["content"].as_str().unwrap()));
        }
    }

    #[test]
    fn every_split_of_a_task_can_be_loaded() {
        let Some(data) = shared("gsm8k") else { return };
        for task in Task::ALL {
            let folder = match task {
                Task::Instruct => "instruction-data/instruction-data.json",
                Task::AddSub | Task::MultiArith | Task::SingleEq | Task::Arithmetic => {
                    "llm-adapters"
                }
                _ => task.name(),
            };
            let path = data.parent().map(|root| root.join(folder));
            let options = TaskOptions { path, ..TaskOptions::default() };
            for split in task.splits() {
                assert_eq!(task.examples(split, 5, &options).unwrap().len(), 5, "{task:?} {split}");
            }
        }
    }

    #[test]
    fn training_on_the_test_split_and_grading_instructions_are_refused() {
        let options = TaskOptions { train_split: "test".to_string(), ..TaskOptions::default() };
        let error = Task::ListOps.load(&options).unwrap_err().to_string();
        assert_eq!(error, "listops: split test is both trained and evaluated on");
        let error = Task::Instruct.problems("test", 0, &options).unwrap_err().to_string();
        assert!(error.contains("no gold answers"), "{error}");
    }

    #[test]
    fn a_problem_is_an_example_of_its_messages_and_target() {
        let problem = Problem {
            id: 0,
            prompt: vec![Message::user("a")],
            target: "b #### 1".into(),
            gold: "1".into(),
        };
        let wanted = Example::Chat {
            prompt: vec![serde_json::json!({"role": "user", "content": "a"})],
            completion: "b #### 1".into(),
        };
        assert_eq!(problem.example(), wanted);
    }
}
