//! The backend's operations. Products, attention and the loss have files of their own.

use super::buffer::{Activations, Buffer, Memory, pitch, size};
use super::driver::Driver;
use super::launcher::Cuda;
use super::matrix::Matrix;
use super::plan;
use crate::backend::{
    AdamW, AdamWStep, Attention, AttentionBackward, Backend, HeadLoss, HeadNorm, HeadNormBackward, Linear,
    LinearBackward, RmsNorm, RmsNormBackward, Rope, StoredWeight, Workload,
};
use crate::config::Config;
use crate::{Error, Result};
use half::bf16;
use hydra_ptx::launch::{self, MAX_HEAD_DIM};
use std::ops::Range;

/// Columns of a head in the kernels' type. They take them in pairs.
fn even(head_dim: usize) -> Result<u32> {
    if head_dim.is_multiple_of(2) {
        size(head_dim)
    } else {
        Err(Error::Invalid(format!("heads of {head_dim} columns")))
    }
}

/// A width of rows for `len` values that lie one after the other.
fn any_width(len: usize) -> usize {
    if len.is_multiple_of(8) { 8 } else { len }
}

impl<D: Driver> Cuda<D> {
    /// `out[i] = x[rows[i]]`, rows of `d` values.
    fn gather_words(&self, out: &Memory<D>, x: &Memory<D>, rows: &[u32], d: usize) -> Result<()> {
        let end = rows.iter().max().map_or(0, |&last| last as usize + 1);
        let (out, (x, pitch)) = (out.values(&self.driver, rows.len() * d), x.matrix(&self.driver, end, d));
        // The kernel copies words of 32 bits, which hold two bf16.
        assert!(!x.bf16 || d.is_multiple_of(2), "rows of {d} bf16");
        let in_words = |values: usize| size(if x.bf16 { values / 2 } else { values });
        let (words, x) = (in_words(d)?, launch::Rows { at: x.at, pitch: in_words(pitch)? });
        let state = &mut *self.state();
        let (count, rows) = (size(rows.len())?, state.ids.on_device(&self.driver, rows)?);
        self.run(&launch::gather(out.at, x, rows, count, words))
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

    fn operand(&self, rows: usize, width: usize) -> Result<Activations<D>> {
        match self.driver.room(rows, width)? {
            0 => self.activations(rows * width),
            room => Memory::spaced(&self.driver, rows, width, room).map(Activations),
        }
    }

    fn operand_bytes(&self, rows: usize, width: usize) -> u64 {
        // Without an answer there will be no memory, either.
        let width = match self.driver.room(rows, width) {
            Ok(0) | Err(_) => width as u64,
            Ok(room) => pitch(width, room) as u64,
        };
        (rows as u64).saturating_mul(width).saturating_mul(size_of::<bf16>() as u64)
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
        to.0.copy(&self.driver, start, &from.0, 0..len)
    }

    fn copy_activations(
        &self,
        to: &mut Activations<D>,
        start: usize,
        from: &Activations<D>,
        values: Range<usize>,
    ) -> Result<()> {
        to.0.copy(&self.driver, start, &from.0, values)
    }

    fn zero(&self, buffer: &mut Buffer<D>, len: usize) -> Result<()> {
        buffer.0.zero(&self.driver, 1, len)
    }

    fn add(&self, y: &mut Buffer<D>, x: &Buffer<D>, len: usize) -> Result<()> {
        let (y, x) = (y.0.values(&self.driver, len), self.f32(x, len));
        self.run(&launch::add_bias(y, 1, x, size(len)?))
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
        let (y, inv_rms) = (self.rows(y, tokens, weight.len())?, self.f32(inv_rms, tokens));
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

    fn head_norm(&self, args: HeadNorm<'_, Self>) -> Result<()> {
        let HeadNorm { y, heads, x, weight, eps } = args;
        let (d, values) = (even(weight.len())?, heads * weight.len());
        let (y, x, weight) = (self.bf16(y, values), self.bf16(x, values), self.f32(weight, weight.len()));
        self.run(&launch::head_norm(y, x, weight, [size(heads)?, d], eps))
    }

    fn head_norm_backward(&self, args: HeadNormBackward<'_, Self>) -> Result<()> {
        let HeadNormBackward { dx, heads, x, weight, eps } = args;
        let (d, head_dim) = (even(weight.len())?, weight.len());
        let width = dx.0.width().unwrap_or(head_dim);
        let (rows, n_heads) = (heads * head_dim / width, width / head_dim);
        let dx = self.rows(dx, rows, width)?;
        let (x, weight) = (self.bf16(x, heads * head_dim), self.f32(weight, head_dim));
        self.run(&launch::head_norm_backward(dx, x, weight, [size(rows)?, size(n_heads)?, d], eps))
    }

    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        let Rope { x, n_heads, head_dim, table, positions, inverse } = args;
        let end = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let (tokens, table) = (positions.len(), self.f32(table, end * head_dim));
        let x = self.rows(x, tokens, n_heads * head_dim)?;
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

    fn attention(&self, args: Attention<'_, Self>) -> Result<()> {
        self.attention_forward(args)
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        self.attention_gradient(args)
    }

    fn swiglu(&self, out: &mut Activations<D>, len: usize, gate: &Activations<D>, up: &Activations<D>) -> Result<()> {
        let width = out.0.width().unwrap_or(any_width(len));
        let rows = len / width.max(1);
        let (out, gate, up) = (self.rows(out, rows, width)?, self.bf16(gate, len), self.bf16(up, len));
        self.run(&launch::swiglu(out, [size(rows)?, size(width)?], gate, up))
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Activations<D>,
        dup: &mut Activations<D>,
        len: usize,
        gate: &Activations<D>,
        up: &Activations<D>,
    ) -> Result<()> {
        let width = dgate.0.width().or(dup.0.width()).unwrap_or(any_width(len));
        let rows = len / width.max(1);
        let (dgate, dup) = (self.rows(dgate, rows, width)?, self.rows(dup, rows, width)?);
        let (gate, up) = (self.bf16(gate, len), self.bf16(up, len));
        self.run(&launch::swiglu_backward(dgate, dup, [size(rows)?, size(width)?], gate, up))
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

    fn adamw(&self, args: AdamWStep<'_, Self>) -> Result<()> {
        let AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step: t, grad_scale } = args;
        let AdamW { beta1, beta2, eps, weight_decay } = adam;
        // Powers in f64, because beta2^t is close to 1 for the first thousand steps.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let len = rates.iter().map(|(range, _)| range.end).max().unwrap_or(0);
        let state = [self.f32(params, len), self.f32(exp_avg, len), self.f32(exp_avg_sq, len)];
        let grads = self.f32(grads, len);
        for (range, lr) in rates {
            let step = launch::AdamWStep {
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

    fn supports(&self, config: &Config) -> Result<()> {
        if config.head_dim > MAX_HEAD_DIM as usize {
            let (name, d) = (config.architecture.family.name(), config.head_dim);
            let what = format!("a {name} with heads of {d} columns: attention on a GPU takes at most {MAX_HEAD_DIM}");
            return Err(Error::Device(what));
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("{}, bf16", self.driver.describe())
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.driver.free_bytes().map(Some)
    }

    fn workspace_bytes(&self, work: &[Workload<'_>]) -> u64 {
        plan::bytes(&self.driver, work)
    }
}
