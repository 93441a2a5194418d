//! [`Backend`] on the CPU: each operation chooses the precision and goes to the file that computes it.

use super::binding::Bound;
use super::buffer::{Activations, Buffer, Element, convert, zeroed};
use super::elementwise::AdamWUpdate;
use super::exec::{Exec, with_element};
use super::workspace::Workspace;
use super::{Cpu, Precision, attention, linear, loss};
use crate::backend::{
    AdamWStep, Attention, AttentionBackward, AttentionRows, Backend, HeadLoss, HeadNorm, HeadNormBackward, Linear,
    LinearBackward, LinearRows, RmsNorm, RmsNormBackward, Rope, StoredWeight, Workload,
};
use crate::{Error, Result};
use half::bf16;
use hydra_kernels::gemm::{Values, ValuesMut};
use std::ops::Range;

impl Backend for Cpu {
    type Buffer = Buffer;
    type Activations = Activations;
    type Matrix = StoredWeight;

    fn buffer(&self, len: usize) -> Result<Buffer> {
        zeroed(len)
    }

    fn activations(&self, len: usize) -> Result<Activations> {
        match self.precision {
            Precision::F32 | Precision::Q8 => zeroed(len).map(Activations::F32),
            Precision::Bf16 => zeroed(len).map(Activations::Bf16),
        }
    }

    fn bind_caller(&self) -> Option<Bound> {
        self.threads.bind_caller()
    }

    fn activation_bytes(&self) -> usize {
        with_element!(self.precision, E => size_of::<E>())
    }

    fn matrix(&self, weight: StoredWeight) -> Result<StoredWeight> {
        Ok(weight)
    }

    fn upload(&self, to: &mut Buffer, from: &[f32]) -> Result<()> {
        to[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&self, to: &mut [f32], from: &Buffer) -> Result<()> {
        to.copy_from_slice(&from[..to.len()]);
        Ok(())
    }

    fn upload_activations(&self, to: &mut Activations, from: &[f32]) -> Result<()> {
        convert(self.bf16_isa, to.values_mut().first(from.len()), Values::F32(from))
    }

    fn download_activations(&self, to: &mut [f32], from: &Activations) -> Result<()> {
        let len = to.len();
        convert(self.bf16_isa, ValuesMut::F32(to), from.values().first(len))
    }

    fn copy(&self, to: &mut Buffer, start: usize, from: &Buffer, len: usize) -> Result<()> {
        self.copy_values(&mut to[start..start + len], &from[..len]);
        Ok(())
    }

    fn copy_activations(
        &self,
        to: &mut Activations,
        start: usize,
        from: &Activations,
        values: Range<usize>,
    ) -> Result<()> {
        let end = start + values.len();
        match to {
            Activations::F32(to) => self.copy_values(&mut to[start..end], &f32::of(from)?[values]),
            Activations::Bf16(to) => self.copy_values(&mut to[start..end], &bf16::of(from)?[values]),
        }
        Ok(())
    }

    fn zero(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        self.zero_values(&mut buffer[..len]);
        Ok(())
    }

    fn add(&self, y: &mut Buffer, x: &Buffer, len: usize) -> Result<()> {
        self.add_values(&mut y[..len], &x[..len]);
        Ok(())
    }

    fn embed(&self, out: &mut Buffer, table: &StoredWeight, tokens: &[u32]) -> Result<()> {
        self.embed_rows(out, &table.weight(), tokens);
        Ok(())
    }

    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<()> {
        let RmsNorm { y, inv_rms, tokens, x, weight, eps } = args;
        match y {
            Activations::F32(y) => self.rms_norm_rows(y, inv_rms, tokens, x, weight, eps),
            Activations::Bf16(y) => self.rms_norm_rows(y, inv_rms, tokens, x, weight, eps),
        }
        Ok(())
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()> {
        let RmsNormBackward { dx, tokens, dy, x, inv_rms, weight } = args;
        self.rms_norm_backward_rows(dx, tokens, dy, x, inv_rms, weight);
        Ok(())
    }

    fn head_norm(&self, args: HeadNorm<'_, Self>) -> Result<()> {
        let HeadNorm { y, heads, x, weight, eps } = args;
        match y {
            Activations::F32(y) => self.head_norm_rows(y, heads, f32::of(x)?, weight, eps),
            Activations::Bf16(y) => self.head_norm_rows(y, heads, bf16::of(x)?, weight, eps),
        }
        Ok(())
    }

    fn head_norm_backward(&self, args: HeadNormBackward<'_, Self>) -> Result<()> {
        let HeadNormBackward { dx, heads, x, weight, eps } = args;
        match dx {
            Activations::F32(dx) => self.head_norm_backward_rows(dx, heads, f32::of(x)?, weight, eps),
            Activations::Bf16(dx) => self.head_norm_backward_rows(dx, heads, bf16::of(x)?, weight, eps),
        }
        Ok(())
    }

    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        let Rope { x, n_heads, head_dim, table, positions, inverse } = args;
        match x {
            Activations::F32(x) => self.rope_rows(x, n_heads, head_dim, table, positions, inverse),
            Activations::Bf16(x) => self.rope_rows(x, n_heads, head_dim, table, positions, inverse),
        }
        Ok(())
    }

    fn linear(&self, args: Linear<'_, Self>) -> Result<()> {
        with_element!(self.precision, E => linear::forward::<E>(Exec::new(self), args))
    }

    fn batches(&self) -> bool {
        true
    }

    fn linear_rows(&self, args: LinearRows<'_, Self>) -> Result<()> {
        with_element!(self.precision, E => linear::rows::<E>(Exec::new(self), args))
    }

    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<()> {
        self.trains()?;
        with_element!(self.precision, E => linear::backward::<E>(Exec::new(self), args))
    }

    fn attention(&self, args: Attention<'_, Self>) -> Result<()> {
        with_element!(self.precision, E => attention::forward::<E>(Exec::new(self), args))
    }

    fn attention_rows(&self, args: AttentionRows<'_, Self>) -> Result<()> {
        with_element!(self.precision, E => attention::rows::<E>(Exec::new(self), args))
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        with_element!(self.precision, E => attention::backward::<E>(Exec::new(self), args))
    }

    fn swiglu(&self, out: &mut Activations, len: usize, gate: &Activations, up: &Activations) -> Result<()> {
        match out {
            Activations::F32(out) => self.swiglu_values(&mut out[..len], &f32::of(gate)?[..len], &f32::of(up)?[..len]),
            Activations::Bf16(out) => {
                self.swiglu_values(&mut out[..len], &bf16::of(gate)?[..len], &bf16::of(up)?[..len])
            }
        }
        Ok(())
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Activations,
        dup: &mut Activations,
        len: usize,
        gate: &Activations,
        up: &Activations,
    ) -> Result<()> {
        fn run<E: Element>(
            cpu: &Cpu,
            gradients: [&mut Activations; 2],
            len: usize,
            [gate, up]: [&Activations; 2],
        ) -> Result<()> {
            let [dgate, dup] = gradients.map(E::of_mut);
            cpu.swiglu_backward_values(&mut dgate?[..len], &mut dup?[..len], &E::of(gate)?[..len], &E::of(up)?[..len]);
            Ok(())
        }
        with_element!(self.precision, E => run::<E>(self, [dgate, dup], len, [gate, up]))
    }

    fn gather(&self, out: &mut Buffer, x: &Buffer, rows: &[u32], d: usize) -> Result<()> {
        gather_rows(out, x, rows, d);
        Ok(())
    }

    fn gather_activations(&self, out: &mut Activations, x: &Activations, rows: &[u32], d: usize) -> Result<()> {
        match out {
            Activations::F32(out) => gather_rows(out, f32::of(x)?, rows, d),
            Activations::Bf16(out) => gather_rows(out, bf16::of(x)?, rows, d),
        }
        Ok(())
    }

    fn scatter(&self, out: &mut Buffer, tokens: usize, x: &Buffer, rows: &[u32], d: usize) -> Result<()> {
        self.zero_values(&mut out[..tokens * d]);
        for (x, &row) in x.chunks_exact(d).zip(rows) {
            out[row as usize * d..][..d].copy_from_slice(x);
        }
        Ok(())
    }

    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Result<()> {
        with_element!(self.precision, E => loss::head_loss::<E>(Exec::new(self), args))
    }

    fn head_rows(&self, out: &mut [f32], x: &Activations, rows: usize, head: &StoredWeight, ids: &[u32]) -> Result<()> {
        loss::head_rows(self, out, x.values(), rows, &head.weight(), ids)
    }

    fn sum_of_squares(&self, x: &Buffer, len: usize) -> Result<f64> {
        Ok(self.sum_of_squares_values(&x[..len]))
    }

    fn adamw(&self, args: AdamWStep<'_, Self>) -> Result<()> {
        for (range, lr) in args.rates {
            let [params, exp_avg, exp_avg_sq] =
                [&mut *args.params, &mut *args.exp_avg, &mut *args.exp_avg_sq].map(|part| &mut part[range.clone()]);
            let update = AdamWUpdate::new(args.adam, args.step, *lr, args.grad_scale);
            self.adamw_values([params, exp_avg, exp_avg_sq], &args.grads[range.clone()], update);
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let isa = match self.precision {
            Precision::F32 => self.isa.name(),
            Precision::Bf16 => self.bf16_isa.name(),
            Precision::Q8 => self.q8_isa.name(),
        };
        let (threads, precision) = (self.threads(), self.precision.name());
        format!("cpu, {threads} thread{}, {isa}, {precision}", if threads == 1 { "" } else { "s" })
    }

    fn trains(&self) -> Result<()> {
        if self.precision == Precision::Q8 {
            let why = "precision q8 is for evaluation and generation, and computes no gradient: train in f32 or bf16";
            return Err(Error::Invalid(why.into()));
        }
        Ok(())
    }

    fn workspace_bytes(&self, work: &[Workload<'_>]) -> u64 {
        let bytes = |&Workload { config, tokens, .. }: &Workload<'_>| {
            Workspace::bytes(tokens, config.d_ffn.max(config.d_model), self.threads())
        };
        work.iter().map(bytes).max().unwrap_or(0)
    }
}

fn gather_rows<E: Element>(out: &mut [E], x: &[E], rows: &[u32], d: usize) {
    for (out, &row) in out.chunks_exact_mut(d).zip(rows) {
        out.copy_from_slice(&x[row as usize * d..][..d]);
    }
}
