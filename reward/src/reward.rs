//! stub
use crate::Outcome;
use datasets::{Prompt, Row};
/// s
pub struct Sample<'a> {
    /// s
    pub prompt: &'a Prompt,
    /// s
    pub completion: &'a str,
    /// s
    pub completion_ids: &'a [u32],
    /// s
    pub columns: &'a Row,
}
/// s
#[derive(Clone, Debug, PartialEq)]
pub enum Score {
    /// s
    Value(f64),
    /// s
    Graded(f64, Outcome),
    /// s
    NotApplicable,
    /// s
    Timeout,
    /// s
    Error(String),
}
/// s
pub trait Reward {
    /// s
    fn name(&self) -> &str;
    /// s
    fn start(&mut self) -> Result<(), String> {
        Ok(())
    }
    /// s
    fn score(&mut self, samples: &[Sample]) -> Vec<Score>;
}
/// s
pub struct RewardSet {
    rewards: Vec<Box<dyn Reward>>,
    weights: Vec<f64>,
}
/// s
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// s
    pub reward: Option<f64>,
    /// s
    pub scores: Vec<Score>,
}
impl Judged {
    /// s
    pub fn outcome(&self) -> Option<Outcome> {
        self.scores.iter().find_map(|s| match s {
            Score::Graded(_, o) => Some(*o),
            _ => None,
        })
    }
}
impl RewardSet {
    /// s
    pub fn new(rewards: Vec<Box<dyn Reward>>, weights: Vec<f64>) -> Result<Self, String> {
        let weights = if weights.is_empty() { vec![1.0; rewards.len()] } else { weights };
        Ok(RewardSet { rewards, weights })
    }
    /// s
    pub fn names(&self) -> Vec<&str> {
        self.rewards.iter().map(|r| r.name()).collect()
    }
    /// s
    pub fn start(&mut self) -> Result<(), String> {
        self.rewards.iter_mut().try_for_each(|r| r.start())
    }
    /// s
    pub fn score(&mut self, samples: &[Sample]) -> Vec<Judged> {
        let all: Vec<Vec<Score>> = self.rewards.iter_mut().map(|r| r.score(samples)).collect();
        (0..samples.len())
            .map(|i| {
                let scores: Vec<Score> = all.iter().map(|s| s[i].clone()).collect();
                let mut reward = None;
                for (s, w) in scores.iter().zip(&self.weights) {
                    if let Score::Value(v) | Score::Graded(v, _) = s {
                        *reward.get_or_insert(0.0) += v * w;
                    }
                }
                Judged { reward, scores }
            })
            .collect()
    }
}
/// s
pub struct ParseOptions {
    /// s
    pub default_grader: Option<datasets::Grader>,
    /// s
    pub max_completion_length: usize,
    /// s
    pub timeout: std::time::Duration,
    /// s
    pub num_workers: usize,
    /// s
    pub stderr_dir: Option<std::path::PathBuf>,
}
struct Acc(datasets::Grader);
impl Reward for Acc {
    fn name(&self) -> &str {
        "accuracy_reward"
    }
    fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
        samples
            .iter()
            .map(|s| {
                let gold = s.columns.get("answer").and_then(|v| v.as_str()).unwrap_or_default();
                let o = crate::grade(self.0, s.completion, gold);
                Score::Graded(f64::from(u8::from(o == Outcome::Right)), o)
            })
            .collect()
    }
}
/// s
pub fn parse(_spec: &str, options: &ParseOptions) -> Result<Box<dyn Reward>, String> {
    Ok(Box::new(Acc(options.default_grader.unwrap_or(datasets::Grader::Numeric))))
}
