//! The cross-entropy of the vocabulary's logits by blocks of ids, and the logits of a few ids.

use super::buffer::{Activations, size};
use super::driver::Driver;
use super::launcher::Cuda;
use super::matrix::Matrix;
use crate::Result;
use crate::backend::HeadLoss;
use hydra_ptx::launch::{self, Form, LogitsBlock, MatrixRows, Output, Product, Ptr, RunningLoss, Values};
use hydra_ptx::sizes::LOSS_STATE;

/// Logits of a block, which are there as f32 and as bf16: some 100 MiB, so that dx is read and written only a few
/// times.
const BLOCK_VALUES: usize = 16 << 20;

/// The most ids of a block, so that their rows of the vocabulary's matrix, decoded, take no more memory than a layer's
/// weight.
const MAX_IDS: usize = 8192;

/// A block is as wide as whole tiles.
const TILE: usize = 128;

/// Ids of a block for this number of rows.
fn block_ids(rows: usize) -> usize {
    (BLOCK_VALUES / rows.max(1)).next_multiple_of(TILE).clamp(TILE, MAX_IDS)
}

/// The most ids of a block, and the most logits of one, for up to `rows` rows and a vocabulary of this size.
pub(super) fn most(rows: usize, vocab: usize) -> (usize, u128) {
    let (rows, ids) = (rows as u128, vocab.min(MAX_IDS));
    (ids, (rows * ids as u128).min(BLOCK_VALUES as u128 + rows * TILE as u128))
}

impl<D: Driver> Cuda<D> {
    pub(super) fn loss(&self, args: HeadLoss<'_, Self>) -> Result<()> {
        let HeadLoss { nll, dx, x, lm_head, targets, scale } = args;
        let (state, driver, lm_head) = (&mut *self.state(), &self.driver, lm_head.of(&self.driver));
        let (rows, d) = (targets.len(), lm_head.columns);
        let nll = self.f32(nll, rows);
        let loss = RunningLoss {
            rows: size(rows)?,
            d,
            targets: state.ids.on_device(driver, targets)?,
            state: state.partial.f32(driver, rows * LOSS_STATE)?,
            dx: dx.map_or(Ptr::NULL, |dx| self.f32(dx, rows * d as usize)),
        };
        let x = self.operand(&mut state.x, &x.0, rows, d)?;
        let block = size(block_ids(rows))?;
        for first in (0..lm_head.rows).step_by(block as usize) {
            let count = block.min(lm_head.rows - first);
            let w = &self.decoded(&mut state.decoded, lm_head.from_row(first, count), loss.rows)?;
            let logits = state.logits.f32(driver, rows * count as usize)?;
            let p = state.weights.operand(driver, loss.rows, count)?;
            let multiply = |c, c_pitch, addend, form, a| {
                self.multiply(&Product { c: Values::f32(c), c_pitch, addend, form, a, w, second: None })
            };
            multiply(logits, count, Ptr::NULL, Form::Rows, x)?;
            self.run(&launch::online_softmax(p.at, &LogitsBlock { logits, first, count }, &loss))?;
            if loss.dx != Ptr::NULL {
                let addend = if first > 0 { loss.dx } else { Ptr::NULL };
                multiply(loss.dx, d, addend, Form::Columns, p)?;
            }
        }
        self.run(&launch::finish_loss(nll, &loss, &lm_head, scale))
    }

    pub(super) fn logits_of(
        &self,
        out: &mut [f32],
        x: &Activations<D>,
        rows: usize,
        lm_head: &Matrix<D>,
        ids: &[u32],
    ) -> Result<()> {
        let (state, driver, lm_head) = (&mut *self.state(), &self.driver, lm_head.of(&self.driver));
        let x = self.operand(&mut state.x, &x.0, rows, lm_head.columns)?;
        let (at, count) = (state.ids.on_device(driver, ids)?, size(ids.len())?);
        let y = state.result.f32(driver, out.len())?;
        for first in (0..x.rows).step_by(launch::MOST_MATVEC_TOKENS as usize) {
            let y = Values::f32(y.f32(first as usize * count as usize));
            let output = Output { y, pitch: count, addend: Ptr::NULL };
            let x = x.from_row(first, launch::MOST_MATVEC_TOKENS);
            self.run(&launch::matvec(output, x, &lm_head, MatrixRows::Ids { at, count }, None))?;
        }
        state.result.download(driver, bytemuck::cast_slice_mut(out))
    }
}
