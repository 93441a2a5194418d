//! The sum of a step's gradients over its passes, in an order that depends on their number alone:
//!
//! ```text
//! sum(p .. p + 1) = the gradient of pass p
//! sum(p .. q)     = sum(p .. m) + sum(m .. q),   m − p the largest power of two below q − p
//! ```
//! A rank computes the passes of its [`share`]. Each sum is formed on the rank of its first pass; another rank's part of it comes as
//! a message. So a step has the same bits on any number of ranks. n passes take ⌊log₂ n⌋ buffers besides that of the result.

use super::Trainer;
use crate::Result;
use crate::adapter::device::Training;
use crate::backend::Backend;
use crate::batch::Packed;
use crate::communicator::{Communicator, share};
use crate::model::{Cached, Pass};
use hydra_kernels::random::mix;
use std::ops::Range;

/// A step's passes.
pub(super) struct Passes<'s> {
    /// What each takes.
    pub packs: &'s [Packed],
    /// Tokens of all.
    pub tokens: usize,
    /// Targets of all.
    pub targets: usize,
    /// Seeds a training step's dropout.
    pub seed: Option<u64>,
}

/// Buffers that the sum of `passes` gradients takes besides the result's.
pub(super) fn buffers(passes: usize) -> usize {
    passes.checked_ilog2().unwrap_or(0) as usize
}

/// The first pass of the second part of a sum over more than one.
fn middle(passes: &Range<usize>) -> usize {
    passes.start + passes.len().next_power_of_two() / 2
}

/// The rank whose share a pass is in.
fn owner(pass: usize, passes: usize, ranks: usize) -> usize {
    (pass as u128 * ranks as u128 / passes as u128) as usize
}

/// A sum that is under way.
struct Sum<'s> {
    passes: &'s Passes<'s>,
    /// This rank's passes.
    own: Range<usize>,
    /// The loss of each of them, summed over its targets.
    losses: Vec<f64>,
    /// Tokens that have gone through the model.
    done: usize,
}

impl<B: Backend> Trainer<B> {
    /// The gradient of a step's loss, in `self.sums[0]` of every rank. Returns the loss, summed over the targets.
    pub(super) fn sum_gradients(&mut self, passes: &Passes<'_>) -> Result<f64> {
        let (count, ranks, rank) = (passes.packs.len(), self.ranks.size(), self.ranks.rank());
        self.reserve_sums(count)?;
        let mut sum = Sum { passes, own: share(count, ranks, rank), losses: Vec::new(), done: 0 };
        self.sum_part(&mut sum, 0..count, 0)?;
        if ranks == 1 {
            return Ok(sum.losses.iter().sum());
        }
        broadcast(&*self.ranks, self.model.backend(), &mut self.message, (&mut self.sums[0], self.adapter.slots.len))?;
        self.sum_losses(&sum.losses, count)
    }

    /// Allocates what steps of this many passes take.
    pub(super) fn reserve_sums(&mut self, passes: usize) -> Result<()> {
        while self.sums.len() <= buffers(passes) {
            self.sums.push(self.model.backend().buffer(self.adapter.slots.len)?);
        }
        Ok(())
    }

    /// The sum of `part`, in `self.sums[place]` of its first pass's rank. Later buffers are overwritten.
    fn sum_part(&mut self, sum: &mut Sum<'_>, part: Range<usize>, place: usize) -> Result<()> {
        if part.start >= sum.own.end || sum.own.start >= part.end {
            return Ok(());
        }
        if part.len() == 1 {
            return self.pass_gradient(sum, part.start, place);
        }
        let (middle, count, rank) = (middle(&part), sum.passes.packs.len(), self.ranks.rank());
        let [first, second] = [part.start, middle].map(|pass| owner(pass, count, self.ranks.size()));
        self.sum_part(sum, part.start..middle, place)?;
        self.sum_part(sum, middle..part.end, if first == rank { place + 1 } else { place })?;
        if first == rank {
            if second != rank {
                self.receive(second, place + 1)?;
            }
            let (sums, added) = self.sums.split_at_mut(place + 1);
            return self.model.backend().add(&mut sums[place], &added[0], self.adapter.slots.len);
        }
        if second == rank { self.send(first, place) } else { Ok(()) }
    }

    /// The gradient of one pass, in `self.sums[place]`.
    fn pass_gradient(&mut self, sum: &mut Sum<'_>, i: usize, place: usize) -> Result<()> {
        let &Passes { packs, tokens, targets, seed } = sum.passes;
        let (packed, grads) = (&packs[i], &mut self.sums[place]);
        let pass = Pass {
            model: &self.model.0,
            adapter: Some(&self.adapter),
            packed,
            rope: &self.rope,
            training: seed.map(|seed| Training {
                seed: mix(seed ^ mix(i as u64)),
                share: (packed.len() as f64 / tokens as f64) as f32,
            }),
            cancel: self.watch.cancel.as_deref(),
            batch: None,
        };
        let mut nll = vec![0.0; packed.targets.len()];
        self.model.backend().zero(grads, self.adapter.slots.len)?;
        pass.forward(&mut self.activations, Cached::No)?;
        pass.gradient(&mut self.activations, &mut nll, grads, 1.0 / targets as f32)?;
        sum.losses.push(nll.iter().map(|&x| f64::from(x)).sum());
        sum.done += packed.len();
        self.watch.report(sum.done, tokens)
    }

    fn send(&mut self, to: usize, place: usize) -> Result<()> {
        self.message.resize(self.adapter.slots.len, 0.0);
        self.model.backend().download(&mut self.message, &self.sums[place])?;
        self.ranks.send(to, bytemuck::cast_slice(&self.message))
    }

    fn receive(&mut self, from: usize, place: usize) -> Result<()> {
        self.message.resize(self.adapter.slots.len, 0.0);
        self.ranks.receive(from, bytemuck::cast_slice_mut(&mut self.message))?;
        self.model.backend().upload(&mut self.sums[place], &self.message)
    }

    /// The sum of all passes' losses, in the passes' order; `own` are this rank's.
    fn sum_losses(&self, own: &[f64], passes: usize) -> Result<f64> {
        let ranks = self.ranks.size();
        let most = passes.div_ceil(ranks);
        let (mut padded, mut all) = (vec![0.0; most], vec![0.0; ranks * most]);
        padded[..own.len()].copy_from_slice(own);
        self.ranks.all_gather(bytemuck::cast_slice(&padded), bytemuck::cast_slice_mut(&mut all))?;
        let of_rank = |(rank, losses): (usize, &[f64])| losses[..share(passes, ranks, rank).len()].to_vec();
        Ok(all.chunks(most).enumerate().flat_map(of_rank).sum())
    }
}

/// Gives every rank the first `len` values of rank 0's buffer. `message` is memory to do it in.
pub(super) fn broadcast<B: Backend>(
    ranks: &dyn Communicator,
    backend: &B,
    message: &mut Vec<f32>,
    (buffer, len): (&mut B::Buffer, usize),
) -> Result<()> {
    message.resize(len, 0.0);
    let first = ranks.rank() == 0;
    if first {
        backend.download(message, buffer)?;
    }
    ranks.broadcast(bytemuck::cast_slice_mut(message))?;
    if first { Ok(()) } else { backend.upload(buffer, message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pass_has_one_rank() {
        for (passes, ranks) in [(1, 1), (1, 3), (2, 8), (3, 2), (7, 3), (8, 4), (9, 8), (100, 7)] {
            let mut next = 0;
            for rank in 0..ranks {
                let own = share(passes, ranks, rank);
                assert_eq!(own.start, next);
                assert!((passes / ranks..=passes.div_ceil(ranks)).contains(&own.len()), "{passes} on {ranks}");
                assert!(own.clone().all(|pass| owner(pass, passes, ranks) == rank), "{passes} on {ranks}");
                next = own.end;
            }
            assert_eq!(next, passes);
        }
    }

    #[test]
    fn sums_are_those_of_the_documented_tree() {
        fn text(part: Range<usize>) -> (String, usize) {
            if part.len() == 1 {
                return (part.start.to_string(), 0);
            }
            let middle = middle(&part);
            let [(first, buffers), (second, more)] = [text(part.start..middle), text(middle..part.end)];
            (format!("({first}+{second})"), buffers.max(more + 1))
        }
        assert_eq!(text(0..3).0, "((0+1)+2)");
        assert_eq!(text(0..4).0, "((0+1)+(2+3))");
        assert_eq!(text(0..7).0, "(((0+1)+(2+3))+((4+5)+6))");
        for passes in 1..70 {
            assert_eq!(text(0..passes).1, buffers(passes), "{passes} passes");
        }
    }
}
