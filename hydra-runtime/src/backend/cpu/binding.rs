//! Each thread on a CPU of its own, if the process may use exactly one for each (OpenMP's `OMP_PROC_BIND`).
//!
//! Threads that wait for one another sleep and wake often. Beside another busy program, Linux then tends to leave two of
//! them on one CPU, where they alternate, and the other CPU to that program, even to one of a low priority. Bound
//! threads don't move, so the other program gets no more than its share.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The CPUs of a pool's threads.
pub(super) struct Binding {
    /// The calling thread's, then one for each worker.
    cpus: Vec<usize>,
    /// Whether a calling thread is bound now.
    caller: AtomicBool,
}

impl Binding {
    /// A CPU for each of `threads`, or `None` if the process may use more or fewer than that.
    pub fn new(threads: usize) -> Option<Self> {
        let cpus = system::cpus()?;
        (threads > 1 && cpus.len() == threads).then(|| Self { cpus, caller: AtomicBool::new(false) })
    }

    /// Binds the calling thread, which is worker `index`, for good.
    pub fn bind_worker(&self, index: usize) {
        system::bind(self.cpus[index + 1]);
    }

    /// Binds the calling thread until the guard is dropped. Of several threads that call at once only the first is bound.
    pub fn bind_caller(self: &Arc<Self>) -> Option<Bound> {
        if self.caller.swap(true, Ordering::Acquire) {
            return None;
        }
        let before = system::bind(self.cpus[0]);
        Some(Bound { binding: self.clone(), before, this_thread: PhantomData })
    }
}

/// While it lives, the thread that it was made on stays on one CPU.
pub struct Bound {
    binding: Arc<Binding>,
    before: Option<system::Cpus>,
    this_thread: PhantomData<*const ()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            system::restore(before);
        }
        self.binding.caller.store(false, Ordering::Release);
    }
}

#[cfg(target_os = "linux")]
pub(super) mod system {
    pub use rustix::thread::CpuSet as Cpus;
    use rustix::thread::{sched_getaffinity, sched_setaffinity};

    /// The CPUs that the calling thread may use, if the system can tell.
    pub fn cpus() -> Option<Vec<usize>> {
        let set = sched_getaffinity(None).ok()?;
        Some((0..Cpus::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
    }

    /// Binds the calling thread. Returns the CPUs that it could use before, or `None` if it stays as it was.
    pub fn bind(cpu: usize) -> Option<Cpus> {
        let before = sched_getaffinity(None).ok()?;
        let mut one = Cpus::new();
        one.set(cpu);
        sched_setaffinity(None, &one).ok()?;
        Some(before)
    }

    /// Lets the calling thread use these CPUs again. If the system refuses, the thread stays bound, which is only slower.
    pub fn restore(cpus: &Cpus) {
        let _ = sched_setaffinity(None, cpus);
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) mod system {
    /// Never made: threads aren't bound here.
    pub enum Cpus {}

    pub fn cpus() -> Option<Vec<usize>> {
        None
    }

    pub fn bind(_cpu: usize) -> Option<Cpus> {
        None
    }

    pub fn restore(_cpus: &Cpus) {}
}
