//! Sharing element-wise work among threads.

use rayon::prelude::*;

/// Floats that a task works on, about: long enough to be worth a thread's while.
const TASK: usize = 1 << 14;

/// Floats in a task of whole rows of `width`.
pub fn task_len(width: usize) -> usize {
    (TASK / width.max(1)).max(1) * width.max(1)
}

/// Does `work` on every item, on all threads if there is more than one item.
pub fn for_each<T: Send>(items: impl Iterator<Item = T>, work: impl Fn(T) + Sync + Send) {
    let mut items: Vec<T> = items.collect();
    if items.len() > 1 {
        items.into_par_iter().for_each(work);
    } else if let Some(item) = items.pop() {
        work(item);
    }
}
