//! Threads that stay awake while an operation runs.
//!
//! A pass over a model is hundreds of short operations, each split among the pool's threads. A thread that finds nothing to do
//! goes to sleep, and waking it takes longer than a small operation. So while one is under way all others look for work
//! without pause; each gives its core up now and then, so that other programs' work goes on.
//!
//! Looking for work never ends before the operation does. So it must not begin on top of a part of it, as it could on a thread that
//! took such a part first and looks at its own queue while it waits for another: the operation would wait for that part, and the
//! part for the end of the operation. Only threads that are there before the operation begins take part.

use rayon::ThreadPool;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Looks for work between two times that the core is given up: some tens of microseconds.
const LOOKS: usize = 256;
/// How long an operation waits for threads to wake, which takes a quarter of that where cores are free.
const PATIENCE: Duration = Duration::from_micros(200);

/// Whether somebody keeps the threads awake.
#[derive(Default)]
pub(super) struct Attentive(AtomicBool);

impl Attentive {
    /// Runs `op` on one of the pool's threads, with the others awake. One `op` at a time has them so: of two, each might wait
    /// on a thread that attends the other.
    pub fn run<R: Send>(&self, pool: &ThreadPool, op: impl FnOnce() -> R + Send) -> R {
        if pool.current_num_threads() == 1 || self.0.swap(true, Ordering::Acquire) {
            return pool.install(op);
        }
        let _released = OnDrop(|| self.0.store(false, Ordering::Release));
        pool.install(|| {
            let here = rayon::current_thread_index();
            let watch = Watch::default();
            rayon::scope(|scope| {
                scope.spawn_broadcast(|_, thread| {
                    if Some(thread.index()) != here {
                        watch.attend();
                    }
                });
                // Also if `op` panics: the scope waits for all of them.
                let _done = OnDrop(|| watch.done.store(true, Ordering::Release));
                watch.begin(pool.current_num_threads() - 1);
                op()
            })
        })
    }
}

/// How far an operation is.
#[derive(Default)]
struct Watch {
    /// Threads that attend.
    awake: AtomicUsize,
    begun: AtomicBool,
    done: AtomicBool,
}

impl Watch {
    /// Waits a little for so many threads. Who comes later comes too late.
    fn begin(&self, others: usize) {
        let (mut looks, started) = (0, Instant::now());
        while self.awake.load(Ordering::Acquire) < others {
            looks += 1;
            pause(looks);
            if looks.is_multiple_of(LOOKS) && started.elapsed() > PATIENCE {
                break;
            }
        }
        // Whoever takes a part of the operation has seen this.
        self.begun.store(true, Ordering::Release);
    }

    /// Does the pool's work until the operation is done.
    fn attend(&self) {
        // What is beneath on this thread's stack was there before; so if this isn't set, no part of the operation is.
        if self.begun.load(Ordering::Acquire) {
            return;
        }
        self.awake.fetch_add(1, Ordering::Release);
        let mut looks = 0;
        while !self.done.load(Ordering::Acquire) {
            if rayon::yield_now() == Some(rayon::Yield::Executed) {
                looks = 0;
                continue;
            }
            looks += 1;
            pause(looks);
        }
    }
}

/// Between two looks; now and then it gives the core up.
fn pause(looks: usize) {
    if looks.is_multiple_of(LOOKS) { std::thread::yield_now() } else { std::hint::spin_loop() }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::ThreadPoolBuilder;
    use rayon::prelude::*;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn work_is_shared_and_results_come_back() {
        for threads in [1, 2, 3, 8] {
            let (pool, attentive) = (pool(threads), Attentive::default());
            for n in 0..50u64 {
                let sum = attentive.run(&pool, || (0..n).into_par_iter().map(|x| x * x).sum::<u64>());
                assert_eq!(sum, (0..n).map(|x| x * x).sum::<u64>());
            }
        }
    }

    /// Else it would wait for the operation on top of a part of it: for ever.
    #[test]
    fn nobody_attends_who_comes_after_the_beginning() {
        let watch = Watch::default();
        watch.begin(0);
        watch.attend();
        assert_eq!(watch.awake.into_inner(), 0);
        // Nor does the operation wait for ever for who doesn't come.
        Watch::default().begin(1);
    }

    /// More threads than cores, and parts that wait for parts: of operations that began at once, with latecomers attending, one in
    /// some two thousand never ended.
    #[test]
    fn parts_that_wait_for_parts_end() {
        let (pool, attentive) = (pool(4), Attentive::default());
        let busy = |x: u32| {
            (0..200u64).fold(u64::from(x), |x, i| x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(i)) & 1
        };
        let inner = |i: u32| (0..8).into_par_iter().with_max_len(1).map(|j| busy(i ^ j)).sum::<u64>();
        let outer = || (0..6).into_par_iter().with_max_len(1).map(inner).sum::<u64>();
        let want = attentive.run(&pool, outer);
        for _ in 0..8000 {
            assert_eq!(attentive.run(&pool, outer), want);
        }
    }

    /// From several threads at once, and one inside another.
    #[test]
    fn many_at_once_end() {
        let (pool, attentive) = (pool(3), Attentive::default());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let inner = || attentive.run(&pool, || (0..64u64).into_par_iter().sum::<u64>());
                        assert_eq!(attentive.run(&pool, inner), 2016);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_passes_and_the_threads_rest() {
        let (pool, attentive) = (pool(2), Attentive::default());
        let panics = || attentive.run(&pool, || (0..8).into_par_iter().for_each(|i| assert!(i < 4, "expected")));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
        assert_eq!(attentive.run(&pool, || 7), 7);
    }
}
