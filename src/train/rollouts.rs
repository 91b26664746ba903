//! The completions of a step with what is made of their rewards.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::loss::policy::Normaliser;
use crate::files::write_atomic;
use crate::report::StepMetrics;
use crate::rollout::{Group, StopReason};
use crate::train::checkpoint::DataCursor;
use crate::{Error, Result};

/// Completions that the steps of a checkpoint still learn from.
pub const ROLLOUTS_FILE: &str = "rollouts.json";

/// What the optimizer steps between two samplings learn from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollouts {
    /// The groups.
    pub groups: Vec<Group>,
    /// Advantage of each completion, group after group; `None` where it takes no part.
    pub advantages: Vec<Option<f64>>,
    /// Log-probs of each completion's tokens under the reference; empty without one.
    pub reference: Vec<Vec<f32>>,
    /// Which tokens the objective counts; empty = all.
    pub chosen: Vec<Vec<bool>>,
    /// The trainer's log-probs of the policy that sampled, once a step was made, where the sampler has
    /// other ones; empty otherwise.
    pub old: Vec<Vec<f32>>,
    /// What a step counts.
    pub normaliser: Normaliser,
    /// Optimizer steps made on them.
    pub used: usize,
    /// The next prompt's place.
    pub cursor: DataCursor,
    /// Metrics of the sampling, told with the first step.
    #[serde(skip)]
    pub metrics: StepMetrics,
}

impl Rollouts {
    /// Tokens of prompts, each once, and completions.
    pub fn tokens(&self) -> usize {
        let of_completions = |group: &Group| -> usize {
            group.completions.iter().map(|completion| completion.tokens.len()).sum()
        };
        self.groups.iter().map(|group| group.prompt.len() + of_completions(group)).sum()
    }

    /// Puts them into a checkpoint's folder.
    ///
    /// # Errors
    /// If the file cannot be written whole.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(ROLLOUTS_FILE);
        let text = serde_json::to_vec(self)
            .map_err(|error| Error::failure(format!("{}: {error}", path.display())))?;
        write_atomic(&path, &text)
    }

    /// Those of a checkpoint's folder, if it has some.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(ROLLOUTS_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| Error::failure(format!("{}: {error}", path.display())))
    }
}

/// What a step over these groups counts: completions with an advantage, and the tokens of those of
/// them that are learnt from.
pub fn normaliser(
    groups: &[Group],
    advantages: &[Option<f64>],
    mask_truncated: bool,
    max_completion_length: usize,
) -> Normaliser {
    let completions = groups.iter().flat_map(|group| &group.completions).zip(advantages);
    let counted: Vec<_> = completions.filter(|(_, advantage)| advantage.is_some()).collect();
    let learnt = counted
        .iter()
        .filter(|(completion, _)| !(mask_truncated && completion.stop == StopReason::Length));
    let tokens = learnt.map(|(completion, _)| completion.tokens.len()).sum();
    Normaliser { completions: counted.len(), tokens, max_completion_length }
}

/// The tokens whose entropy is at least the `1 - share` quantile of all tokens of the completions with
/// an advantage (arXiv:2506.01939; TRL's `top_entropy_quantile`); the quantile lies between two values
/// as in `torch.quantile`.
pub fn top_entropy(groups: &[Group], advantages: &[Option<f64>], share: f64) -> Vec<Vec<bool>> {
    if share >= 1.0 {
        return Vec::new();
    }
    let completions = || groups.iter().flat_map(|group| &group.completions);
    let counted = completions().zip(advantages).filter(|(_, advantage)| advantage.is_some());
    let mut all: Vec<f32> =
        counted.flat_map(|(completion, _)| completion.entropies.iter().copied()).collect();
    all.sort_by(f32::total_cmp);
    let place = (1.0 - share) * all.len().saturating_sub(1) as f64;
    let at = |i: usize| all.get(i).copied().map_or(0.0, f64::from);
    let (low, part) = (at(place.floor() as usize), place.fract());
    let threshold = low + part * (at(place.ceil() as usize) - low);
    completions()
        .map(|completion| completion.entropies.iter().map(|e| f64::from(*e) >= threshold).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::Completion;

    fn group(entropies: &[&[f32]], stops: &[StopReason]) -> Group {
        let completion = |(entropies, stop): (&&[f32], &StopReason)| Completion {
            tokens: vec![1; entropies.len()],
            logps: vec![-0.1; entropies.len()],
            entropies: entropies.to_vec(),
            kept: Vec::new(),
            stop: *stop,
            stats: Vec::new(),
            recorded: None,
        };
        let completions = entropies.iter().zip(stops).map(completion).collect();
        Group { prompt: vec![1], prompt_id: 0, row: 0, version: 0, completions, recorded: None }
    }

    #[test]
    fn the_tokens_of_highest_entropy_are_chosen_over_the_whole_step() {
        let stops = [StopReason::Eos, StopReason::Eos];
        let groups =
            [group(&[&[0.1, 0.9], &[0.2]], &stops), group(&[&[0.8, 0.3], &[9.0, 9.0]], &stops)];
        // without the last: 0.1 0.2 0.3 0.8 0.9, the 0.6 quantile is 0.3 + 0.4 (0.8 - 0.3) = 0.5
        let advantages = [Some(1.0), Some(0.0), Some(-1.0), None];
        let chosen = top_entropy(&groups, &advantages, 0.4);
        assert_eq!(chosen, [vec![false, true], vec![false], vec![true, false], vec![true, true]]);
        assert!(top_entropy(&groups, &advantages, 1.0).is_empty());
    }

    #[test]
    fn masked_completions_count_as_completions_but_not_their_tokens() {
        let groups = [group(&[&[0.0; 4], &[0.0; 2]], &[StopReason::Length, StopReason::Eos])];
        let counted = |mask| normaliser(&groups, &[Some(1.0), Some(1.0)], mask, 7);
        let all = Normaliser { completions: 2, tokens: 6, max_completion_length: 7 };
        assert_eq!(counted(false), all);
        assert_eq!(counted(true), Normaliser { tokens: 2, ..all });
        assert_eq!(normaliser(&groups, &[None, Some(1.0)], false, 7).tokens, 2);
    }

    #[test]
    fn rollouts_read_back_to_the_bit() {
        let groups = vec![group(&[&[0.1f32, 1e-30]], &[StopReason::StopString])];
        let rollouts = Rollouts {
            groups,
            advantages: vec![Some(0.1 + 0.2), None],
            reference: vec![vec![-0.1, f32::MIN_POSITIVE]],
            chosen: vec![vec![true, false]],
            old: vec![vec![-0.25]],
            normaliser: Normaliser { completions: 1, tokens: 2, max_completion_length: 3 },
            used: 1,
            cursor: DataCursor { epoch: 2, row: 5 },
            metrics: StepMetrics::new(),
        };
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Rollouts::load(dir.path()).unwrap(), None);
        rollouts.save(dir.path()).unwrap();
        assert_eq!(Rollouts::load(dir.path()).unwrap(), Some(rollouts));
    }
}
