//! Ranks over MPI, by way of `mpi.c`.

use anyhow::{Result, bail};
use hydra_runtime::communicator::Communicator;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

unsafe extern "C" {
    fn hydra_mpi_start(place: *mut c_int) -> c_int;
    fn hydra_mpi_end();
    fn hydra_mpi_abort(code: c_int);
    fn hydra_mpi_send(bytes: *const c_void, count: c_int, to: c_int);
    fn hydra_mpi_receive(bytes: *mut c_void, count: c_int, from: c_int);
    fn hydra_mpi_broadcast(bytes: *mut c_void, count: c_int);
    fn hydra_mpi_all_gather(own: *const c_void, count: c_int, all: *mut c_void);
}

/// The most bytes of one call, which counts in 32 bits.
const MOST: usize = 1 << 30;

/// All ranks. MPI ends when it is dropped.
pub struct World {
    /// Held during a call: threads take turns.
    turn: Mutex<()>,
    rank: usize,
    size: usize,
}

impl World {
    /// Starts MPI, once in a process. With it come, among the ranks of this machine, this one's number and how many there are.
    pub fn join() -> Result<(Self, (usize, usize))> {
        let mut place = [0; 4];
        // SAFETY: `place` has room for the four numbers; `Ranks::join` is called once, by the command.
        let threads = unsafe { hydra_mpi_start(place.as_mut_ptr()) };
        let [rank, size, own, machine] = place.map(|number| number as usize);
        let world = Self { turn: Mutex::new(()), rank, size };
        if threads == 0 {
            bail!("this MPI doesn't let threads take turns: expected MPI_THREAD_SERIALIZED or more");
        }
        Ok((world, (own, machine)))
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: MPI was started, and nobody can call it any more.
        unsafe { hydra_mpi_end() }
    }
}

/// Ends all ranks.
pub fn abort(code: i32) {
    // SAFETY: it is called by a `Ranks` that has a `World`.
    unsafe { hydra_mpi_abort(code) }
}

impl Communicator for World {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&self, to: usize, bytes: &[u8]) -> hydra_runtime::Result<()> {
        let _turn = self.turn();
        for part in bytes.chunks(MOST) {
            // SAFETY: MPI has been started, and reads the part before it returns.
            unsafe { hydra_mpi_send(part.as_ptr().cast(), part.len() as c_int, to as c_int) }
        }
        Ok(())
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> hydra_runtime::Result<()> {
        let _turn = self.turn();
        for part in bytes.chunks_mut(MOST) {
            // SAFETY: as in `send`; a longer message is an error, which ends all ranks.
            unsafe { hydra_mpi_receive(part.as_mut_ptr().cast(), part.len() as c_int, from as c_int) }
        }
        Ok(())
    }

    fn broadcast(&self, bytes: &mut [u8]) -> hydra_runtime::Result<()> {
        let _turn = self.turn();
        for part in bytes.chunks_mut(MOST) {
            // SAFETY: as in `receive`.
            unsafe { hydra_mpi_broadcast(part.as_mut_ptr().cast(), part.len() as c_int) }
        }
        Ok(())
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> hydra_runtime::Result<()> {
        assert!(own.len() <= MOST && all.len() == self.size * own.len(), "room for every rank's bytes");
        let _turn = self.turn();
        // SAFETY: MPI has been started; the lengths have been checked.
        unsafe { hydra_mpi_all_gather(own.as_ptr().cast(), own.len() as c_int, all.as_mut_ptr().cast()) }
        Ok(())
    }
}
