//! The rewards that come with the crate, by TRL's and Open-R1's names.

use std::fmt;
use std::str::FromStr;

use datasets::{Grader, Row};
use regex::Regex;
use serde_json::Value;

use crate::format::{is_think_format, tag_share};
use crate::grade::grade;
use crate::length::{CosineLength, soft_overlong};
use crate::outcome::Outcome;
use crate::parse::ParseOptions;
use crate::repetition::repetition;
use crate::reward::{Reward, Sample, Score};
use crate::spec::{Spec, nearest};

/// Columns in which the gold answer is looked for, in this order.
const GOLD: [&str; 3] = ["answer", "solution", "gold"];

/// The names of all built-in rewards.
pub(crate) const NAMES: [&str; 8] = [
    "accuracy_reward",
    "exact_match_reward",
    "regex_reward",
    "think_format_reward",
    "tag_format_reward",
    "soft_overlong_punishment",
    "repetition_penalty_reward",
    "cosine_length_reward",
];

/// A function of one completion.
type OfSample = Box<dyn Fn(&Sample) -> Score>;

/// A reward that is a function of one completion.
struct PerSample {
    name: String,
    score: OfSample,
}

impl Reward for PerSample {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
        samples.iter().map(|sample| (self.score)(sample)).collect()
    }
}

/// The built-in reward that a spec names.
pub(crate) fn build(text: &str, options: &ParseOptions) -> Result<Box<dyn Reward>, String> {
    let mut spec = Spec::parse(text)?;
    let name = spec.name.clone();
    let (score, known): (OfSample, &[&str]) = match name.as_str() {
        "accuracy_reward" => {
            (accuracy(&mut spec, options)?, &["grader", "column", "right", "wrong"])
        }
        "exact_match_reward" => (exact_match(&mut spec)?, &["column"]),
        "regex_reward" => (matches(&mut spec)?, &["pattern"]),
        "think_format_reward" => {
            (Box::new(|sample| Score::Value(f64::from(is_think_format(sample.completion)))), &[])
        }
        "tag_format_reward" => (tag_format(&mut spec)?, &["tags"]),
        "soft_overlong_punishment" => (overlong(&mut spec, options)?, &["max_length", "cache"]),
        "repetition_penalty_reward" => (repeats(&mut spec)?, &["ngram", "max_penalty"]),
        "cosine_length_reward" => (
            cosine(&mut spec, options)?,
            &[
                "grader",
                "column",
                "right_short",
                "right_long",
                "wrong_short",
                "wrong_long",
                "max_length",
            ],
        ),
        other => return Err(unknown(other)),
    };
    spec.finish(known)?;
    Ok(Box::new(PerSample { name, score }))
}

fn unknown(name: &str) -> String {
    let near = match name.contains(":") || name.contains("/") {
        true => Some("; the address of a server begins with http:// or https://".to_string()),
        false => nearest(name, NAMES.into_iter()).map(|near| format!("; did you mean {near}?")),
    };
    format!(
        "no reward is called {name}{}; there are {}, Python files (./my_reward.py), commands \
         (process:./my_reward) and servers (http://localhost:8000/my_reward)",
        near.unwrap_or_default(),
        NAMES.join(", ")
    )
}

/// A grader as a word.
struct GraderName(Grader);

impl FromStr for GraderName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(GraderName(match text {
            "numeric" => Grader::Numeric,
            "digit" => Grader::Digit,
            "letter" => Grader::Letter,
            "exact" => Grader::Exact,
            _ => return Err("the graders are numeric, digit, letter and exact".to_string()),
        }))
    }
}

impl fmt::Display for GraderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{:?}", self.0).to_lowercase())
    }
}

/// How completions are graded: against a row's column.
struct Grading {
    grader: Grader,
    column: Option<String>,
}

impl Grading {
    fn take(spec: &mut Spec, options: &ParseOptions) -> Result<Self, String> {
        let default = options.default_grader.unwrap_or(Grader::Numeric);
        let GraderName(grader) = spec.take("grader", GraderName(default))?;
        Ok(Grading { grader, column: spec.take_option("column")? })
    }

    fn outcome(&self, sample: &Sample) -> Result<Outcome, String> {
        let gold = gold(sample.columns, self.column.as_deref())?;
        Ok(grade(self.grader, sample.completion, &gold))
    }
}

/// The gold answer of a row, as text.
fn gold(columns: &Row, column: Option<&str>) -> Result<String, String> {
    let wanted: Vec<&str> = column.map_or(GOLD.to_vec(), |column| vec![column]);
    let found = wanted.iter().find_map(|name| columns.get(*name).filter(|v| !v.is_null()));
    match found {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(Value::Bool(value)) => Ok(value.to_string()),
        Some(_) => Err(format!("the row's column {} is no text or number", wanted.join(" or "))),
        None => {
            let has: Vec<&str> = columns.keys().map(String::as_str).collect();
            let has = if has.is_empty() { "none".to_string() } else { has.join(", ") };
            let wanted = wanted.join(", ");
            Err(format!("the row has no gold answer in a column {wanted}; its columns: {has}"))
        }
    }
}

fn accuracy(spec: &mut Spec, options: &ParseOptions) -> Result<OfSample, String> {
    let grading = Grading::take(spec, options)?;
    let (right, wrong) = (spec.take("right", 1.0)?, spec.take("wrong", 0.0)?);
    Ok(Box::new(move |sample| match grading.outcome(sample) {
        Ok(Outcome::Right) => Score::Graded(right, Outcome::Right),
        Ok(outcome) => Score::Graded(wrong, outcome),
        Err(reason) => Score::Error(reason),
    }))
}

fn exact_match(spec: &mut Spec) -> Result<OfSample, String> {
    let column: Option<String> = spec.take_option("column")?;
    Ok(Box::new(move |sample| match gold(sample.columns, column.as_deref()) {
        Ok(gold) if sample.completion.trim() == gold.trim() => Score::Graded(1.0, Outcome::Right),
        Ok(_) => Score::Graded(0.0, Outcome::Wrong),
        Err(reason) => Score::Error(reason),
    }))
}

fn matches(spec: &mut Spec) -> Result<OfSample, String> {
    let pattern: Option<String> = spec.take_option("pattern")?;
    let pattern =
        pattern.ok_or("regex_reward wants a pattern, as in regex_reward(pattern=\"…\")")?;
    let regex = Regex::new(&pattern).map_err(|error| {
        let text = error.to_string();
        let last = text.lines().last().unwrap_or_default().trim();
        format!("regex_reward: {pattern} is no regular expression: {last}")
    })?;
    Ok(Box::new(move |sample| Score::Value(f64::from(regex.is_match(sample.completion)))))
}

fn tag_format(spec: &mut Spec) -> Result<OfSample, String> {
    let tags = spec.take("tags", "think|answer".to_string())?;
    Ok(Box::new(move |sample| {
        let tags: Vec<&str> = tags.split('|').map(str::trim).collect();
        Score::Value(tag_share(sample.completion, &tags))
    }))
}

fn overlong(spec: &mut Spec, options: &ParseOptions) -> Result<OfSample, String> {
    let longest = spec.take("max_length", options.max_completion_length)?;
    let cache = spec.take("cache", longest / 5)?;
    Ok(Box::new(move |sample| {
        Score::Value(soft_overlong(sample.completion_ids.len(), longest, cache))
    }))
}

fn repeats(spec: &mut Spec) -> Result<OfSample, String> {
    let (n, most) = (spec.take("ngram", 3)?, spec.take("max_penalty", -1.0)?);
    if most > 0.0 {
        return Err(format!(
            "repetition_penalty_reward: max_penalty must not be above 0, not {most}"
        ));
    }
    Ok(Box::new(move |sample| Score::Value(repetition(sample.completion, n, most))))
}

fn cosine(spec: &mut Spec, options: &ParseOptions) -> Result<OfSample, String> {
    let (grading, default) = (Grading::take(spec, options)?, CosineLength::default());
    let curve = CosineLength {
        right_short: spec.take("right_short", default.right_short)?,
        right_long: spec.take("right_long", default.right_long)?,
        wrong_short: spec.take("wrong_short", default.wrong_short)?,
        wrong_long: spec.take("wrong_long", default.wrong_long)?,
        max_length: spec.take("max_length", options.max_completion_length)?,
    };
    Ok(Box::new(move |sample| match grading.outcome(sample) {
        Ok(outcome) => {
            let right = outcome == Outcome::Right;
            Score::Graded(curve.reward(right, sample.completion_ids.len()), outcome)
        }
        Err(reason) => Score::Error(reason),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use datasets::Prompt;
    use serde_json::json;

    fn scored(spec: &str, completion: &str, columns: Value) -> Score {
        let options = ParseOptions { max_completion_length: 10, ..ParseOptions::default() };
        let mut reward = build(spec, &options).unwrap();
        let (prompt, Value::Object(columns)) = (Prompt::Text(String::new()), columns) else {
            panic!("columns are an object")
        };
        let ids: Vec<u32> = (0..completion.split_whitespace().count() as u32).collect();
        let sample =
            Sample { prompt: &prompt, completion, completion_ids: &ids, columns: &columns };
        reward.score(&[sample]).remove(0)
    }

    fn refused(spec: &str) -> String {
        build(spec, &ParseOptions::default()).err().unwrap()
    }

    #[test]
    fn accuracy_finds_the_gold_answer_in_the_usual_columns() {
        for columns in [
            json!({"answer": "7"}),
            json!({"solution": "#### 7"}),
            json!({"gold": 7}),
            json!({"answer": null, "gold": 7.0}),
        ] {
            assert_eq!(
                scored("accuracy_reward", "so 7.", columns),
                Score::Graded(1.0, Outcome::Right)
            );
        }
        let columns = json!({"answer": "8", "mine": "B"});
        let spec = "accuracy_reward(column=mine, grader=letter, right=2, wrong=-1)";
        assert_eq!(scored(spec, "(B)", columns.clone()), Score::Graded(2.0, Outcome::Right));
        assert_eq!(scored(spec, "(C)", columns), Score::Graded(-1.0, Outcome::Wrong));
        let Score::Error(reason) = scored("accuracy_reward", "7", json!({"target": "7"})) else {
            panic!("a row without gold answer was graded")
        };
        assert!(reason.ends_with("its columns: target"), "{reason}");
    }

    #[test]
    fn every_name_builds_and_scores() {
        let gold = json!({"answer": "7"});
        for (spec, completion, want) in [
            ("think_format_reward", "<think>a</think> 7", Score::Value(1.0)),
            ("tag_format_reward(tags=answer)", "<answer>7", Score::Value(0.5)),
            ("soft_overlong_punishment(cache=4)", "a a a a a a a a", Score::Value(-0.5)),
            ("repetition_penalty_reward(ngram=1)", "a a", Score::Value(-0.5)),
            ("regex_reward(pattern=\"^\\d+$\")", "12", Score::Value(1.0)),
            ("regex_reward(pattern=\"^\\d+$\")", "12a", Score::Value(0.0)),
            ("exact_match_reward", " 7\n", Score::Graded(1.0, Outcome::Right)),
            ("exact_match_reward", "07", Score::Graded(0.0, Outcome::Wrong)),
            ("cosine_length_reward", "", Score::Graded(-1.0, Outcome::Unparsable)),
            ("cosine_length_reward(max_length=1)", "7", Score::Graded(0.5, Outcome::Right)),
        ] {
            assert_eq!(scored(spec, completion, gold.clone()), want, "{spec}");
        }
    }

    #[test]
    fn mistakes_get_a_suggestion() {
        assert!(refused("acuracy_reward").contains("did you mean accuracy_reward?"));
        assert!(refused("accuracy").contains("did you mean accuracy_reward?"));
        assert!(refused("regex_reward").contains("wants a pattern"));
        assert!(refused("regex_reward(pattern=\"(\")").contains("unclosed group"));
        assert!(refused("accuracy_reward(grader=maths)").contains("the graders are numeric"));
        assert!(refused("think_format_reward(x=1)").contains("has no options"));
        assert!(
            refused("repetition_penalty_reward(max_penalty=1)").contains("must not be above 0")
        );
    }
}
