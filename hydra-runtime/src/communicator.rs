//! Several processes that work on one thing, each called a rank, and what they say to each other.
//!
//! This crate knows no network: a program implements [`Communicator`] over one, `hydra` over MPI.

use crate::{Error, Result};
use std::ops::Range;

/// One rank's way to the others. Every rank makes the same calls in the same order, on its side of each message.
///
/// A rank that fails between two calls leaves the others waiting. The program has to end them, as `MPI_Abort` does.
pub trait Communicator: Send + Sync {
    /// This rank's number, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Sends a message to another rank. May return before it is received, or not. Messages arrive in their order.
    fn send(&self, to: usize, bytes: &[u8]) -> Result<()>;
    /// Receives a message of another rank, which has the length of `bytes`.
    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<()>;

    /// Gives every rank the bytes of rank 0. Networks know faster ways than this one, a message to each rank in turn.
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        match self.rank() {
            0 => (1..self.size()).try_for_each(|to| self.send(to, bytes)),
            _ => self.receive(0, bytes),
        }
    }

    /// Gives every rank the bytes of all, in the order of their numbers: `all` is `size` times as long as `own`.
    /// Networks know faster ways than this one, by way of rank 0.
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        let (rank, len) = (self.rank(), own.len());
        assert_eq!(all.len(), self.size() * len, "room for every rank's bytes");
        all[rank * len..][..len].copy_from_slice(own);
        match rank {
            0 => (1..self.size()).try_for_each(|from| self.receive(from, &mut all[from * len..][..len]))?,
            _ => self.send(0, own)?,
        }
        self.broadcast(all)
    }
}

/// A single process, which has no one to speak to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn send(&self, to: usize, _: &[u8]) -> Result<()> {
        Err(Error::Invalid(format!("a message to rank {to} of 1")))
    }

    fn receive(&self, from: usize, _: &mut [u8]) -> Result<()> {
        Err(Error::Invalid(format!("a message from rank {from} of 1")))
    }
}

/// The items, of `items`, that one of `ranks` works on: contiguous, in the ranks' order, and as many as any other's,
/// but for one. The first is rank 0's.
pub fn share(items: usize, ranks: usize, rank: usize) -> Range<usize> {
    let start = |rank: usize| (rank as u128 * items as u128).div_ceil(ranks as u128) as usize;
    start(rank)..start(rank + 1)
}
