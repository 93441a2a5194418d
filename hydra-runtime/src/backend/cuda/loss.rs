//! The head: cross-entropy by blocks of the vocabulary, and the logits of a few ids.

use super::{Activations, Cuda, Driver, Matrix, size};
use crate::Result;
use crate::backend::HeadLoss;
use hydra_ptx::launch::{self, Form, LOSS_STATE, Output, Product, Ptr, Values};

/// Logits in a block, f32 and bf16: some 100 MiB, so that the vocabulary takes few passes over dx.
const BLOCK_VALUES: usize = 16 << 20;

/// Ids in a block at most, so that their rows of the head, decoded, are no more than a weight of a layer is.
pub(super) const MOST_IDS: usize = 8192;

/// Ids of a block for so many rows: whole tiles.
fn block_ids(rows: usize) -> usize {
    (BLOCK_VALUES / rows.max(1)).next_multiple_of(128).clamp(128, MOST_IDS)
}

/// Bytes that the blocks take for up to `rows` rows.
pub(super) fn bytes(rows: usize) -> u64 {
    6 * (rows * block_ids(rows)) as u64
}

impl<D: Driver> Cuda<D> {
    pub(super) fn loss(&self, args: HeadLoss<'_, Cuda<D>>) -> Result<()> {
        let HeadLoss { nll, dx, x, lm_head, targets, scale } = args;
        let (state, driver, head) = (&mut *self.state(), &self.driver, lm_head.of(&self.driver));
        let (rows, d) = (targets.len(), head.columns);
        let count = size(rows)?;
        let nll = self.f32(nll, rows);
        let dx = dx.map_or(Ptr::NULL, |dx| self.f32(dx, rows * d as usize));
        let targets = state.ids.on_device(driver, targets)?;
        let softmax = state.partial.f32(driver, rows * LOSS_STATE)?;
        let x = self.operand(&mut state.x, &x.0, rows, d)?;
        let block = size(block_ids(rows))?;
        for first in (0..head.rows).step_by(block as usize) {
            let ids = block.min(head.rows - first);
            let part = self.decoded(&mut state.decoded, head.from_row(first, ids), count)?;
            let logits = state.logits.f32(driver, rows * ids as usize)?;
            let weights = state.weights.operand(driver, count, ids)?;
            let multiply = |c, before, form, a| {
                self.multiply(&Product { c: Values::f32(c), before, m: count, form, a, w: &part, second: None })
            };
            multiply(logits, Ptr::NULL, Form::Rows, x)?;
            self.run(&launch::online_softmax(weights, softmax, dx, count, logits, ids, targets, first, d))?;
            if dx != Ptr::NULL {
                let before = if first > 0 { dx } else { Ptr::NULL };
                multiply(dx, before, Form::Columns, weights)?;
            }
        }
        self.run(&launch::finish_loss(nll, dx, count, softmax, &head, targets, scale))
    }

    pub(super) fn logits_of(
        &self,
        out: &mut [f32],
        x: &Activations<D>,
        rows: usize,
        head: &Matrix<D>,
        ids: &[u32],
    ) -> Result<()> {
        let (state, driver, head) = (&mut *self.state(), &self.driver, head.of(&self.driver));
        let x = self.operand(&mut state.x, &x.0, rows, head.columns)?;
        let count = size(ids.len())?;
        let ids = state.ids.on_device(driver, ids)?;
        let y = state.result.f32(driver, out.len())?;
        let output = Output { y: Values::f32(y), pitch: count, before: Ptr::NULL };
        self.run(&launch::matvec(output, size(rows)?, x, &head, Some((ids, count)), None))?;
        state.result.download(driver, bytemuck::cast_slice_mut(out))
    }
}
