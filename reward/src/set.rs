//! Several rewards with weights, behind which no failure is hidden.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::outcome::Outcome;
use crate::reward::{Reward, Sample, Score, miscounted};

/// Rewards and what each counts.
pub struct RewardSet {
    rewards: Vec<Box<dyn Reward>>,
    weights: Vec<f64>,
}

/// What all rewards say of one completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// The weighted sum of the scores that apply; none if one failed or none applies.
    pub reward: Option<f64>,
    /// The score of each reward.
    pub scores: Vec<Score>,
}

impl Judged {
    /// Number of the first reward that failed, and why.
    pub fn failure<'a>(&'a self) -> Option<(usize, &'a str)> {
        let reason = |score: &'a Score| match score {
            Score::Timeout => Some("it did not answer within reward_timeout"),
            Score::Error(reason) => Some(reason.as_str()),
            _ => None,
        };
        self.scores.iter().enumerate().find_map(|(i, score)| Some((i, reason(score)?)))
    }

    fn new(scores: Vec<Score>, weights: &[f64]) -> Self {
        let mut reward = None;
        for (score, weight) in scores.iter().zip(weights) {
            match score {
                Score::Value(value) | Score::Graded(value, _) => {
                    *reward.get_or_insert(0.0) += value * weight;
                }
                Score::NotApplicable => {}
                Score::Timeout | Score::Error(_) => return Judged { reward: None, scores },
            }
        }
        Judged { reward, scores }
    }

    /// The worst verdict among the scores, failures above all; none if no reward gave one.
    pub fn outcome(&self) -> Option<Outcome> {
        let verdict = |score: &Score| match score {
            Score::Graded(_, outcome) => Some(*outcome),
            Score::Timeout => Some(Outcome::Timeout),
            Score::Error(_) => Some(Outcome::Error),
            Score::Value(_) | Score::NotApplicable => None,
        };
        self.scores.iter().filter_map(verdict).max()
    }
}

impl RewardSet {
    /// Rewards with their weights; no weights are all 1.
    ///
    /// # Errors
    /// If there is another number of weights than of rewards, or two rewards have the same name.
    pub fn new(rewards: Vec<Box<dyn Reward>>, weights: Vec<f64>) -> Result<Self, String> {
        let weights = if weights.is_empty() { vec![1.0; rewards.len()] } else { weights };
        if weights.len() != rewards.len() {
            let (weights, rewards) = (weights.len(), rewards.len());
            return Err(format!("reward_weights has {weights} of {rewards} weights, one a reward"));
        }
        let set = RewardSet { rewards, weights };
        // as the columns of tables, which have no other characters
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let column = |name: &&str| name.chars().map(plain).collect::<String>();
        let columns: Vec<String> = set.names().iter().map(column).collect();
        let twice = columns.iter().enumerate().find(|(i, name)| columns[..*i].contains(name));
        match twice {
            Some((_, name)) => Err(format!(
                "two rewards are called {name}: name a function (./my_reward.py:function), or a server \
                 behind # (http://localhost:8000/my_reward#name)"
            )),
            None => Ok(set),
        }
    }

    /// The log of each reward, if it has written any.
    pub fn logs(&self) -> Vec<Option<PathBuf>> {
        self.rewards.iter().map(|reward| reward.log()).collect()
    }

    /// The rewards' names.
    pub fn names(&self) -> Vec<&str> {
        self.rewards.iter().map(|reward| reward.name()).collect()
    }

    /// Gets all rewards ready.
    ///
    /// # Errors
    /// The first that cannot, by name.
    pub fn start(&mut self) -> Result<(), String> {
        self.rewards.iter_mut().try_for_each(|reward| {
            reward.start().map_err(|error| format!("reward {}: {error}", reward.name()))
        })
    }

    /// What all rewards say of each sample. A reward that panics, or gives another number of scores
    /// than there are samples, has failed for all of them; one that is no finite number, for that one.
    pub fn score(&mut self, samples: &[Sample]) -> Vec<Judged> {
        let all: Vec<Vec<Score>> =
            self.rewards.iter_mut().map(|reward| checked(&mut **reward, samples)).collect();
        let of_sample = |i: usize| all.iter().map(|scores| scores[i].clone()).collect();
        (0..samples.len()).map(|i| Judged::new(of_sample(i), &self.weights)).collect()
    }
}

/// As many scores as samples, every number finite.
fn checked(reward: &mut dyn Reward, samples: &[Sample]) -> Vec<Score> {
    if samples.is_empty() {
        return Vec::new();
    }
    let scores = match catch_unwind(AssertUnwindSafe(|| reward.score(samples))) {
        Ok(scores) if scores.len() == samples.len() => scores,
        Ok(scores) => {
            let reason = miscounted("score", scores.len(), samples.len());
            return vec![Score::Error(reason); samples.len()];
        }
        Err(_) => return vec![Score::Error("it panicked".to_string()); samples.len()],
    };
    let finite = |score| match score {
        Score::Value(value) | Score::Graded(value, _) if !value.is_finite() => {
            Score::Error(format!("it gave {value}"))
        }
        score => score,
    };
    scores.into_iter().map(finite).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use datasets::{Prompt, Row};

    struct Fixed(&'static str, Vec<Score>);

    impl Reward for Fixed {
        fn name(&self) -> &str {
            self.0
        }

        fn score(&mut self, _: &[Sample]) -> Vec<Score> {
            self.1.clone()
        }
    }

    struct Panics;

    impl Reward for Panics {
        fn name(&self) -> &str {
            "panics"
        }

        fn score(&mut self, _: &[Sample]) -> Vec<Score> {
            panic!("no")
        }
    }

    fn judged(rewards: Vec<Box<dyn Reward>>, weights: &[f64], n: usize) -> Vec<Judged> {
        let (prompt, columns) = (Prompt::Text("p".into()), Row::new());
        let sample =
            Sample { prompt: &prompt, completion: "c", completion_ids: &[], columns: &columns };
        RewardSet::new(rewards, weights.to_vec()).unwrap().score(&vec![sample; n])
    }

    #[test]
    fn scores_are_weighed_and_those_that_do_not_apply_left_out() {
        let a = Fixed("a", vec![Score::Value(1.0), Score::NotApplicable, Score::NotApplicable]);
        let graded = Score::Graded(3.0, Outcome::Right);
        let b = Fixed("b", vec![graded.clone(), graded, Score::NotApplicable]);
        let all = judged(vec![Box::new(a), Box::new(b)], &[2.0, 0.5], 3);
        let rewards: Vec<_> = all.iter().map(|judged| judged.reward).collect();
        assert_eq!(rewards, [Some(3.5), Some(1.5), None]);
        let outcomes: Vec<_> = all.iter().map(Judged::outcome).collect();
        assert_eq!(outcomes, [Some(Outcome::Right), Some(Outcome::Right), None]);
    }

    #[test]
    fn a_failure_leaves_its_sample_out_and_no_other() {
        let a = Fixed("a", vec![Score::Value(f64::NAN), Score::Timeout, Score::Value(1.0)]);
        let b = Fixed("b", vec![Score::Graded(1.0, Outcome::Wrong); 3]);
        let all = judged(vec![Box::new(a), Box::new(b)], &[], 3);
        let rewards: Vec<_> = all.iter().map(|judged| judged.reward).collect();
        assert_eq!(rewards, [None, None, Some(2.0)]);
        assert_eq!(all[0].scores[0], Score::Error("it gave NaN".into()));
        let outcomes: Vec<_> = all.iter().map(|judged| judged.outcome().unwrap()).collect();
        assert_eq!(outcomes, [Outcome::Error, Outcome::Timeout, Outcome::Wrong]);
    }

    #[test]
    fn panics_and_wrong_counts_fail_for_every_sample() {
        for reward in
            [Box::new(Panics) as Box<dyn Reward>, Box::new(Fixed("short", vec![Score::Value(1.0)]))]
        {
            let all = judged(vec![reward], &[], 2);
            assert!(all.iter().all(|j| j.reward.is_none() && j.outcome() == Some(Outcome::Error)));
        }
    }

    #[test]
    fn weights_and_names_must_fit() {
        let two = |other| -> Vec<Box<dyn Reward>> {
            vec![Box::new(Fixed("a-b", vec![])), Box::new(Fixed(other, vec![]))]
        };
        let refused = |other, weights| RewardSet::new(two(other), weights).err();
        let weights = refused("b", vec![1.0]).unwrap();
        assert_eq!(weights, "reward_weights has 1 of 2 weights, one a reward");
        for other in ["a-b", "a_b"] {
            let twice = refused(other, vec![]).unwrap();
            assert!(twice.starts_with("two rewards are called a_b: "), "{twice}");
        }
        assert_eq!(refused("a", vec![]), None);
    }
}
