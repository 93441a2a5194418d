//! The CPU backend's threads: they share out the parts of one operation after another.
//!
//! An operation on a few tokens takes microseconds, and a pass over a model is hundreds of operations, so a thread that has
//! run out of parts first looks for more without giving up its core ([`SPIN`]), which is faster than being woken. Then it
//! sleeps, so that its core is free for other programs. No thread ever calls `sched_yield`: a thread that yields while another
//! program is busy loses its time slice, and the threads that wait for it lose theirs.
//!
//! The caller works too. Parts are handed out one at a time, in order, to whichever thread asks next, so a thread that the
//! system has put aside delays only the part that it holds. What a part computes must not depend on who runs it.
//!
//! Several callers may use the same threads at once, and a part may itself share out parts: a caller first runs all parts that
//! nobody has taken, and then waits only for parts that are already running. (rayon's pool, which this replaces, yields while
//! it looks for work.)

use super::binding::{Binding, Bound};
use crate::{Error, Result};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for work, or a caller for the end of the last parts, before it sleeps: a few times what waking
/// takes.
const SPIN: Duration = Duration::from_micros(100);

/// Pauses between two looks at the clock.
const PAUSES: usize = 64;

/// A fixed number of threads, the caller's among them.
pub(super) struct Threads {
    shared: Arc<Shared>,
    binding: Option<Arc<Binding>>,
    workers: Vec<JoinHandle<()>>,
}

/// What the workers and their callers have in common.
#[derive(Default)]
struct Shared {
    board: Mutex<Board>,
    /// Wakes workers when a job is offered or the threads end.
    changed: Condvar,
    /// Jobs offered so far: what an idle worker watches without taking the lock.
    offered: AtomicUsize,
}

/// Jobs that have seats left.
#[derive(Default)]
struct Board {
    open: Vec<(Arc<Job>, usize)>,
    asleep: usize,
    stop: bool,
}

/// One call of [`Threads::each`].
struct Job {
    /// Runs parts until none are left. The closure lives on the caller's stack; see [`Job::work`].
    run: *const (dyn Fn() + Sync),
    /// Workers that may be inside `run`.
    inside: AtomicUsize,
    /// Whether there are no parts left to hand out.
    exhausted: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

// SAFETY: `run` points to a `Sync` closure; the other fields are `Send` and `Sync` themselves.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

thread_local! {
    /// Which worker this thread is, and of which pool (the address of its `Shared`).
    static WORKER: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

impl Threads {
    /// Starts `count - 1` workers, which the calling threads join. With `bind` each has a CPU of its own, if the process may
    /// use `count` of them. Fails if the system can't start that many.
    pub fn new(count: usize, bind: bool) -> Result<Self> {
        let binding = bind.then(|| Binding::new(count)).flatten().map(Arc::new);
        let mut threads = Self { shared: Arc::default(), binding, workers: Vec::new() };
        for index in 0..count.saturating_sub(1) {
            let (shared, binding) = (Arc::clone(&threads.shared), threads.binding.clone());
            let builder = std::thread::Builder::new().name(format!("hydra-{index}"));
            let worker = builder
                .spawn(move || {
                    if let Some(binding) = binding {
                        binding.bind_worker(index);
                    }
                    shared.work(index);
                })
                .map_err(|error| Error::Invalid(format!("can't start {count} threads: {error}")))?;
            threads.workers.push(worker);
        }
        Ok(threads)
    }

    /// Number of threads that work on an operation.
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Binds the calling thread, too, until the guard is dropped.
    pub fn bind_caller(&self) -> Option<Bound> {
        self.binding.as_ref()?.bind_caller()
    }

    /// Which of the workers, from 0, the calling thread is; `None` for all other threads.
    pub fn worker(&self) -> Option<usize> {
        let (pool, index) = WORKER.get();
        (pool == Arc::as_ptr(&self.shared).addr()).then_some(index)
    }

    /// Calls `part` with each of `parts` and its index, on all threads, and returns when all calls have ended.
    ///
    /// A single part runs on the calling thread. After an error no further parts are begun; of several errors that with the
    /// lowest index is returned. A panic in a part is passed on.
    pub fn each<I>(&self, parts: I, part: impl Fn(usize, I::Item) -> Result<()> + Sync) -> Result<()>
    where
        I: ExactSizeIterator + Send,
        I::Item: Send,
    {
        let count = parts.len();
        let mut parts = parts.enumerate();
        if count <= 1 || self.workers.is_empty() {
            return parts.try_for_each(|(i, item)| part(i, item));
        }
        let parts = Mutex::new(parts);
        let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        self.shared.share(count - 1, &|| {
            loop {
                // The lock is released before the part runs.
                let next = lock(&parts).next();
                let Some((i, item)) = next else { return };
                if let Err(error) = part(i, item) {
                    let mut failed = lock(&failed);
                    if failed.as_ref().is_none_or(|(first, _)| i < *first) {
                        *failed = Some((i, error));
                    }
                    while lock(&parts).next().is_some() {}
                }
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.board).stop = true;
        self.shared.offered.fetch_add(1, Ordering::Release);
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // A worker doesn't panic: it catches what its parts raise.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Runs `run` here and on up to `seats` workers, and returns when all of these calls have ended. `run` returns when there
    /// is nothing left to do.
    fn share(&self, seats: usize, run: &(dyn Fn() + Sync)) {
        // SAFETY: only the lifetime changes. `run` outlives every use of the pointer: a worker enters `run` only after it has
        // counted itself in `inside` while the job was on the board, and this function returns only after it has taken the job
        // off the board and `inside` has come back to zero. Nothing in between unwinds.
        let run: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(run) };
        let job = Arc::new(Job {
            run,
            inside: AtomicUsize::new(0),
            exhausted: AtomicBool::new(false),
            panic: Mutex::new(None),
            caller: std::thread::current(),
        });
        self.offer(&job, seats);
        let outcome = catch_unwind(AssertUnwindSafe(run));
        lock(&self.board).open.retain(|(open, _)| !Arc::ptr_eq(open, &job));
        if !spin_until(|| job.inside.load(Ordering::Acquire) == 0) {
            while job.inside.load(Ordering::Acquire) > 0 {
                std::thread::park();
            }
        }
        let panic = outcome.err().or_else(|| lock(&job.panic).take());
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    fn offer(&self, job: &Arc<Job>, seats: usize) {
        let mut board = lock(&self.board);
        board.open.push((Arc::clone(job), seats));
        self.offered.fetch_add(1, Ordering::Release);
        let asleep = board.asleep;
        drop(board);
        if asleep <= seats {
            if asleep > 0 {
                self.changed.notify_all();
            }
        } else {
            (0..seats).for_each(|_| self.changed.notify_one());
        }
    }

    /// A worker's life: take a seat, work, look for the next.
    fn work(self: Arc<Self>, index: usize) {
        WORKER.set((Arc::as_ptr(&self).addr(), index));
        loop {
            let offered = self.offered.load(Ordering::Acquire);
            let job = lock(&self.board).seat();
            if let Some(job) = job {
                job.work();
                continue;
            }
            if spin_until(|| self.offered.load(Ordering::Acquire) != offered) {
                if lock(&self.board).stop {
                    return;
                }
                continue;
            }
            let mut board = lock(&self.board);
            while !board.stop && self.offered.load(Ordering::Acquire) == offered {
                board.asleep += 1;
                board = self.changed.wait(board).unwrap_or_else(PoisonError::into_inner);
                board.asleep -= 1;
            }
            if board.stop {
                return;
            }
        }
    }
}

impl Board {
    /// A seat at the oldest job that has work left.
    fn seat(&mut self) -> Option<Arc<Job>> {
        self.open.retain(|(job, seats)| *seats > 0 && !job.exhausted.load(Ordering::Relaxed));
        let (job, seats) = self.open.first_mut()?;
        *seats -= 1;
        job.inside.fetch_add(1, Ordering::Relaxed);
        Some(Arc::clone(job))
    }
}

impl Job {
    /// Works on a job in whose `inside` this worker has been counted.
    fn work(&self) {
        // SAFETY: this worker is counted in `inside`, so `Shared::share` has not returned and its closure is alive.
        let run = unsafe { &*self.run };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            *lock(&self.panic) = Some(panic);
        }
        self.exhausted.store(true, Ordering::Relaxed);
        // The last to leave wakes the caller, if it sleeps. From here on the closure may be gone.
        if self.inside.fetch_sub(1, Ordering::Release) == 1 {
            self.caller.unpark();
        }
    }
}

/// Whether `done` came true within [`SPIN`].
fn spin_until(done: impl Fn() -> bool) -> bool {
    let mut started = None;
    loop {
        for _ in 0..PAUSES {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if started.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return false;
        }
    }
}

/// Locks a mutex whose content is valid even if a thread panicked while it held the lock.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(threads: &Threads, count: u64) -> u64 {
        let sum = AtomicUsize::new(0);
        let add = |i, x: u64| {
            assert_eq!(i as u64, x);
            sum.fetch_add((x * x) as usize, Ordering::Relaxed);
            Ok(())
        };
        threads.each((0..count).collect::<Vec<_>>().into_iter(), add).unwrap();
        sum.into_inner() as u64
    }

    #[test]
    fn every_part_runs_once() {
        for count in [1, 2, 3, 8] {
            let threads = Threads::new(count, false).unwrap();
            assert_eq!(threads.count(), count);
            assert_eq!(threads.worker(), None);
            for n in 0..100u64 {
                assert_eq!(numbers(&threads, n), (0..n).map(|x| x * x).sum::<u64>());
            }
        }
    }

    /// Both threads take part even if both have gone to sleep before.
    #[test]
    fn work_is_shared() {
        let threads = Threads::new(2, false).unwrap();
        for pause in [Duration::ZERO, 10 * SPIN] {
            std::thread::sleep(pause);
            let barrier = std::sync::Barrier::new(2);
            let part = |_, _| {
                barrier.wait();
                Ok(())
            };
            threads.each(0..2, part).unwrap();
        }
    }

    #[test]
    fn the_first_error_is_returned_and_ends_the_operation() {
        let threads = Threads::new(3, false).unwrap();
        let ran = AtomicUsize::new(0);
        let part = |i: usize, _| {
            ran.fetch_add(1, Ordering::Relaxed);
            if i % 2 == 1 { Err(Error::Invalid(i.to_string())) } else { Ok(()) }
        };
        let error = threads.each(0..1_000_000, part).unwrap_err();
        assert_eq!(error.to_string(), Error::Invalid("1".into()).to_string());
        assert!(ran.into_inner() < 1_000_000);
    }

    /// More threads than cores, several callers, and parts that share out parts.
    #[test]
    fn callers_and_parts_nest() {
        let threads = Threads::new(4, false).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let total = AtomicUsize::new(0);
                        let outer = |_, _| {
                            total.fetch_add(numbers(&threads, 20) as usize, Ordering::Relaxed);
                            Ok(())
                        };
                        threads.each(0..6, outer).unwrap();
                        assert_eq!(total.into_inner(), 6 * 2470);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_is_passed_on_and_the_threads_stay_usable() {
        let threads = Threads::new(2, false).unwrap();
        for panics_at in 0..4 {
            let part = |i: usize, _| {
                assert!(i != panics_at, "expected");
                Ok(())
            };
            assert!(catch_unwind(AssertUnwindSafe(|| threads.each(0..8, part))).is_err());
            assert_eq!(numbers(&threads, 5), 30);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn threads_have_cpus_of_their_own_until_the_guard_is_dropped() {
        use super::super::binding::system::cpus;
        let all = cpus().unwrap();
        let count = all.len();
        assert!(Binding::new(1).is_none());
        assert!(Binding::new(count + 1).is_none());
        let threads = Threads::new(count, true).unwrap();
        let Some(bound) = threads.bind_caller() else {
            assert_eq!(count, 1);
            return;
        };
        assert!(threads.bind_caller().is_none(), "one thread at a time");
        let (barrier, used) = (std::sync::Barrier::new(count), Mutex::new(Vec::new()));
        let part = |_, _| {
            barrier.wait();
            lock(&used).push(cpus().unwrap());
            Ok(())
        };
        threads.each(0..count, part).unwrap();
        let mut used = used.into_inner().unwrap();
        used.sort();
        assert_eq!(used, all.iter().map(|&cpu| vec![cpu]).collect::<Vec<_>>());
        drop(bound);
        assert_eq!(cpus().unwrap(), all);
        assert!(threads.bind_caller().is_some());
    }
}
