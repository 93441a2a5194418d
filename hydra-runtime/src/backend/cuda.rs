//! One NVIDIA GPU: `hydra_ptx`'s kernels in one stream.
//!
//! Products take bf16 operands and sum in f32. Activations are bf16, so that they are operands as they are; residual streams, their
//! gradients, statistics and all that is trained are f32. Frozen weights lie on the device as bf16 or in their own 4- and 8-bit
//! blocks, which become bf16 a matrix at a time where many tokens are multiplied. Nothing waits for the device but downloads: a
//! training step asks for its loss, the gradient's norm and the adapter's, and otherwise only queues work. Sums have a fixed order,
//! so a step has the same bits each time.
//!
//! The files here decide which launches make an operation; [`Driver`] is what starts them.

mod arena;
mod blas;
mod buffer;
mod driver;
mod gpu;
mod library;
mod linear;
mod loss;
mod matrix;
mod state;

use buffer::Memory;
pub use buffer::{Activations, Buffer};
pub use driver::Driver;
pub use gpu::Gpu;
pub use matrix::Matrix;

use crate::backend::{
    self, AdamW, AttentionBackward, AttentionShape, Backend, HeadLoss, Linear, LinearBackward, Prefix, RmsNorm,
    RmsNormBackward, Rope, StoredWeight,
};
use crate::batch::Segment;
use crate::config::Config;
use crate::{Error, Result};
use half::bf16;
use hydra_ptx::launch::{self, AdamWStep, Attention, Launch, Product, Ptr, Saved};
use hydra_ptx::sizes::DECODED_TOKENS;
use state::{Area, State};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A GPU as a [`Backend`].
pub struct Cuda<D: Driver> {
    driver: D,
    state: Mutex<State<D>>,
}

/// A size as kernels take it.
fn size(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::Invalid(format!("a size of {n}; the device takes less than 2^32")))
}

impl<D: Driver> Cuda<D> {
    /// The backend of a device.
    pub fn new(driver: D) -> Self {
        Self { driver, state: Mutex::default() }
    }

    /// What this backend keeps. To be held until all is launched that uses it: other threads write there, too.
    fn state(&self) -> MutexGuard<'_, State<D>> {
        // What a panicking call left behind is overwritten before it is read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a buffer is that has at least `len` values.
    #[track_caller]
    fn f32(&self, buffer: &Buffer<D>, len: usize) -> Ptr {
        buffer.0.values(&self.driver, len).at
    }

    /// Where activations are, at least `len` of them.
    #[track_caller]
    fn bf16(&self, activations: &Activations<D>, len: usize) -> Ptr {
        activations.0.values(&self.driver, len).at
    }

    /// The first `rows` rows of a matrix as an operand: as it lies, if it does so already, or in `area`.
    #[track_caller]
    fn operand(&self, area: &mut Area<D>, memory: &Memory<D>, rows: usize, columns: u32) -> Result<Ptr> {
        let values = memory.values(&self.driver, rows * columns as usize);
        if values.bf16 && columns == launch::padded(columns) {
            return Ok(values.at);
        }
        let count = size(rows)?;
        let operand = area.operand(&self.driver, count, columns)?;
        self.run(&launch::operand(operand, values, count, columns))?;
        Ok(operand)
    }

    fn run(&self, launch: &Launch) -> Result<()> {
        if launch.is_empty() {
            return Ok(());
        }
        // SAFETY: callers have checked their buffers' lengths, and `&mut` says that nobody else uses what is written; areas and
        // matrices are as long as they were asked to be, and work is done in order.
        unsafe { self.driver.launch(launch) }
    }

    /// A frozen matrix as products with `tokens` rows take it: as it lies, or as bf16 in `area`.
    fn decoded(&self, area: &mut Area<D>, w: launch::Matrix, tokens: u32) -> Result<launch::Matrix> {
        if w.format == launch::Format::Bf16 || tokens < DECODED_TOKENS {
            return Ok(w);
        }
        let data = area.operand(&self.driver, w.rows, w.columns)?;
        self.run(&launch::decode(data, &w))?;
        Ok(launch::Matrix { format: launch::Format::Bf16, data, scales: Ptr::NULL, ..w })
    }

    /// Runs a product with a frozen matrix, in the device's fastest way.
    fn multiply(&self, product: &Product<'_>) -> Result<()> {
        if product.is_empty() {
            return Ok(());
        }
        // SAFETY: as for `run`.
        unsafe { self.driver.multiply(product) }
    }

    /// `out[i] = x[rows[i]]`, rows of `d` values.
    fn gather_words(&self, out: &Memory<D>, x: &Memory<D>, rows: &[u32], d: usize) -> Result<()> {
        let end = rows.iter().max().map_or(0, |&last| last as usize + 1);
        let (out, x) = (out.values(&self.driver, rows.len() * d), x.values(&self.driver, end * d));
        // Rows of bf16 as half as many words.
        assert!(!x.bf16 || d.is_multiple_of(2), "rows of {d} bf16");
        let words = if x.bf16 { d / 2 } else { d };
        let state = &mut *self.state();
        let (count, rows) = (size(rows.len())?, state.ids.on_device(&self.driver, rows)?);
        self.run(&launch::gather(out.at, x.at, rows, count, size(words)?))
    }

    /// The shape as launches take it, tokens, and where q, k and v are; the rows' blocks go to the device.
    fn attention_of(
        &self,
        state: &mut State<D>,
        shape: AttentionShape,
        segments: &[Segment],
        [q, k, v]: [&Activations<D>; 3],
    ) -> Result<(Attention, usize, [Ptr; 3])> {
        if shape.head_dim > launch::WIDEST_HEAD as usize || !shape.head_dim.is_multiple_of(2) {
            let (have, most) = (shape.head_dim, launch::WIDEST_HEAD);
            let what = format!("heads of {have} columns; the device's attention takes even numbers up to {most}");
            return Err(Error::Invalid(what));
        }
        let mut rows = Vec::with_capacity(segments.len());
        for segment in segments {
            rows.push((size(segment.start)?, size(segment.len)?));
        }
        let tokens = segments.iter().map(|segment| segment.start + segment.len).max().unwrap_or(0);
        let tiles = Attention::tiles(rows);
        let attention = Attention {
            n_heads: size(shape.n_heads)?,
            kv_heads: size(shape.kv_heads)?,
            d: size(shape.head_dim)?,
            tile_count: size(tiles.len() / 3)?,
            tiles: state.ids.on_device(&self.driver, &tiles)?,
        };
        let narrow = tokens * shape.kv_width();
        Ok((attention, tokens, [self.bf16(q, tokens * shape.q_width()), self.bf16(k, narrow), self.bf16(v, narrow)]))
    }
}

impl<D: Driver> Backend for Cuda<D> {
    type Buffer = Buffer<D>;
    type Activations = Activations<D>;
    type Matrix = Matrix<D>;

    fn buffer(&self, len: usize) -> Result<Buffer<D>> {
        Memory::zeroed(&self.driver, len, false).map(Buffer)
    }

    fn activations(&self, len: usize) -> Result<Activations<D>> {
        Memory::zeroed(&self.driver, len, true).map(Activations)
    }

    fn activation_bytes(&self) -> usize {
        size_of::<bf16>()
    }

    fn matrix(&self, weight: StoredWeight) -> Result<Matrix<D>> {
        Matrix::upload(&self.driver, weight.weight())
    }

    fn upload(&self, to: &mut Buffer<D>, from: &[f32]) -> Result<()> {
        to.0.upload(&self.driver, from)
    }

    fn download(&self, to: &mut [f32], from: &Buffer<D>) -> Result<()> {
        from.0.download(&self.driver, to)
    }

    fn upload_activations(&self, to: &mut Activations<D>, from: &[f32]) -> Result<()> {
        to.0.upload(&self.driver, from)
    }

    fn download_activations(&self, to: &mut [f32], from: &Activations<D>) -> Result<()> {
        from.0.download(&self.driver, to)
    }

    fn copy(&self, to: &mut Buffer<D>, start: usize, from: &Buffer<D>, len: usize) -> Result<()> {
        to.0.copy(&self.driver, start, &from.0, len)
    }

    fn copy_activations(&self, to: &mut Activations<D>, start: usize, from: &Activations<D>, len: usize) -> Result<()> {
        to.0.copy(&self.driver, start, &from.0, len)
    }

    fn zero(&self, buffer: &mut Buffer<D>, len: usize) -> Result<()> {
        buffer.0.zero(&self.driver, len)
    }

    fn embed(&self, out: &mut Buffer<D>, table: &Matrix<D>, tokens: &[u32]) -> Result<()> {
        let table = table.of(&self.driver);
        let out = self.f32(out, tokens.len() * table.columns as usize);
        let state = &mut *self.state();
        let ids = state.ids.on_device(&self.driver, tokens)?;
        self.run(&launch::embed(out, size(tokens.len())?, &table, ids))
    }

    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<()> {
        let RmsNorm { y, inv_rms, tokens, x, weight, eps } = args;
        let (d, values) = (size(weight.len())?, tokens * weight.len());
        let (y, inv_rms) = (self.bf16(y, values), self.f32(inv_rms, tokens));
        let (x, weight) = (self.f32(x, values), self.f32(weight, weight.len()));
        self.run(&launch::rms_norm(y, inv_rms, size(tokens)?, x, weight, d, eps))
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()> {
        let RmsNormBackward { dx, tokens, dy, x, inv_rms, weight } = args;
        let (d, values) = (size(weight.len())?, tokens * weight.len());
        let (dx, dy, x) = (self.f32(dx, values), self.f32(dy, values), self.f32(x, values));
        let (inv_rms, weight) = (self.f32(inv_rms, tokens), self.f32(weight, weight.len()));
        self.run(&launch::rms_norm_backward(dx, size(tokens)?, dy, x, inv_rms, weight, d))
    }

    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        let Rope { x, n_heads, head_dim, table, positions, inverse } = args;
        let end = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let (tokens, table) = (positions.len(), self.f32(table, end * head_dim));
        let x = self.bf16(x, tokens * n_heads * head_dim);
        let state = &mut *self.state();
        let positions = state.ids.on_device(&self.driver, positions)?;
        self.run(&launch::rope(x, size(tokens)?, size(n_heads)?, size(head_dim)?, table, positions, inverse))
    }

    fn linear(&self, args: Linear<'_, Self>) -> Result<()> {
        self.linear_forward(args)
    }

    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<()> {
        self.linear_gradient(args)
    }

    fn attention(&self, args: backend::Attention<'_, Self>) -> Result<()> {
        let backend::Attention { o, lse, shape, segments, q, k, v, prefix } = args;
        let state = &mut *self.state();
        let (attention, tokens, inputs) = self.attention_of(state, shape, segments, [q, k, v])?;
        let prefix = match prefix {
            None => None,
            Some(Prefix { k, v, len }) => {
                let values = len * shape.kv_width();
                Some(launch::Prefix { k: self.bf16(k, values), v: self.bf16(v, values), len: size(len)? })
            }
        };
        let (o, lse) = (self.bf16(o, tokens * shape.q_width()), self.f32(lse, tokens * shape.n_heads));
        self.run(&launch::attention(o, lse, &attention, inputs, prefix))
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        let AttentionBackward { dq, dk, dv, shape, segments, d_o, o, lse, q, k, v } = args;
        let state = &mut *self.state();
        let (attention, tokens, inputs) = self.attention_of(state, shape, segments, [q, k, v])?;
        let (wide, narrow) = (tokens * shape.q_width(), tokens * shape.kv_width());
        let (d_o, o) = (self.bf16(d_o, wide), self.bf16(o, wide));
        let delta = state.partial.f32(&self.driver, tokens * shape.n_heads)?;
        let saved = Saved { d_o, lse: self.f32(lse, tokens * shape.n_heads), delta };
        let (dq, dk, dv) = (self.bf16(dq, wide), self.bf16(dk, narrow), self.bf16(dv, narrow));
        self.run(&launch::attention_delta(delta, size(tokens)?, &attention, d_o, o))?;
        self.run(&launch::attention_dq(dq, &attention, &saved, inputs))?;
        self.run(&launch::attention_dkv([dk, dv], &attention, &saved, inputs))
    }

    fn swiglu(&self, out: &mut Activations<D>, len: usize, gate: &Activations<D>, up: &Activations<D>) -> Result<()> {
        let (out, gate, up) = (self.bf16(out, len), self.bf16(gate, len), self.bf16(up, len));
        self.run(&launch::swiglu(out, len as u64, gate, up))
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Activations<D>,
        dup: &mut Activations<D>,
        len: usize,
        gate: &Activations<D>,
        up: &Activations<D>,
    ) -> Result<()> {
        let (dgate, dup) = (self.bf16(dgate, len), self.bf16(dup, len));
        let (gate, up) = (self.bf16(gate, len), self.bf16(up, len));
        self.run(&launch::swiglu_backward(dgate, dup, len as u64, gate, up))
    }

    fn gather(&self, out: &mut Buffer<D>, x: &Buffer<D>, rows: &[u32], d: usize) -> Result<()> {
        self.gather_words(&out.0, &x.0, rows, d)
    }

    fn gather_activations(&self, out: &mut Activations<D>, x: &Activations<D>, rows: &[u32], d: usize) -> Result<()> {
        self.gather_words(&out.0, &x.0, rows, d)
    }

    fn scatter(&self, out: &mut Buffer<D>, tokens: usize, x: &Buffer<D>, rows: &[u32], d: usize) -> Result<()> {
        let end = rows.last().map_or(0, |&last| last as usize + 1);
        assert!(end <= tokens, "row {end} of {tokens}");
        self.zero(out, tokens * d)?;
        let (out, x) = (self.f32(out, tokens * d), self.f32(x, rows.len() * d));
        let state = &mut *self.state();
        let (count, rows) = (size(rows.len())?, state.ids.on_device(&self.driver, rows)?);
        self.run(&launch::scatter(out, x, rows, count, size(d)?))
    }

    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Result<()> {
        self.loss(args)
    }

    fn head_rows(&self, out: &mut [f32], x: &Activations<D>, rows: usize, head: &Matrix<D>, ids: &[u32]) -> Result<()> {
        self.logits_of(out, x, rows, head, ids)
    }

    fn sum_of_squares(&self, x: &Buffer<D>, len: usize) -> Result<f64> {
        let (state, driver, len64) = (&mut *self.state(), &self.driver, len as u64);
        let (x, count) = (self.f32(x, len), launch::squares_parts(len64));
        let parts = state.partial.take(driver, 8 * count as usize)?;
        let total = state.result.take(driver, 8)?;
        self.run(&launch::squares(parts, x, len64))?;
        self.run(&launch::squares_total(total, parts, count))?;
        let mut sum = [0; 8];
        state.result.download(driver, &mut sum)?;
        Ok(f64::from_le_bytes(sum))
    }

    fn adamw(&self, args: backend::AdamWStep<'_, Self>) -> Result<()> {
        let backend::AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step: t, grad_scale } = args;
        let AdamW { beta1, beta2, eps, weight_decay } = adam;
        // Powers in f64: beta2^t is close to 1 for the first thousand steps.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let len = rates.iter().map(|(range, _)| range.end).max().unwrap_or(0);
        let state = [self.f32(params, len), self.f32(exp_avg, len), self.f32(exp_avg_sq, len)];
        let grads = self.f32(grads, len);
        for (range, lr) in rates {
            let step = AdamWStep {
                beta1,
                beta2,
                eps,
                keep: 1.0 - lr * weight_decay,
                step: (f64::from(*lr) / correction(beta1)) as f32,
                root: correction(beta2).sqrt() as f32,
                grad_scale,
            };
            let state = state.map(|part| part.f32(range.start));
            self.run(&launch::adamw(state, grads.f32(range.start), range.len() as u64, &step))?;
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("{}, bf16", self.driver.describe())
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.driver.free_bytes().map(Some)
    }

    fn workspace_bytes(&self, tokens: usize, config: &Config) -> u64 {
        let (d, widest) = (config.d_model, config.d_ffn.max(config.d_model));
        // An f32 gradient as an operand, with room for what the adapter's columns take beside it where they are few; the head's
        // block of logits; if they lie in blocks, the largest weight as bf16, or the head's rows of a block; cuBLASLt's room.
        let wide = widest.max(loss::MOST_IDS);
        let decoded = if tokens < DECODED_TOKENS as usize { 0 } else { 2 * d * wide };
        let library = if launch::is_large(tokens, wide) { blas::WORKSPACE } else { 0 };
        (4 * tokens * widest + decoded + library) as u64 + loss::bytes(tokens)
    }
}

#[cfg(test)]
mod tests;
