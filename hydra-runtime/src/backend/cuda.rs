//! One NVIDIA GPU: `hydra_ptx`'s kernels in one stream.
//!
//! Products take bf16 operands and sum in f32; everything else is f32. Frozen weights lie on the device as bf16 or in their own
//! 4- and 8-bit blocks. Nothing waits for the device but downloads: a training step asks for its loss, the gradient's norm and
//! the adapter's, and otherwise only queues work. Sums have a fixed order, so a step has the same bits each time.
//!
//! The files here decide which launches make an operation; [`Driver`] is what starts them.

mod arena;
mod driver;
mod gpu;
mod linear;
mod loss;
mod matrix;
mod shim;
mod state;

pub use driver::Driver;
pub use gpu::Gpu;
pub use matrix::Matrix;

use super::{AdamW, AdapterArgs, AttentionShape, Backend, Prefix, Store, Weight};
use crate::batch::Segment;
use crate::{Error, Result};
use core::ops::Range;
use hydra_ptx::launch::{self, AdamWStep, Attention, Launch, Ptr, Saved};
use state::State;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A GPU as a [`Backend`].
pub struct Cuda<D: Driver> {
    driver: D,
    state: Mutex<State<D>>,
    /// Writes to buffers so far: each gives the buffer a new version.
    writes: AtomicU64,
}

/// f32 memory of the device.
pub struct Buffer<D: Driver> {
    memory: D::Memory,
    len: usize,
    /// Names what it holds: no two contents of any buffers have the same one.
    version: u64,
}

/// A size as kernels take it.
fn size(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::Invalid(format!("a size of {n}; the device takes less than 2^32")))
}

impl<D: Driver> Cuda<D> {
    /// The backend of a device.
    pub fn new(driver: D) -> Self {
        Self { driver, state: Mutex::default(), writes: AtomicU64::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State<D>> {
        // What a panicking call left behind is overwritten before it is read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ptr(&self, buffer: &Buffer<D>) -> Ptr {
        Ptr(self.driver.address(&buffer.memory))
    }

    /// Where a buffer is that has at least `len` values: what makes a launch safe.
    #[track_caller]
    fn checked(&self, buffer: &Buffer<D>, len: usize) -> Ptr {
        assert!(len <= buffer.len, "{len} values of a buffer of {}", buffer.len);
        self.ptr(buffer)
    }

    fn new_version(&self) -> u64 {
        self.writes.fetch_add(1, Ordering::Relaxed)
    }

    /// [`Self::checked`] for a buffer that is about to be written.
    #[track_caller]
    fn output(&self, buffer: &mut Buffer<D>, len: usize) -> Ptr {
        buffer.version = self.new_version();
        self.checked(buffer, len)
    }

    fn run(&self, launch: &Launch) -> Result<()> {
        if launch.is_empty() {
            return Ok(());
        }
        // SAFETY: callers have checked their buffers' lengths, and `&mut` says that nobody else uses what is written; areas and
        // matrices are as long as they were asked to be, and work is done in order.
        unsafe { self.driver.launch(launch) }
    }

    /// The shape as launches take it; the rows' blocks go to the device.
    fn attention_of(
        &self,
        state: &mut State<D>,
        shape: AttentionShape,
        segments: &[Segment],
    ) -> Result<(Attention, usize)> {
        if shape.head_dim > launch::WIDEST_HEAD as usize {
            let (have, most) = (shape.head_dim, launch::WIDEST_HEAD);
            return Err(Error::Invalid(format!("heads of {have} columns; the device's attention takes up to {most}")));
        }
        let mut rows = Vec::with_capacity(segments.len());
        for segment in segments {
            rows.push((size(segment.start)?, size(segment.len)?));
        }
        let tokens = segments.iter().map(|segment| segment.start + segment.len).max().unwrap_or(0);
        let tiles = Attention::tiles(rows);
        let attention = Attention {
            heads: size(shape.heads)?,
            kv_heads: size(shape.kv_heads)?,
            d: size(shape.head_dim)?,
            tile_count: size(tiles.len() / 3)?,
            tiles: state.ids.on_device(&self.driver, &tiles)?,
        };
        Ok((attention, tokens))
    }
}

impl<D: Driver> Backend for Cuda<D> {
    type Buffer = Buffer<D>;
    type Matrix<'w> = Matrix<D>;

    fn buffer(&self, len: usize) -> Result<Buffer<D>> {
        Ok(Buffer { memory: self.driver.allocate(4 * len.max(1))?, len, version: self.new_version() })
    }

    fn upload(&self, to: &mut Buffer<D>, from: &[f32]) -> Result<()> {
        self.output(to, from.len());
        self.driver.upload(&mut to.memory, 0, bytemuck::cast_slice(from))
    }

    fn download(&self, to: &mut [f32], from: &Buffer<D>) -> Result<()> {
        self.checked(from, to.len());
        self.driver.download(bytemuck::cast_slice_mut(to), &from.memory)
    }

    fn copy(&self, to: &mut Buffer<D>, to_start: usize, from: &Buffer<D>, len: usize) -> Result<()> {
        self.checked(from, len);
        self.output(to, to_start + len);
        self.driver.copy(&mut to.memory, 4 * to_start, &from.memory, 4 * len)
    }

    fn zero(&self, buffer: &mut Buffer<D>, len: usize) -> Result<()> {
        self.output(buffer, len);
        self.driver.zero(&mut buffer.memory, 4 * len)
    }

    fn matrix<'w>(&self, weight: Weight<'w>) -> Result<Matrix<D>> {
        Matrix::upload(&self.driver, weight)
    }

    fn embed(&self, out: &mut Buffer<D>, table: &Matrix<D>, tokens: &[u32]) -> Result<()> {
        let table = table.of(&self.driver);
        let out = self.output(out, tokens.len() * table.columns as usize);
        let ids = self.state().ids.on_device(&self.driver, tokens)?;
        self.run(&launch::embed(out, size(tokens.len())?, &table, ids))
    }

    fn rms_norm(
        &self,
        y: &mut Buffer<D>,
        inv_rms: &mut Buffer<D>,
        tokens: usize,
        x: &Buffer<D>,
        weight: &Buffer<D>,
        eps: f32,
    ) -> Result<()> {
        let (d, values) = (size(weight.len)?, tokens * weight.len);
        let (y, inv_rms) = (self.output(y, values), self.output(inv_rms, tokens));
        let (x, weight) = (self.checked(x, values), self.ptr(weight));
        self.run(&launch::rms_norm(y, inv_rms, size(tokens)?, x, weight, d, eps))
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Buffer<D>,
        tokens: usize,
        dy: &Buffer<D>,
        x: &Buffer<D>,
        inv_rms: &Buffer<D>,
        weight: &Buffer<D>,
    ) -> Result<()> {
        let (d, values) = (size(weight.len)?, tokens * weight.len);
        let (dx, dy, x) = (self.output(dx, values), self.checked(dy, values), self.checked(x, values));
        let (inv_rms, weight) = (self.checked(inv_rms, tokens), self.ptr(weight));
        self.run(&launch::rms_norm_backward(dx, size(tokens)?, dy, x, inv_rms, weight, d))
    }

    fn rope(
        &self,
        x: &mut Buffer<D>,
        heads: usize,
        head_dim: usize,
        table: &Buffer<D>,
        positions: &[u32],
        inverse: bool,
    ) -> Result<()> {
        let end = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let (tokens, table) = (positions.len(), self.checked(table, end * head_dim));
        let x = self.output(x, tokens * heads * head_dim);
        let positions = self.state().ids.on_device(&self.driver, positions)?;
        self.run(&launch::rope(x, size(tokens)?, size(heads)?, size(head_dim)?, table, positions, inverse))
    }

    fn linear(
        &self,
        y: &mut Buffer<D>,
        store: Store,
        tokens: usize,
        x: &Buffer<D>,
        weight: &Matrix<D>,
        adapter: Option<(&AdapterArgs<'_, Self>, &mut Buffer<D>)>,
    ) -> Result<()> {
        self.linear_forward(y, store, tokens, x, weight, adapter)
    }

    fn linear_backward(
        &self,
        dx: Option<(&mut Buffer<D>, Store)>,
        dparams: Option<&mut Buffer<D>>,
        tokens: usize,
        dy: &Buffer<D>,
        x: &Buffer<D>,
        weight: &Matrix<D>,
        adapter: Option<(&AdapterArgs<'_, Self>, &Buffer<D>)>,
    ) -> Result<()> {
        self.linear_gradient(dx, dparams, tokens, dy, x, weight, adapter)
    }

    fn attention(
        &self,
        o: &mut Buffer<D>,
        lse: &mut Buffer<D>,
        shape: AttentionShape,
        segments: &[Segment],
        q: &Buffer<D>,
        k: &Buffer<D>,
        v: &Buffer<D>,
        prefix: Option<Prefix<'_, Self>>,
    ) -> Result<()> {
        let state = &mut *self.state();
        let (attention, tokens) = self.attention_of(state, shape, segments)?;
        let (wide, narrow) = (tokens * shape.q_width(), tokens * shape.kv_width());
        let inputs = [self.checked(q, wide), self.checked(k, narrow), self.checked(v, narrow)];
        let prefix = match prefix {
            None => None,
            Some(Prefix { k, v, len }) => {
                let values = len * shape.kv_width();
                Some(launch::Prefix { k: self.checked(k, values), v: self.checked(v, values), len: size(len)? })
            }
        };
        let (o, lse) = (self.output(o, wide), self.output(lse, tokens * shape.heads));
        self.run(&launch::attention(o, lse, &attention, inputs, prefix))
    }

    fn attention_backward(
        &self,
        dq: &mut Buffer<D>,
        dk: &mut Buffer<D>,
        dv: &mut Buffer<D>,
        shape: AttentionShape,
        segments: &[Segment],
        d_o: &Buffer<D>,
        o: &Buffer<D>,
        lse: &Buffer<D>,
        q: &Buffer<D>,
        k: &Buffer<D>,
        v: &Buffer<D>,
    ) -> Result<()> {
        let state = &mut *self.state();
        let (attention, tokens) = self.attention_of(state, shape, segments)?;
        let (wide, narrow) = (tokens * shape.q_width(), tokens * shape.kv_width());
        let inputs = [self.checked(q, wide), self.checked(k, narrow), self.checked(v, narrow)];
        let (d_o, o) = (self.checked(d_o, wide), self.checked(o, wide));
        let delta = state.partial.f32(&self.driver, tokens * shape.heads)?;
        let saved = Saved { d_o, lse: self.checked(lse, tokens * shape.heads), delta };
        let (dq, dk, dv) = (self.output(dq, wide), self.output(dk, narrow), self.output(dv, narrow));
        self.run(&launch::attention_delta(delta, size(tokens)?, &attention, d_o, o))?;
        self.run(&launch::attention_dq(dq, &attention, &saved, inputs))?;
        self.run(&launch::attention_dkv([dk, dv], &attention, &saved, inputs))
    }

    fn swiglu(&self, out: &mut Buffer<D>, len: usize, gate: &Buffer<D>, up: &Buffer<D>) -> Result<()> {
        let (out, gate, up) = (self.output(out, len), self.checked(gate, len), self.checked(up, len));
        self.run(&launch::swiglu(out, len as u64, gate, up))
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Buffer<D>,
        dup: &mut Buffer<D>,
        len: usize,
        gate: &Buffer<D>,
        up: &Buffer<D>,
    ) -> Result<()> {
        let (dgate, dup) = (self.output(dgate, len), self.output(dup, len));
        let (gate, up) = (self.checked(gate, len), self.checked(up, len));
        self.run(&launch::swiglu_backward(dgate, dup, len as u64, gate, up))
    }

    fn gather(&self, out: &mut Buffer<D>, x: &Buffer<D>, rows: &[u32], d: usize) -> Result<()> {
        let end = rows.iter().max().map_or(0, |&last| last as usize + 1);
        let (out, x) = (self.output(out, rows.len() * d), self.checked(x, end * d));
        let (count, rows) = (size(rows.len())?, self.state().ids.on_device(&self.driver, rows)?);
        self.run(&launch::gather(out, x, rows, count, size(d)?))
    }

    fn scatter(&self, out: &mut Buffer<D>, tokens: usize, x: &Buffer<D>, rows: &[u32], d: usize) -> Result<()> {
        let end = rows.last().map_or(0, |&last| last as usize + 1);
        assert!(end <= tokens, "row {end} of {tokens}");
        self.zero(out, tokens * d)?;
        let (out, x) = (self.output(out, tokens * d), self.checked(x, rows.len() * d));
        let (count, rows) = (size(rows.len())?, self.state().ids.on_device(&self.driver, rows)?);
        self.run(&launch::scatter(out, x, rows, count, size(d)?))
    }

    fn head_loss(
        &self,
        nll: &mut Buffer<D>,
        dx: Option<&mut Buffer<D>>,
        x: &Buffer<D>,
        head: &Matrix<D>,
        targets: &[u32],
        scale: f32,
    ) -> Result<()> {
        self.loss(nll, dx, x, head, targets, scale)
    }

    fn head_rows(&self, out: &mut [f32], x: &Buffer<D>, rows: usize, head: &Matrix<D>, ids: &[u32]) -> Result<()> {
        self.logits_of(out, x, rows, head, ids)
    }

    fn sum_of_squares(&self, x: &Buffer<D>, len: usize) -> Result<f64> {
        let (state, driver, len64) = (&mut *self.state(), &self.driver, len as u64);
        let (x, count) = (self.checked(x, len), launch::squares_parts(len64));
        let parts = state.partial.take(driver, 8 * count as usize)?;
        let total = state.result.take(driver, 8)?;
        self.run(&launch::squares(parts, x, len64))?;
        self.run(&launch::squares_total(total, parts, count))?;
        let mut sum = [0; 8];
        state.result.download(driver, &mut sum)?;
        Ok(f64::from_le_bytes(sum))
    }

    fn adamw(
        &self,
        params: &mut Buffer<D>,
        m: &mut Buffer<D>,
        v: &mut Buffer<D>,
        grads: &Buffer<D>,
        rates: &[(Range<usize>, f32)],
        adam: AdamW,
        t: u64,
        grad_scale: f32,
    ) -> Result<()> {
        let AdamW { beta1, beta2, eps, weight_decay } = adam;
        // Powers in f64: beta2^t is close to 1 for the first thousand steps.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let len = rates.iter().map(|(range, _)| range.end).max().unwrap_or(0);
        let state = [self.output(params, len), self.output(m, len), self.output(v, len)];
        let grads = self.checked(grads, len);
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

    fn workspace_bytes(&self, tokens: usize, widest: usize) -> u64 {
        // A bf16 operand and what the adapter's few columns take beside it; the head's block of logits.
        4 * (tokens * widest) as u64 + loss::bytes(tokens)
    }
}
