//! The groups of a step while they are collected, and what is told of them.

use datasets::Row;

use super::checkpoint::DataCursor;
use super::loss::advantage::{deviation, mean};
use super::scoring::{Scored, metrics, value};
use crate::Result;
use crate::report::{CompletionRow, Fold, StepMetrics};
use crate::rollout::{Completion, Group, StopReason};

/// A group with the text and the rewards of its completions.
pub struct Collected {
    /// The group.
    pub group: Group,
    /// One for each of its completions.
    pub scored: Vec<Scored>,
}

impl Collected {
    /// Whether two of its rewards differ.
    fn has_spread(&self) -> bool {
        let mut rewards = self.scored.iter().filter_map(|scored| scored.judged.reward);
        let first = rewards.next();
        rewards.any(|reward| Some(reward) != first)
    }
}

/// The groups of a step; with dynamic sampling (DAPO, arXiv:2503.14476) those without spread are
/// replaced by groups of further prompts, for a bounded number of rounds.
pub struct Collection {
    /// The next prompt's place.
    pub cursor: DataCursor,
    prompts_per_step: usize,
    rounds: usize,
    groups: Vec<Collected>,
    replaced: usize,
    whole: bool,
    /// Seconds of sampling and of scoring.
    seconds: (f64, f64),
}

impl Collection {
    /// Nothing yet of a step of `prompts_per_step` groups, taken from the place `cursor`.
    pub fn new(cursor: DataCursor, prompts_per_step: usize, rounds: usize) -> Self {
        Collection {
            cursor,
            prompts_per_step,
            rounds,
            groups: Vec::new(),
            replaced: 0,
            whole: false,
            seconds: (0.0, 0.0),
        }
    }

    /// How many more groups are wanted.
    pub fn wanted(&self) -> usize {
        if self.whole { 0 } else { self.prompts_per_step - self.groups.len() }
    }

    /// Takes in as many groups as are wanted, which took `generate` and `reward` seconds; groups
    /// without spread are dropped while rounds are left.
    pub fn add(&mut self, groups: Vec<Collected>, (generate, reward): (f64, f64)) {
        self.seconds.0 += generate;
        self.seconds.1 += reward;
        let more = self.rounds > 0;
        self.rounds = self.rounds.saturating_sub(1);
        for group in groups {
            match more && !group.has_spread() {
                true => self.replaced += 1,
                false => self.groups.push(group),
            }
        }
        self.whole = !more || self.groups.len() == self.prompts_per_step;
    }

    /// The reward of each completion, group after group.
    pub fn rewards(&self) -> Vec<Option<f64>> {
        self.scored().map(|scored| scored.judged.reward).collect()
    }

    /// The groups.
    pub fn into_groups(self) -> Vec<Group> {
        self.groups.into_iter().map(|collected| collected.group).collect()
    }

    fn scored(&self) -> impl Iterator<Item = &Scored> {
        self.groups.iter().flat_map(|collected| &collected.scored)
    }

    fn completions(&self) -> impl Iterator<Item = &Completion> {
        self.groups.iter().flat_map(|collected| &collected.group.completions)
    }

    /// Metrics of rewards and completions, under TRL's names.
    pub fn metrics(&self, names: &[&str]) -> StepMetrics {
        let known = |scored: &[Scored]| -> Vec<f64> {
            scored.iter().filter_map(|scored| scored.judged.reward).collect()
        };
        let rewards: Vec<f64> = self.rewards().into_iter().flatten().collect();
        let spreads: Vec<f64> =
            self.groups.iter().map(|collected| deviation(&known(&collected.scored))).collect();
        let all = self.scored().count().max(1) as f64;
        let share = |is: fn(&Scored) -> bool| {
            self.scored().filter(|scored| is(scored)).count() as f64 / all
        };
        let failed = share(|scored| scored.judged.failure().is_some());
        let unscored = share(|scored| scored.judged.reward.is_none());
        let mut of_all = StepMetrics::new();
        if !rewards.is_empty() {
            of_all.push(Fold::Mean, "reward", mean(&rewards));
            of_all.push(Fold::Mean, "reward_std", mean(&spreads));
        }
        let judged: Vec<_> = self.scored().map(|scored| &scored.judged).collect();
        of_all.extend(metrics(&judged, names));
        of_all.push(Fold::Mean, "reward_failures", failed);
        of_all.push(Fold::Mean, "reward_not_applicable", unscored - failed);
        of_all.push(Fold::Sum, "dynamic_sampling/replaced", self.replaced as f64);
        of_all.extend(self.lengths());
        let empty = share(|scored| scored.text.trim().is_empty());
        of_all.push(Fold::Mean, "completions/empty_ratio", empty);
        of_all.with(Fold::Mean, "time/generate", self.seconds.0).with(
            Fold::Mean,
            "time/reward",
            self.seconds.1,
        )
    }

    fn lengths(&self) -> StepMetrics {
        let lengths: Vec<f64> =
            self.completions().map(|completion| completion.tokens.len() as f64).collect();
        let stopped = |reason: StopReason| {
            self.completions().filter(|completion| completion.stop == reason).count() as f64
        };
        let entropies: Vec<f64> =
            self.completions().flat_map(|c| &c.entropies).map(|e| f64::from(*e)).collect();
        let cut = stopped(StopReason::Length) / lengths.len().max(1) as f64;
        let mut metrics = StepMetrics::new()
            .with(Fold::Mean, "entropy", mean(&entropies))
            .with(Fold::Mean, "completions/mean_length", mean(&lengths))
            .with(Fold::Min, "completions/min_length", fold(&lengths, f64::min))
            .with(Fold::Max, "completions/max_length", fold(&lengths, f64::max))
            .with(Fold::Mean, "completions/clipped_ratio", cut);
        for reason in StopReason::ALL {
            metrics.push(Fold::Sum, format!("stop/{}", reason.as_str()), stopped(reason));
        }
        metrics
    }

    /// The completions as rows of a table; `about` gives the text of a group's prompt and the further
    /// columns of its row.
    ///
    /// # Errors
    /// The first error of `about`.
    pub fn rows(
        &self,
        step: u64,
        names: &[&str],
        about: impl Fn(&Group) -> Result<(String, Row)>,
    ) -> Result<Vec<CompletionRow>> {
        let mut rows = Vec::new();
        for Collected { group, scored } in &self.groups {
            let (prompt, columns) = about(group)?;
            for (completion, scored) in group.completions.iter().zip(scored) {
                let scores = names.iter().zip(&scored.judged.scores);
                rows.push(CompletionRow {
                    step,
                    row: group.row as u64 + 1,
                    prompt: prompt.clone(),
                    completion: scored.text.clone(),
                    reward: scored.judged.reward,
                    scores: scores.map(|(name, score)| (name.to_string(), value(score))).collect(),
                    outcome: scored.judged.outcome().map(|outcome| outcome.as_str()),
                    stop: completion.stop.as_str(),
                    tokens: completion.tokens.len() as u64,
                    columns: columns.clone(),
                });
            }
        }
        Ok(rows)
    }
}

fn fold(values: &[f64], f: fn(f64, f64) -> f64) -> f64 {
    values.iter().copied().reduce(f).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use reward::{Judged, Score};

    fn group(rewards: &[Option<f64>]) -> Collected {
        let completion = Completion {
            tokens: vec![1],
            logps: vec![-0.5],
            entropies: vec![0.7],
            kept: Vec::new(),
            stop: StopReason::Eos,
            stats: Vec::new(),
            recorded: None,
        };
        let completions = vec![completion; rewards.len()];
        let scored = rewards.iter().map(|reward| Scored {
            text: if *reward == Some(1.0) { "one".into() } else { " ".into() },
            row: 1,
            judged: Judged { reward: *reward, scores: vec![Score::NotApplicable] },
        });
        let scored = scored.collect();
        let group = Group {
            prompt: vec![1],
            prompt_id: 0,
            row: 0,
            version: 0,
            completions,
            recorded: None,
        };
        Collected { group, scored }
    }

    fn spread() -> Collected {
        group(&[Some(1.0), Some(0.0)])
    }

    fn flat() -> Collected {
        group(&[Some(1.0), Some(1.0)])
    }

    #[test]
    fn groups_without_spread_are_replaced_for_a_bounded_number_of_rounds() {
        let mut collection = Collection::new(DataCursor::default(), 3, 2);
        collection.add(vec![flat(), spread(), group(&[Some(1.0), None])], (1.0, 0.5));
        assert_eq!(collection.wanted(), 2);
        collection.add(vec![flat(), spread()], (1.0, 0.5));
        assert_eq!(collection.wanted(), 1);
        collection.add(vec![flat()], (1.0, 0.5));
        assert_eq!(collection.wanted(), 0);
        let metrics = collection.metrics(&[]);
        assert_eq!(metrics.get("dynamic_sampling/replaced"), Some(3.0));
        assert_eq!(metrics.get("time/generate"), Some(3.0));
        assert_eq!(collection.rewards().len(), 6);
    }

    #[test]
    fn a_step_without_a_reward_has_none_in_its_metrics() {
        let mut collection = Collection::new(DataCursor::default(), 1, 0);
        collection.add(vec![group(&[None, None])], (0.0, 0.0));
        let metrics = collection.metrics(&[]);
        assert_eq!((metrics.get("reward"), metrics.get("reward_std")), (None, None));
        assert_eq!(metrics.get("reward_not_applicable"), Some(1.0));
    }

    #[test]
    fn without_dynamic_sampling_every_group_is_kept() {
        let mut collection = Collection::new(DataCursor::default(), 2, 0);
        assert_eq!(collection.wanted(), 2);
        collection.add(vec![flat(), group(&[None, Some(3.0)])], (0.0, 0.0));
        assert_eq!((collection.wanted(), collection.rewards()[2]), (0, None));
        let metrics = collection.metrics(&[]);
        assert_eq!(metrics.get("reward"), Some(5.0 / 3.0));
        assert_eq!(metrics.get("reward_failures"), Some(0.0));
        assert_eq!(metrics.get("reward_not_applicable"), Some(0.25));
        assert_eq!(metrics.get("completions/empty_ratio"), Some(0.5));
        assert_eq!(metrics.get("stop/eos"), Some(4.0));
    }
}
