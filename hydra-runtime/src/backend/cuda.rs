//! One NVIDIA GPU: `hydra_ptx`'s kernels in one stream.
//!
//! Products take bf16 operands and sum in f32. Activations are bf16, so that they are operands as they are; residual streams, their
//! gradients, statistics and all that is trained are f32. Frozen weights lie on the device as bf16 or in their own 4- and 8-bit
//! blocks. Nothing waits for the device but downloads: a training step asks for its loss, the gradient's norm and
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
use half::bf16;
use hydra_ptx::launch::{self, AdamWStep, Attention, Launch, Ptr, Saved, Values};
use state::{Area, State};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A GPU as a [`Backend`].
pub struct Cuda<D: Driver> {
    driver: D,
    state: Mutex<State<D>>,
}

/// Memory of the device.
pub struct Buffer<D: Driver> {
    memory: D::Memory,
    /// Values.
    len: usize,
    /// An activation; else f32.
    bf16: bool,
}

impl<D: Driver> Buffer<D> {
    /// Bytes of `len` values.
    fn bytes(&self, len: usize) -> usize {
        if self.bf16 { size_of::<bf16>() * len } else { size_of::<f32>() * len }
    }
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

    fn state(&self) -> MutexGuard<'_, State<D>> {
        // What a panicking call left behind is overwritten before it is read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocate(&self, len: usize, bf16: bool) -> Result<Buffer<D>> {
        let bytes = if bf16 { 2 } else { 4 } * len.max(1);
        Ok(Buffer { memory: self.driver.allocate(bytes)?, len, bf16 })
    }

    /// Where a buffer is that has at least `len` values: what makes a launch safe.
    #[track_caller]
    fn values(&self, buffer: &Buffer<D>, len: usize) -> Values {
        assert!(len <= buffer.len, "{len} values of a buffer of {}", buffer.len);
        Values { at: Ptr(self.driver.address(&buffer.memory)), bf16: buffer.bf16 }
    }

    /// The same of one that isn't an activation.
    #[track_caller]
    fn f32(&self, buffer: &Buffer<D>, len: usize) -> Ptr {
        assert!(!buffer.bf16, "an activation where a buffer is wanted");
        self.values(buffer, len).at
    }

    /// The same of an activation.
    #[track_caller]
    fn bf16(&self, buffer: &Buffer<D>, len: usize) -> Ptr {
        assert!(buffer.bf16, "a buffer where an activation is wanted");
        self.values(buffer, len).at
    }

    /// The first `rows` rows of a buffer as an operand: as it lies, if it does so already, or in `area`.
    #[track_caller]
    fn operand(&self, area: &mut Area<D>, buffer: &Buffer<D>, rows: usize, columns: u32) -> Result<Ptr> {
        let values = self.values(buffer, rows * columns as usize);
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

    /// The shape as launches take it; the rows' blocks go to the device.
    fn attention_of(
        &self,
        state: &mut State<D>,
        shape: AttentionShape,
        segments: &[Segment],
    ) -> Result<(Attention, usize)> {
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
        self.allocate(len, false)
    }

    fn activation(&self, len: usize) -> Result<Buffer<D>> {
        self.allocate(len, true)
    }

    fn activation_bytes(&self) -> usize {
        size_of::<bf16>()
    }

    fn upload(&self, to: &mut Buffer<D>, from: &[f32]) -> Result<()> {
        if !self.values(to, from.len()).bf16 {
            return self.driver.upload(&mut to.memory, 0, bytemuck::cast_slice(from));
        }
        let rounded: Vec<bf16> = from.iter().map(|&x| bf16::from_f32(x)).collect();
        self.driver.upload(&mut to.memory, 0, bytemuck::cast_slice(&rounded))
    }

    fn download(&self, to: &mut [f32], from: &Buffer<D>) -> Result<()> {
        if !self.values(from, to.len()).bf16 {
            return self.driver.download(bytemuck::cast_slice_mut(to), &from.memory);
        }
        let mut values = vec![bf16::ZERO; to.len()];
        self.driver.download(bytemuck::cast_slice_mut(&mut values), &from.memory)?;
        to.iter_mut().zip(values).for_each(|(to, x)| *to = x.to_f32());
        Ok(())
    }

    fn copy(&self, to: &mut Buffer<D>, to_start: usize, from: &Buffer<D>, len: usize) -> Result<()> {
        let (source, target) = (self.values(from, len), self.values(to, to_start + len));
        assert_eq!(source.bf16, target.bf16, "a copy between a buffer and an activation");
        let (at, bytes) = (to.bytes(to_start), to.bytes(len));
        self.driver.copy(&mut to.memory, at, &from.memory, bytes)
    }

    fn zero(&self, buffer: &mut Buffer<D>, len: usize) -> Result<()> {
        self.values(buffer, len);
        let bytes = buffer.bytes(len);
        self.driver.zero(&mut buffer.memory, bytes)
    }

    fn matrix<'w>(&self, weight: Weight<'w>) -> Result<Matrix<D>> {
        Matrix::upload(&self.driver, weight)
    }

    fn embed(&self, out: &mut Buffer<D>, table: &Matrix<D>, tokens: &[u32]) -> Result<()> {
        let table = table.of(&self.driver);
        let out = self.f32(out, tokens.len() * table.columns as usize);
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
        let (y, inv_rms) = (self.bf16(y, values), self.f32(inv_rms, tokens));
        let (x, weight) = (self.f32(x, values), self.f32(weight, weight.len));
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
        let (dx, dy, x) = (self.f32(dx, values), self.f32(dy, values), self.f32(x, values));
        let (inv_rms, weight) = (self.f32(inv_rms, tokens), self.f32(weight, weight.len));
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
        let (tokens, table) = (positions.len(), self.f32(table, end * head_dim));
        let x = self.bf16(x, tokens * heads * head_dim);
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
        let inputs = [self.bf16(q, wide), self.bf16(k, narrow), self.bf16(v, narrow)];
        let prefix = match prefix {
            None => None,
            Some(Prefix { k, v, len }) => {
                let values = len * shape.kv_width();
                Some(launch::Prefix { k: self.bf16(k, values), v: self.bf16(v, values), len: size(len)? })
            }
        };
        let (o, lse) = (self.bf16(o, wide), self.f32(lse, tokens * shape.heads));
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
        let inputs = [self.bf16(q, wide), self.bf16(k, narrow), self.bf16(v, narrow)];
        let (d_o, o) = (self.bf16(d_o, wide), self.bf16(o, wide));
        let delta = state.partial.f32(&self.driver, tokens * shape.heads)?;
        let saved = Saved { d_o, lse: self.f32(lse, tokens * shape.heads), delta };
        let (dq, dk, dv) = (self.bf16(dq, wide), self.bf16(dk, narrow), self.bf16(dv, narrow));
        self.run(&launch::attention_delta(delta, size(tokens)?, &attention, d_o, o))?;
        self.run(&launch::attention_dq(dq, &attention, &saved, inputs))?;
        self.run(&launch::attention_dkv([dk, dv], &attention, &saved, inputs))
    }

    fn swiglu(&self, out: &mut Buffer<D>, len: usize, gate: &Buffer<D>, up: &Buffer<D>) -> Result<()> {
        let (out, gate, up) = (self.bf16(out, len), self.bf16(gate, len), self.bf16(up, len));
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
        let (dgate, dup) = (self.bf16(dgate, len), self.bf16(dup, len));
        let (gate, up) = (self.bf16(gate, len), self.bf16(up, len));
        self.run(&launch::swiglu_backward(dgate, dup, len as u64, gate, up))
    }

    fn gather(&self, out: &mut Buffer<D>, x: &Buffer<D>, rows: &[u32], d: usize) -> Result<()> {
        let end = rows.iter().max().map_or(0, |&last| last as usize + 1);
        let (out, x) = (self.f32(out, rows.len() * d), self.f32(x, end * d));
        let (count, rows) = (size(rows.len())?, self.state().ids.on_device(&self.driver, rows)?);
        self.run(&launch::gather(out, x, rows, count, size(d)?))
    }

    fn scatter(&self, out: &mut Buffer<D>, tokens: usize, x: &Buffer<D>, rows: &[u32], d: usize) -> Result<()> {
        let end = rows.last().map_or(0, |&last| last as usize + 1);
        assert!(end <= tokens, "row {end} of {tokens}");
        self.zero(out, tokens * d)?;
        let (out, x) = (self.f32(out, tokens * d), self.f32(x, rows.len() * d));
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
        let (x, count) = (self.f32(x, len), launch::squares_parts(len64));
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
        let state = [self.f32(params, len), self.f32(m, len), self.f32(v, len)];
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

    fn workspace_bytes(&self, tokens: usize, widest: usize) -> u64 {
        // An f32 gradient as an operand, and what the adapter's few columns take beside it; the head's block of logits.
        4 * (tokens * widest) as u64 + loss::bytes(tokens)
    }
}
