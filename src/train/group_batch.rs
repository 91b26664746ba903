//! Groups of completions as packed batches: a prompt is one segment that its completions continue.

use std::collections::BTreeSet;

use crate::model::{Batch, Recorded};
use crate::ops::{RowRule, RowStats, Target};
use crate::rollout::Group;
use crate::{Error, Result};

/// Completions that are computed at once, by their group and their place in it.
pub type Chosen = Vec<(usize, Vec<usize>)>;

/// Cuts a step's completions, those of `wanted`, into micro-batches of at most `tokens` tokens (0 =
/// one), prompts included; a group that is longer is cut between completions. One completion with
/// its prompt is always taken whole.
pub fn micro_batches(
    groups: &[Group],
    wanted: &dyn Fn(usize, usize) -> bool,
    tokens: usize,
) -> Vec<Chosen> {
    let most = if tokens == 0 { usize::MAX / 2 } else { tokens };
    let (mut batches, mut filled): (Vec<Chosen>, usize) = (Vec::new(), 0);
    for (g, group) in groups.iter().enumerate() {
        let places = (0..group.completions.len()).filter(|c| wanted(g, *c));
        let length = |c: usize| group.completions[c].tokens.len().saturating_sub(1);
        let whole = group.prompt.len() + places.clone().map(length).sum::<usize>();
        let mut apart = whole <= most && filled + whole > most;
        for c in places {
            let begun =
                batches.last().and_then(|batch| batch.last()).is_some_and(|(of, _)| *of == g);
            let own = length(c) + if begun { 0 } else { group.prompt.len() };
            if batches.is_empty() || apart || filled + own > most {
                batches.push(Chosen::new());
                filled = 0;
                apart = false;
            }
            let Some(batch) = batches.last_mut() else { continue };
            filled += length(c);
            match batch.last_mut() {
                Some((of, places)) if *of == g => places.push(c),
                _ => {
                    filled += group.prompt.len();
                    batch.push((g, vec![c]));
                }
            }
        }
    }
    batches
}

/// A packed batch of completions and where their tokens' log-probs come from.
pub struct GroupBatch {
    /// The packed tokens; the last token of a completion predicts nothing and is left out.
    pub batch: Batch,
    /// Every token of the completions, sorted by the row that predicts it.
    pub targets: Vec<Target>,
    /// Group and place of each completion.
    pub completions: Vec<(usize, usize)>,
    /// Completion (by its place in `completions`) and token of each target.
    of: Vec<(usize, usize)>,
}

impl GroupBatch {
    /// Packs the chosen completions.
    pub fn new(groups: &[Group], chosen: &Chosen) -> Self {
        let (mut batch, mut targets) = (Batch::new(), Vec::new());
        let (mut completions, mut of) = (Vec::new(), Vec::new());
        for (g, places) in chosen {
            let group = &groups[*g];
            let prompt_len = group.prompt.len();
            let parent = batch.push(&group.prompt, prompt_len, None);
            let last = batch.len() as u32 - 1;
            let first = completions.len();
            for c in places {
                let token = group.completions[*c].tokens[0];
                targets.push(Target { row: last, token });
                of.push((completions.len(), 0));
                completions.push((*g, *c));
            }
            for (i, c) in places.iter().enumerate() {
                let tokens = &group.completions[*c].tokens;
                if tokens.len() < 2 {
                    continue;
                }
                let start = batch.len() as u32;
                batch.push(&tokens[..tokens.len() - 1], prompt_len, Some(parent));
                for (t, token) in tokens.iter().enumerate().skip(1) {
                    targets.push(Target { row: start + t as u32 - 1, token: *token });
                    of.push((first + i, t));
                }
            }
        }
        GroupBatch { batch, targets, completions, of }
    }

    /// What the sampling of each of the batch's segments computed, if that was kept.
    ///
    /// # Errors
    /// If it was kept in part only.
    pub fn recorded<'a>(&self, groups: &'a [Group]) -> Result<Option<Vec<&'a Recorded>>> {
        let mut all = Vec::with_capacity(self.batch.segments().len());
        for of_group in self.completions.chunk_by(|a, b| a.0 == b.0) {
            let group = &groups[of_group[0].0];
            let Some(prompt) = &group.recorded else { return Ok(None) };
            all.push(prompt);
            let completions = of_group.iter().map(|(_, c)| &group.completions[*c].recorded);
            all.extend(completions.flatten().filter(|recorded| !recorded.rows.is_empty()));
        }
        let lengths = self.batch.segments().iter().map(|segment| segment.len);
        match all.iter().map(|recorded| recorded.rows.len()).eq(lengths) {
            true => Ok(Some(all)),
            false => Err(Error::failure("sampling kept a part of what it computed; this is a bug")),
        }
    }

    /// The values of targets, gathered by completion.
    pub fn by_completion<T: Copy + Default>(&self, values: &[T]) -> Vec<Vec<T>> {
        let mut all: Vec<Vec<T>> = vec![Vec::new(); self.completions.len()];
        for ((completion, t), value) in self.of.iter().zip(values) {
            let of_completion = &mut all[*completion];
            of_completion.resize(of_completion.len().max(t + 1), T::default());
            of_completion[*t] = *value;
        }
        all
    }

    /// The values of completions' tokens, in the order of the targets.
    pub fn by_target<T: Copy>(&self, values: &[Vec<T>]) -> Vec<T> {
        self.of.iter().map(|(completion, t)| values[*completion][*t]).collect()
    }

    /// Values of targets summed over the targets of each distinct row.
    pub fn by_row(&self, values: &[f32]) -> Vec<f32> {
        let rows = self.targets.chunk_by(|a, b| a.row == b.row);
        let mut done = 0;
        rows.map(|row| {
            let sum = values[done..done + row.len()].iter().sum();
            done += row.len();
            sum
        })
        .collect()
    }

    /// Values of distinct rows, one for each target.
    pub fn of_rows(&self, values: &[f32]) -> Vec<f32> {
        let rows = self.targets.chunk_by(|a, b| a.row == b.row).zip(values);
        rows.flat_map(|(row, value)| std::iter::repeat_n(*value, row.len())).collect()
    }

    /// The statistics of each distinct row's distribution, if sampling has handed on all of them.
    pub fn stats(&self, groups: &[Group]) -> Vec<RowStats> {
        let rows = self.targets.chunk_by(|a, b| a.row == b.row);
        let mut done = 0;
        let stats = rows.map(|row| {
            let (completion, t) = self.of[done];
            done += row.len();
            let (g, c) = self.completions[completion];
            groups[g].completions[c].stats.get(t).copied()
        });
        stats.collect::<Option<_>>().unwrap_or_default()
    }

    /// Gradients and log-probs of the targets, if the gradients of all were taken when they were drawn.
    pub fn taken<'a>(&self, groups: &'a [Group]) -> Option<(Vec<&'a [f32]>, Vec<f32>)> {
        let of_target = |(completion, t): &(usize, usize)| {
            let (g, c) = self.completions[*completion];
            let completion = &groups[g].completions[c];
            Some((completion.recorded.as_ref()?.gradient(*t)?, completion.logps[*t]))
        };
        self.of.iter().map(of_target).collect()
    }

    /// The places of a completion's targets, token after token.
    pub fn targets_of(&self, completion: usize) -> Vec<usize> {
        (0..self.of.len()).filter(|target| self.of[*target].0 == completion).collect()
    }

    /// What sampling did to each distinct row: the tokens that it penalised, and those it kept.
    pub fn rules(&self, groups: &[Group], penalises: bool) -> Vec<RowRule> {
        let rows = self.targets.chunk_by(|a, b| a.row == b.row);
        let mut done = 0;
        rows.map(|row| {
            let (completion, t) = self.of[done];
            done += row.len();
            let (g, c) = self.completions[completion];
            let (prompt, completion) = (&groups[g].prompt, &groups[g].completions[c]);
            let seen = prompt.iter().chain(&completion.tokens[..t]).copied();
            let penalised: BTreeSet<u32> = if penalises { seen.collect() } else { BTreeSet::new() };
            let kept = completion.kept.get(t).cloned().unwrap_or_default();
            RowRule { penalised: penalised.into_iter().collect(), kept }
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Recording;
    use crate::rollout::{Completion, StopReason};
    use proptest::prelude::*;

    fn group(prompt: usize, lengths: &[usize]) -> Group {
        let completion = |n: &usize| Completion {
            tokens: (0..*n as u32).map(|t| 100 + t).collect(),
            logps: vec![0.0; *n],
            entropies: vec![0.0; *n],
            kept: Vec::new(),
            stop: StopReason::Eos,
            stats: Vec::new(),
            recorded: None,
        };
        let completions = lengths.iter().map(completion).collect();
        Group {
            prompt: vec![7; prompt],
            prompt_id: 0,
            row: 0,
            version: 0,
            completions,
            recorded: None,
        }
    }

    #[test]
    fn first_tokens_are_predicted_by_the_prompts_last_row() {
        let groups = [group(3, &[2, 1, 3])];
        let packed = GroupBatch::new(&groups, &vec![(0, vec![0, 1, 2])]);
        assert_eq!(packed.batch.len(), 3 + 1 + 2);
        let rows: Vec<(u32, u32)> = packed.targets.iter().map(|t| (t.row, t.token)).collect();
        assert_eq!(rows, [(2, 100), (2, 100), (2, 100), (3, 101), (4, 101), (5, 102)]);
        let values = [1, 2, 3, 4, 5, 6];
        let by_completion = packed.by_completion(&values);
        assert_eq!(by_completion, [vec![1, 4], vec![2], vec![3, 5, 6]]);
        assert_eq!(packed.by_target(&by_completion), values);
        assert_eq!(packed.by_row(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), [6.0, 4.0, 5.0, 6.0]);
        assert_eq!(packed.of_rows(&[6.0, 4.0, 5.0, 7.0]), [6.0, 6.0, 6.0, 4.0, 5.0, 7.0]);
    }

    #[test]
    fn taken_gradients_are_handed_to_the_targets_of_their_tokens() {
        let mut recording = Recording::default();
        // two numbers a token: the completion and the token
        let of = |row: [usize; 2]| row.map(|x| x as f32);
        let first = [[0, 0], [1, 0], [2, 0]].map(of).concat();
        let second = [[2, 1], [0, 1]].map(of).concat();
        let first = recording.push_drawn(first, 2);
        let second = recording.push_drawn(second, 2);
        let third = recording.push_drawn(of([2, 2]).to_vec(), 2);
        let drawn = [
            vec![(first, 0), (second, 1)],
            vec![(first, 1)],
            vec![(first, 2), (second, 0), (third, 0)],
        ];
        let mut groups = [group(3, &[2, 1, 3])];
        let recording = Arc::new(recording);
        for (completion, drawn) in groups[0].completions.iter_mut().zip(drawn) {
            let recording = recording.clone();
            completion.recorded = Some(Recorded { recording, rows: Vec::new(), slot: 0, drawn });
            completion.logps.iter_mut().zip(1..).for_each(|(logp, t)| *logp = -(t as f32));
        }
        let packed = GroupBatch::new(&groups, &vec![(0, vec![0, 1, 2])]);
        let (gradients, logps) = packed.taken(&groups).unwrap();
        assert_eq!(gradients, [[0, 0], [1, 0], [2, 0], [0, 1], [2, 1], [2, 2]].map(of));
        assert_eq!(logps, [-1.0, -1.0, -1.0, -2.0, -2.0, -3.0]);
        assert_eq!([0, 1, 2].map(|c| packed.targets_of(c)), [vec![0, 3], vec![1], vec![2, 4, 5]]);
        groups[0].completions[1].recorded = None;
        assert!(packed.taken(&groups).is_none());
    }

    proptest! {
        #[test]
        fn micro_batches_hold_every_wanted_completion_once_and_keep_to_the_limit(
            shapes in prop::collection::vec(
                (1usize..6, prop::collection::vec(1usize..8, 1..5)), 0..5),
            tokens in 0usize..30,
        ) {
            let groups: Vec<Group> = shapes.iter().map(|(p, lengths)| group(*p, lengths)).collect();
            let wanted = |g: usize, c: usize| !(g + c).is_multiple_of(3);
            let batches = micro_batches(&groups, &wanted, tokens);
            let mut seen = Vec::new();
            for batch in &batches {
                let size = GroupBatch::new(&groups, batch).batch.len();
                let count: usize = batch.iter().map(|(_, places)| places.len()).sum();
                prop_assert!(count > 0);
                prop_assert!(tokens == 0 || size <= tokens || count == 1, "{} {:?}", size, batch);
                let places = batch.iter().flat_map(|(g, places)| places.iter().map(|c| (*g, *c)));
                seen.extend(places);
            }
            let all = (0..groups.len())
                .flat_map(|g| (0..groups[g].completions.len()).map(move |c| (g, c)));
            prop_assert_eq!(seen, all.filter(|(g, c)| wanted(*g, *c)).collect::<Vec<_>>());
        }
    }
}
