//! ListOps (Nangia & Bowman 2018, "ListOps: A Diagnostic Dataset for Latent Tree Learning").
//!
//! `[MAX 2 9 [MIN 4 7 ] 0 ]` is 9. Operators are MAX, MIN, MED (the integer part of the mean of the
//! two middle arguments if their number is even) and SM (sum modulo 10); arguments are digits or
//! operations, and every value is a digit.
//!
//! The prompt is the bare expression as the user's message behind an empty system message: nothing
//! in it is the same for all problems, so that a step on a small machine holds many of them, and a
//! chat template that writes a default system message where there is none writes none. The target
//! is the digit.
//!
//! # Splits
//! `train`, `test` and `validation` are generated: problem `i` of a split is made by ChaCha8 keyed
//! with (seed, number of the split, i, attempt). Attempt 0 counts unless its expression is longer
//! than the limits allow or is held out by another split; then it is attempt 1, and so on. Train
//! holds no expression of test and validation, and validation none of test. As operators and digits
//! are drawn evenly, this makes short expressions rarer in train than in test.
//!
//! `official` is the published test file `test_d20s.tsv`. A generated split that is trained on
//! while `official` is evaluated on leaves out its expressions too ([`generate_without`]).

use std::collections::BTreeSet;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::listops_expression::Operator;
pub use crate::listops_expression::evaluate;
use crate::{Error, Message, Problem, Result, locate};

/// The splits that [`generate`] makes, with the number that stands for each in the key and the
/// number of problems that "all" means.
const SPLITS: [(&str, u64, usize); 3] =
    [("train", 0, 10_000), ("test", 1, 1_000), ("validation", 2, 500)];

/// Expressions tried for one problem before the limits are refused.
const ATTEMPTS: u64 = 1_000;

/// No expression is longer, whatever the limits are.
const MOST_TOKENS: usize = 10_000;

/// How large expressions are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Deepest nesting of operators; 1 is an operation on digits.
    pub max_depth: usize,
    /// Fewest arguments of an operator.
    pub min_args: usize,
    /// Most arguments of an operator.
    pub max_args: usize,
    /// Most operators, digits and closing brackets of an expression.
    pub max_tokens: Option<usize>,
}

impl Default for Limits {
    /// Short problems: depth up to 2 and 2 to 4 arguments.
    fn default() -> Self {
        Limits { max_depth: 2, min_args: 2, max_args: 4, max_tokens: None }
    }
}

impl Limits {
    fn check(&self) -> Result<()> {
        let smallest = self.min_args.saturating_add(2);
        let message = if self.max_depth == 0 {
            "listops_max_depth must be at least 1".to_string()
        } else if self.min_args == 0 || self.min_args > self.max_args {
            let (min, max) = (self.min_args, self.max_args);
            format!(
                "listops takes {min} to {max} arguments; give at least 1, and not more than most"
            )
        } else if smallest > self.most_tokens() {
            let most = self.most_tokens();
            format!("listops: no expression of {} arguments has {most} tokens", self.min_args)
        } else {
            return Ok(());
        };
        Err(Error::usage(message))
    }

    fn most_tokens(&self) -> usize {
        self.max_tokens.unwrap_or(MOST_TOKENS).min(MOST_TOKENS)
    }
}

/// The first `n` problems of a generated split; 0 = all: 10,000 of train, 1,000 of test, 500 of
/// validation. More than that can be had of train only.
///
/// # Errors
/// If the split is unknown, `n` too large, or the limits make no expression or too few different
/// ones.
pub fn generate(split: &str, n: usize, seed: u64, limits: &Limits) -> Result<Vec<Problem>> {
    generate_without(BTreeSet::new(), split, n, seed, limits)
}

/// As [`generate`], with other expressions in place of those that are `left_out`.
///
/// # Errors
/// As [`generate`].
pub fn generate_without(
    left_out: BTreeSet<String>,
    split: &str,
    n: usize,
    seed: u64,
    limits: &Limits,
) -> Result<Vec<Problem>> {
    limits.check()?;
    let Some((_, number, all)) = SPLITS.into_iter().find(|(name, ..)| *name == split) else {
        return Err(Error::usage(format!(
            "listops has no split {split}; it has train, test, validation and official"
        )));
    };
    if n > all && split != "train" {
        return Err(Error::usage(format!(
            "listops: {split} has {all} problems, {n} were asked for"
        )));
    }
    let generator = Generator { seed, limits };
    let mut held_out = match split {
        "train" => generator.held_out()?,
        "validation" => generator.texts("test", &BTreeSet::new())?,
        _ => BTreeSet::new(),
    };
    held_out.extend(left_out);
    let n = if n == 0 { all } else { n };
    (0..n as u64).map(|id| generator.problem(number, id, &held_out)).collect()
}

/// The published test set: 10,000 problems of depth up to 19.
///
/// `path` is the file `test_d20s.tsv` or a folder that holds it; without one it is looked for as
/// `listops/test_d20s.tsv` by [`locate::find`]. A line is the value, a tab and the expression,
/// whose binary-tree parentheses are dropped (the tab is shown as a blank):
///
/// ```text
/// 0 ( ( ( ( ( [SM 6 ) 5 ) 9 ) 0 ) ] )
/// ```
///
/// # Errors
/// If the file is missing, or a line's expression does not have the line's value.
pub fn official(path: Option<&Path>) -> Result<Vec<Problem>> {
    const FILE: &str = "test_d20s.tsv";
    let path = match path {
        Some(folder) if folder.is_dir() => folder.join(FILE),
        Some(file) => file.to_path_buf(),
        None => locate::find("listops", FILE)?,
    };
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let read = |(i, line): (usize, &str)| {
        published(line)
            .map(|(expression, value)| problem(i as u64, expression, value))
            .map_err(|message| Error::line(&path, i + 1, message))
    };
    text.lines().enumerate().map(read).collect()
}

/// The expressions of [`official`]; `path` as there.
///
/// # Errors
/// As [`official`].
pub fn official_expressions(path: Option<&Path>) -> Result<BTreeSet<String>> {
    let expression = |problem: Problem| problem.prompt.into_iter().last().map(|user| user.content);
    Ok(official(path)?.into_iter().filter_map(expression).collect())
}

/// Expression and value of a published line.
fn published(line: &str) -> std::result::Result<(String, u8), String> {
    let Some((label, tree)) = line.split_once('\t') else {
        return Err("wanted the value, a tab and the expression".to_string());
    };
    let tokens: Vec<_> =
        tree.split_whitespace().filter(|token| !["(", ")"].contains(token)).collect();
    let expression = tokens.join(" ");
    let value = evaluate(&expression)?;
    if label != value.to_string() {
        return Err(format!("the expression has the value {value}, not {label}"));
    }
    Ok((expression, value))
}

fn problem(id: u64, expression: String, value: u8) -> Problem {
    let prompt = vec![Message::new("system", ""), Message::user(expression)];
    Problem { id, prompt, target: value.to_string(), gold: value.to_string() }
}

struct Generator<'a> {
    seed: u64,
    limits: &'a Limits,
}

impl Generator<'_> {
    /// Every expression of test and validation.
    fn held_out(&self) -> Result<BTreeSet<String>> {
        let mut held_out = self.texts("test", &BTreeSet::new())?;
        let validation = self.texts("validation", &held_out)?;
        held_out.extend(validation);
        Ok(held_out)
    }

    fn texts(&self, split: &str, held_out: &BTreeSet<String>) -> Result<BTreeSet<String>> {
        let sizes = SPLITS.into_iter().filter(|(name, ..)| *name == split);
        sizes
            .flat_map(|(_, number, n)| (0..n as u64).map(move |id| (number, id)))
            .map(|(number, id)| Ok(self.expression(number, id, held_out)?.0))
            .collect()
    }

    fn problem(&self, split: u64, id: u64, held_out: &BTreeSet<String>) -> Result<Problem> {
        let (text, value) = self.expression(split, id, held_out)?;
        Ok(problem(id, text, value))
    }

    /// The first attempt that is within the limits and not held out.
    fn expression(&self, split: u64, id: u64, held_out: &BTreeSet<String>) -> Result<(String, u8)> {
        (0..ATTEMPTS)
            .filter_map(|attempt| self.attempt([self.seed, split, id, attempt]))
            .find(|(text, _)| !held_out.contains(text))
            .ok_or_else(|| {
                Error::usage(
                    "listops: the limits allow too few different expressions for separate splits; \
                     raise listops_max_args or listops_max_depth, or the limit of tokens",
                )
            })
    }

    /// The expression of a key, unless it is too long.
    fn attempt(&self, key: [u64; 4]) -> Option<(String, u8)> {
        let mut bytes = [0; 32];
        for (part, word) in bytes.chunks_exact_mut(8).zip(key) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        let rng = ChaCha8Rng::from_seed(bytes);
        let (text, tokens) = (String::new(), self.limits.most_tokens());
        let mut writer = Writer { rng, limits: self.limits, text, tokens };
        let value = writer.operation(self.limits.max_depth)?;
        Some((writer.text, value))
    }
}

/// An expression while it is made.
struct Writer<'a> {
    rng: ChaCha8Rng,
    limits: &'a Limits,
    text: String,
    /// Tokens that may still be written.
    tokens: usize,
}

impl Writer<'_> {
    /// Writes an operation up to `depth` operators deep and returns its value; nothing if it would
    /// be too long. An argument is an operation with probability 1/4, where depth allows.
    fn operation(&mut self, depth: usize) -> Option<u8> {
        let n = self.limits.min_args + self.below(self.limits.max_args - self.limits.min_args + 1);
        let operator = Operator::ALL[self.below(Operator::ALL.len())];
        self.write(operator.token())?;
        let mut values = Vec::new();
        for _ in 0..n {
            self.text.push(' ');
            if depth > 1 && self.below(4) == 0 {
                values.push(self.operation(depth - 1)?);
            } else {
                let digit = self.below(10) as u8;
                self.write(&digit.to_string())?;
                values.push(digit);
            }
        }
        self.text.push(' ');
        self.write("]")?;
        operator.apply(values)
    }

    fn write(&mut self, token: &str) -> Option<()> {
        self.tokens = self.tokens.checked_sub(1)?;
        self.text.push_str(token);
        Some(())
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng.next_u32() as usize % n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{file, shared};

    fn expressions(split: &str, n: usize, limits: &Limits) -> Vec<String> {
        let problems = generate(split, n, 1, limits).unwrap();
        problems.into_iter().map(|problem| problem.prompt[1].content.clone()).collect()
    }

    #[test]
    fn gold_is_the_value_that_the_parser_finds() {
        let deep = Limits { max_depth: 8, min_args: 1, max_args: 6, max_tokens: Some(200) };
        for limits in [Limits::default(), deep] {
            for problem in generate("train", 500, 3, &limits).unwrap() {
                let value = evaluate(&problem.prompt[1].content).unwrap().to_string();
                assert_eq!((&problem.gold, &problem.target), (&value, &value));
            }
        }
    }

    #[test]
    fn the_stream_of_test_problems_is_pinned() {
        let text = expressions("test", 3, &Limits::default());
        assert_eq!(text, PINNED);
    }

    #[test]
    fn splits_share_no_expression() {
        let limits = Limits::default();
        let all = |split| expressions(split, 0, &limits).into_iter().collect::<BTreeSet<_>>();
        let (train, test, validation) = (all("train"), all("test"), all("validation"));
        assert!(train.is_disjoint(&test) && train.is_disjoint(&validation));
        assert!(validation.is_disjoint(&test));
    }

    #[test]
    fn a_prefix_of_a_split_does_not_depend_on_how_much_is_asked_for() {
        let limits = Limits::default();
        assert_eq!(expressions("train", 0, &limits)[..20], expressions("train", 20, &limits));
        assert_ne!(
            generate("test", 5, 1, &limits).unwrap(),
            generate("test", 5, 2, &limits).unwrap()
        );
    }

    #[test]
    fn expressions_keep_to_the_limits() {
        let limits = Limits { max_depth: 3, min_args: 3, max_args: 5, max_tokens: Some(12) };
        let mut longest = 0;
        for text in expressions("train", 400, &limits) {
            let tokens = text.split(' ').count();
            longest = longest.max(tokens);
            assert!((5..=12).contains(&tokens), "{text}");
        }
        assert_eq!(longest, 12);
        let flat = Limits { max_depth: 1, ..Limits::default() };
        assert!(expressions("train", 50, &flat).iter().all(|text| text.matches('[').count() == 1));
    }

    #[test]
    fn limits_that_cannot_be_met_are_refused() {
        let base = Limits::default();
        for (limits, wanted) in [
            (Limits { max_depth: 0, ..base.clone() }, "listops_max_depth"),
            (Limits { min_args: 5, ..base.clone() }, "5 to 4 arguments"),
            (Limits { max_tokens: Some(3), ..base.clone() }, "has 3 tokens"),
            (
                Limits { max_depth: 1, min_args: 1, max_args: 1, ..base.clone() },
                "too few different",
            ),
            (Limits { max_depth: 400, min_args: 50, max_args: 90, ..base.clone() }, ""),
        ] {
            match generate("train", 1, 1, &limits) {
                Err(error) => assert!(error.to_string().contains(wanted), "{error}"),
                Ok(_) => assert_eq!(wanted, ""),
            }
        }
        let error = generate("dev", 1, 1, &base).unwrap_err().to_string();
        assert!(error.contains("no split dev; it has train, test"), "{error}");
        assert!(generate("test", 1001, 1, &base).is_err());
        assert_eq!(generate("train", 10_001, 1, &base).unwrap().len(), 10_001);
    }

    #[test]
    fn all_published_expressions_have_their_value() {
        let Some(path) = shared("listops/test_d20s.tsv") else { return };
        let problems = official(Some(&path)).unwrap();
        assert_eq!(problems.len(), 10_000);
        assert_eq!(problems[0].prompt[1].content, "[SM 6 5 9 0 ]");
        assert_eq!(problems[0].gold, "0");
    }

    #[test]
    fn a_wrong_published_line_is_named() {
        for (line, wanted) in [
            ("3\t( [MAX 1 ) ]\n4\t[MAX 1 ]\n", "t.tsv:1: the expression has the value 1, not 3"),
            ("1\t[MAX 1 ]\n[MAX 1 ]", "t.tsv:2: wanted the value, a tab"),
            ("1\t[MAX 1", "t.tsv:1: the expression ends with 1 operators open"),
        ] {
            let (_folder, path) = file("t.tsv", line);
            let error = official(Some(&path)).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    const PINNED: [&str; 3] = [
        "[MED [MIN 0 9 0 7 ] [SM 2 1 7 ] [MAX 7 9 9 ] 6 ]",
        "[MAX 8 [MAX 5 6 ] [MED 9 8 5 ] [MIN 4 7 7 ] ]",
        "[MAX 5 9 ]",
    ];
}
