//! Threads that stay awake between kernels.
//!
//! A decode pass runs hundreds of kernels of some ten microseconds each. A thread that sleeps in
//! between has to be woken by the system every time, which takes as long as the kernel; so the
//! threads of the team look for the next job for a while before they go to sleep.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};

/// How often a thread looks for a job before it sleeps: some hundred microseconds.
const LOOKS: u32 = 10_000;
/// How often the caller looks whether the others are done before it lets other threads run.
const WAITS: u32 = 10_000;

/// Set in the state while threads may join the job.
const OPEN: u64 = 1 << 31;
/// The part of the state that counts the threads inside the job; above `OPEN` is its number.
const INSIDE: u64 = OPEN - 1;

type Work<'a> = dyn Fn(usize) + Sync + 'a;
type Job = *const Work<'static>;

/// What the caller and the team share.
struct Shared {
    state: AtomicU64,
    asleep: AtomicUsize,
    panicked: AtomicBool,
    job: UnsafeCell<Option<Job>>,
}

// SAFETY: the job is written only while it is closed and no thread is inside, and read only by
// threads that have joined it while it was open.
unsafe impl Sync for Shared {}
// SAFETY: as above; the job itself may be called from any thread.
unsafe impl Send for Shared {}

/// The threads beside the calling one.
struct Team {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    busy: Mutex<()>,
}

/// Calls `job` on this thread and, while it runs, once on every thread of the team that is free, with
/// the thread's number: 0 for this one. All together they are as many as the rayon pool of the first
/// call has.
///
/// If the team is at work for another thread, or if this is one of its threads, `job` runs here
/// alone. `job` therefore has to take its work from what all calls of it share.
///
/// # Panics
/// If a call panics.
pub(super) fn share(job: &Work) {
    static TEAM: OnceLock<Team> = OnceLock::new();
    TEAM.get_or_init(|| Team::new(rayon::current_num_threads() - 1)).share(job);
}

impl Team {
    fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            asleep: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            job: UnsafeCell::new(None),
        });
        let spawn = |i: usize| {
            let shared = shared.clone();
            let thread = thread::Builder::new().name(format!("kernels-{i}"));
            thread.spawn(move || shared.serve(i + 1)).ok().map(|handle| handle.thread().clone())
        };
        let threads = (0..threads).filter_map(spawn).collect();
        Team { shared, threads, busy: Mutex::new(()) }
    }

    fn share(&self, job: &Work) {
        let _busy = match self.busy.try_lock() {
            Ok(busy) => busy,
            // a job that panicked is closed and empty like any other
            Err(TryLockError::Poisoned(busy)) => busy.into_inner(),
            Err(TryLockError::WouldBlock) => return job(0),
        };
        let shared = &*self.shared;
        shared.panicked.store(false, Ordering::Relaxed);
        // SAFETY: `Closing` ends the job before the borrow does, by waiting for all who joined.
        let job_for_ever: Job = unsafe { std::mem::transmute::<&Work, Job>(job) };
        // SAFETY: the last job is closed and empty, so nobody reads.
        unsafe { *shared.job.get() = Some(job_for_ever) };
        let number = (shared.state.load(Ordering::Relaxed) >> 32) + 1;
        shared.state.store(number << 32 | OPEN, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            self.threads.iter().for_each(Thread::unpark);
        }
        let closing = Closing(shared);
        job(0);
        drop(closing);
        assert!(!shared.panicked.load(Ordering::Relaxed), "a task of a kernel panicked");
    }
}

/// Closes the job when dropped, be it by a panic, and waits for those inside.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let state = &self.0.state;
        state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut waits = 0;
        while state.load(Ordering::Acquire) & INSIDE != 0 {
            waits += 1;
            match waits < WAITS {
                true => std::hint::spin_loop(),
                false => thread::yield_now(),
            }
        }
    }
}

impl Shared {
    /// The life of a thread of the team.
    fn serve(&self, thread: usize) {
        let (mut last, mut looks) = (0, 0);
        loop {
            if let Some(number) = self.join(last, thread) {
                (last, looks) = (number, 0);
            } else if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else {
                self.sleep(last);
                looks = 0;
            }
        }
    }

    /// Takes part in the job if it is open and not number `last`; returns its number.
    fn join(&self, last: u64, thread: usize) -> Option<u64> {
        let state = self.state.load(Ordering::Acquire);
        if state & OPEN == 0 || state >> 32 == last {
            return None;
        }
        let joined =
            self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
        joined.ok()?;
        // SAFETY: the job is open or waits for this thread to leave.
        if let Some(job) = unsafe { *self.job.get() } {
            // SAFETY: as above.
            let call = AssertUnwindSafe(|| unsafe { (*job)(thread) });
            if catch_unwind(call).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
        self.state.fetch_sub(1, Ordering::Release);
        Some(state >> 32)
    }

    /// Sleeps until there is a job other than number `last`.
    fn sleep(&self, last: u64) {
        self.asleep.fetch_add(1, Ordering::SeqCst);
        let state = self.state.load(Ordering::SeqCst);
        if state & OPEN == 0 || state >> 32 == last {
            thread::park();
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::time::Duration;

    fn sum_on(team: &Team, n: usize) -> usize {
        let (next, sum) = (AtomicUsize::new(0), AtomicUsize::new(0));
        team.share(&|_| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= n {
                    return;
                }
                sum.fetch_add(i, Ordering::Relaxed);
            }
        });
        sum.into_inner()
    }

    #[test]
    fn work_is_done_once_and_before_the_call_returns() {
        let team = Team::new(3);
        for n in 0..5000 {
            assert_eq!(sum_on(&team, n % 40), (0..n % 40).sum::<usize>());
            if n % 1000 == 0 {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn callers_at_once_and_calls_inside_of_calls_do_not_block() {
        let team = Team::new(2);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| assert_eq!(sum_on(&team, 30), 435)));
            }
        });
        team.share(&|_| assert_eq!(sum_on(&team, 30), 435));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2);
        let caller = thread::current().id();
        let other = |_| {
            if thread::current().id() != caller {
                panic!("of a task");
            }
            thread::sleep(Duration::from_millis(20));
        };
        assert!(catch_unwind(AssertUnwindSafe(|| team.share(&other))).is_err());
        assert!(catch_unwind(AssertUnwindSafe(|| team.share(&|_| panic!("of all")))).is_err());
        let callers = Mutex::new(HashSet::new());
        while callers.lock().unwrap().len() < 2 {
            team.share(&|_| {
                callers.lock().unwrap().insert(thread::current().id());
                thread::sleep(Duration::from_millis(1));
            });
        }
    }
}
