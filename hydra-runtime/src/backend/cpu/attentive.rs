//! Threads that stay awake while an operation runs.
//!
//! A pass over a model is hundreds of short operations, each split among the pool's threads. A thread that finds nothing to do
//! goes to sleep, and waking it takes longer than a small operation. So while one is under way all others look for work
//! without pause; each gives its core up now and then, so that other programs' work goes on.

use rayon::ThreadPool;
use std::sync::atomic::{AtomicBool, Ordering};

/// Looks for work between two times that the core is given up: some tens of microseconds.
const LOOKS: usize = 256;

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
            let done = AtomicBool::new(false);
            rayon::scope(|scope| {
                scope.spawn_broadcast(|_, thread| {
                    if Some(thread.index()) != here {
                        attend(&done);
                    }
                });
                // Also if `op` panics: the scope waits for all of them.
                let _done = OnDrop(|| done.store(true, Ordering::Release));
                op()
            })
        })
    }
}

fn attend(done: &AtomicBool) {
    let mut looks = 0;
    while !done.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            looks = 0;
            continue;
        }
        looks += 1;
        if looks % LOOKS == 0 {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
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
