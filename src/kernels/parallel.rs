//! Cuts a kernel's work for as many threads as the current rayon pool has; the team does it. Where the
//! cuts fall never changes a result: tasks write disjoint outputs and each output is computed by one
//! task.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::team;

/// Floats of an element-wise task, about: long enough to be worth a thread's while.
const TASK_FLOATS: usize = 1 << 14;
/// Multiply-adds below which a task is not worth another thread's while (a few microseconds).
const MIN_TASK: usize = 1 << 16;
/// Pieces of a thread's share of the work.
const PIECES: usize = 4;

/// How many tasks to cut `work` multiply-adds into: 1 for small work, otherwise up to
/// `per_thread` for each thread of the pool.
pub fn task_count(work: usize, per_thread: usize) -> usize {
    (work / MIN_TASK).clamp(1, per_thread * rayon::current_num_threads())
}

/// Floats in an element-wise task of whole rows of `width`.
pub fn task_len(width: usize) -> usize {
    (TASK_FLOATS / width.max(1)).max(1) * width.max(1)
}

/// Does `work` on every item, in parallel where there is more than one.
pub fn for_each<T: Send>(items: impl Iterator<Item = T>, work: impl Fn(T) + Sync + Send) {
    let items: Vec<Mutex<Option<T>>> = items.map(|item| Mutex::new(Some(item))).collect();
    for_each_index(
        items.len(),
        || (),
        |(), i| {
            let item = items[i].lock().ok().and_then(|mut item| item.take());
            item.into_iter().for_each(&work);
        },
    );
}

/// The results of `work` on every item, in the order of the items.
pub fn map<T: Send, R: Send>(
    items: impl Iterator<Item = T>,
    work: impl Fn(T) -> R + Sync + Send,
) -> Vec<R> {
    let items: Vec<T> = items.collect();
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    for_each(items.into_iter().zip(&mut results), |(item, result)| *result = Some(work(item)));
    results.into_iter().flatten().collect()
}

/// Does `work` for every index below `n`, in parallel where there is more than one; each thread that
/// finds work makes its own scratch.
///
/// Each thread begins with its part of the indices, the same in every kernel, so that it mostly reads
/// what it wrote itself, from its own cache; then it helps with the parts of the others.
pub fn for_each_index<S>(
    n: usize,
    make: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) + Sync,
) {
    let threads = if n > 1 { rayon::current_num_threads() } else { 1 };
    let parts: Vec<Part> = (0..threads).map(|i| Part::new(part(n, 1, threads, i))).collect();
    let job = |thread: usize| {
        let mut scratch = None;
        for i in thread..thread + threads {
            while let Some(index) = parts[i % threads].take() {
                work(scratch.get_or_insert_with(&make), index);
            }
        }
    };
    if threads > 1 { team::share(&job) } else { job(0) }
}

/// The indices of a thread, on a cache line of their own.
#[repr(align(64))]
struct Part {
    next: AtomicUsize,
    end: usize,
}

impl Part {
    fn new(indices: Range<usize>) -> Self {
        Part { next: AtomicUsize::new(indices.start), end: indices.end }
    }

    /// The next index that nobody has taken.
    fn take(&self) -> Option<usize> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.end).then_some(index)
    }
}

/// Part `i` of `0..n` cut into `parts` ranges whose lengths are multiples of `unit` (the last
/// one excepted) and differ by at most one unit. Ranges may be empty.
pub fn part(n: usize, unit: usize, parts: usize, i: usize) -> Range<usize> {
    let units = n.div_ceil(unit);
    let edge = |i: usize| (units * i / parts * unit).min(n);
    edge(i)..edge(i + 1)
}

/// Cuts `0..n` into as many equal shares as there are threads, each of them into [`PIECES`] that become
/// smaller, so that the threads end together. Pieces may be empty.
pub fn shrinking(n: usize, threads: usize) -> Vec<Range<usize>> {
    let pieces = |share: Range<usize>| {
        let edge = move |i: usize| match i {
            PIECES => share.end,
            _ => share.end - (share.len() >> i),
        };
        (0..PIECES).map(move |i| edge(i)..edge(i + 1))
    };
    (0..threads).flat_map(|i| pieces(part(n, 1, threads, i))).collect()
}

/// A mutable slice that several tasks write, each its own part.
#[derive(Clone, Copy)]
pub struct SharedMut<'a> {
    start: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: handing out parts is unsafe and the caller's promise is that they do not overlap.
unsafe impl Send for SharedMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    /// Takes hold of `slice` for the lifetime of the borrow.
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Pointer to element `i`.
    ///
    /// # Safety
    /// Nobody else accesses what is written through the pointer, and it stays in the slice.
    pub unsafe fn at(&self, i: usize) -> *mut f32 {
        debug_assert!(i <= self.len);
        // SAFETY: the caller keeps `i` inside the slice.
        unsafe { self.start.add(i) }
    }

    /// The part `range` as a slice.
    ///
    /// # Safety
    /// No other live part overlaps `range`.
    pub unsafe fn part(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice by the assertion, not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_range_in_order_and_in_whole_units() {
        for (n, unit, parts) in [(0, 6, 3), (1, 6, 4), (64, 6, 4), (2048, 6, 7), (5, 1, 9)] {
            let mut next = 0;
            for i in 0..parts {
                let range = part(n, unit, parts, i);
                assert_eq!(range.start, next);
                assert!(range.end == n || range.len().is_multiple_of(unit));
                next = range.end;
            }
            assert_eq!(next, n);
        }
    }

    #[test]
    fn shrinking_pieces_cover_the_range_in_order_and_every_thread_has_as_many() {
        for (n, threads) in [(0, 4), (1, 4), (18, 4), (1536, 3), (7, 1)] {
            let pieces = shrinking(n, threads);
            assert_eq!(pieces.len(), threads * PIECES);
            assert!(pieces.iter().flat_map(|piece| piece.clone()).eq(0..n));
        }
        assert_eq!(shrinking(48, 2)[..5], [0..12, 12..18, 18..21, 21..24, 24..36]);
    }

    #[test]
    fn a_thread_that_is_late_is_helped() {
        let (here, there) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let caller = std::thread::current().id();
        let work = |(): &mut (), _| {
            if std::thread::current().id() == caller {
                here.fetch_add(1, Ordering::Relaxed);
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
            there.fetch_add(1, Ordering::Relaxed);
        };
        for_each_index(500, || (), work);
        let (here, there) = (here.into_inner(), there.into_inner());
        assert!(here + there == 500 && here > 250, "{here} {there}");
    }

    #[test]
    fn small_work_is_one_task() {
        assert_eq!(task_count(1000, 4), 1);
        assert_eq!((task_len(1), task_len(576), task_len(100_000)), (1 << 14, 28 * 576, 100_000));
    }

    #[test]
    fn every_item_is_worked_on_once() {
        for n in [0, 1, 2, 100] {
            let mut done = vec![0; n];
            for_each(done.iter_mut(), |item| *item += 1);
            assert_eq!(done, vec![1; n]);
            assert_eq!(map(0..n, |i| i * i), (0..n).map(|i| i * i).collect::<Vec<_>>());
        }
    }
}
