//! Which examples make up which optimizer step.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The order of examples over epochs, a function of (seed, epoch) and nothing else.
#[derive(Clone, Debug)]
pub struct Schedule {
    lengths: Vec<usize>,
    seed: u64,
    rows_per_step: usize,
    pack_to: Option<usize>,
}

impl Schedule {
    /// Steps of `rows_per_step` rows over examples of the given token counts. A row is one example,
    /// or with `pack_to` as many whole examples as fit into that many tokens.
    pub fn new(
        lengths: Vec<usize>,
        seed: u64,
        rows_per_step: usize,
        pack_to: Option<usize>,
    ) -> Self {
        Schedule { lengths, seed, rows_per_step: rows_per_step.max(1), pack_to }
    }

    /// Optimizer steps in an epoch; the last one takes what is left.
    pub fn steps_per_epoch(&self) -> usize {
        self.rows().len().div_ceil(self.rows_per_step)
    }

    /// The examples of each step of epoch `epoch`, in order.
    pub fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut rows = self.rows();
        shuffle(&mut rows, self.seed, epoch);
        rows.chunks(self.rows_per_step).map(|rows| rows.concat()).collect()
    }

    /// Examples grouped into rows.
    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Most tokens that a step can have.
    pub fn largest_step(&self) -> usize {
        let length = |row: &Vec<usize>| row.iter().map(|example| self.lengths[*example]).sum();
        let mut rows: Vec<usize> = self.rows().iter().map(length).collect();
        rows.sort_unstable_by(|a, b| b.cmp(a));
        rows.iter().take(self.rows_per_step).sum()
    }

    fn rows(&self) -> Vec<Vec<usize>> {
        match self.pack_to {
            None => (0..self.lengths.len()).map(|example| vec![example]).collect(),
            Some(width) => best_fit_decreasing(&self.lengths, width),
        }
    }
}

/// Packs items into bins of `width`: longest first, each into the fullest bin that has room.
///
/// An item longer than a bin gets one for itself.
fn best_fit_decreasing(lengths: &[usize], width: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|item| std::cmp::Reverse(lengths[*item]));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut by_room: std::collections::BTreeSet<(usize, usize)> = Default::default();
    for item in order {
        let found = by_room.range((lengths[item], 0)..).next().copied();
        let (room, bin) = found.unwrap_or_else(|| {
            bins.push(Vec::new());
            (width.max(lengths[item]), bins.len() - 1)
        });
        by_room.remove(&(room, bin));
        bins[bin].push(item);
        by_room.insert((room - lengths[item], bin));
    }
    bins
}

/// The numbers 0 to `count` - 1 in the order of an epoch, a function of (seed, epoch).
pub fn order(count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    shuffle(&mut order, seed, epoch);
    order
}

/// Fisher-Yates with a stream that belongs to (seed, epoch).
fn shuffle<T>(items: &mut [T], seed: u64, epoch: u64) {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    for i in (1..items.len()).rev() {
        let j = (rng.next_u64() % (i as u64 + 1)) as usize;
        items.swap(i, j);
    }
}

/// Splits a step's examples, in order, into micro-batches of at most `tokens` tokens (0 = one).
///
/// An example longer than that makes a micro-batch of its own.
pub fn micro_batches(examples: &[usize], lengths: &[usize], tokens: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut filled = 0;
    for example in examples {
        let fits = tokens == 0 || filled + lengths[*example] <= tokens;
        match batches.last_mut().filter(|_| fits) {
            Some(batch) => batch.push(*example),
            None => {
                batches.push(vec![*example]);
                filled = 0;
            }
        }
        filled += lengths[*example];
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_epoch_is_the_same_every_time_and_epochs_differ() {
        let schedule = Schedule::new(vec![1; 100], 7, 8, None);
        assert_eq!(schedule.epoch(3), schedule.epoch(3));
        assert_ne!(schedule.epoch(3), schedule.epoch(4));
        assert_eq!(schedule.steps_per_epoch(), 13);
        assert_eq!(schedule.epoch(0).len(), 13);
    }

    #[test]
    fn micro_batches_keep_order_and_stay_within_their_tokens() {
        let lengths = [5, 5, 9, 30, 1];
        let batches = micro_batches(&[0, 1, 2, 3, 4], &lengths, 10);
        assert_eq!(batches, [vec![0, 1], vec![2], vec![3], vec![4]]);
        assert_eq!(micro_batches(&[2, 0], &lengths, 0), [vec![2, 0]]);
    }

    proptest! {
        #[test]
        fn every_example_appears_once_an_epoch_and_bins_do_not_overflow(
            lengths in prop::collection::vec(1usize..60, 1..80),
            pack in prop::option::of(20usize..100),
            rows in 1usize..9,
        ) {
            let schedule = Schedule::new(lengths.clone(), 1, rows, pack);
            let mut seen: Vec<usize> = schedule.epoch(0).concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for bin in schedule.rows() {
                let total: usize = bin.iter().map(|example| lengths[*example]).sum();
                prop_assert!(bin.len() == 1 || pack.is_some_and(|width| total <= width));
            }
        }
    }
}
