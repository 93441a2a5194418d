//! [`Backend`] on the CPU: each operation finds its buffers' types and goes to the room that does it.

use super::super::{Accumulate, AdamW, AdapterArgs, AttentionShape, Backend, Prefix, Weight};
use super::buffer::{Buffer, Element, convert};
use super::workspace::Workspace;
use super::{Cpu, Precision, attention, linear, loss};
use crate::Result;
use crate::batch::Segment;
use crate::config::Config;
use core::ops::Range;
use half::bf16;
use hydra_kernels::gemm::{Values, ValuesMut};

impl Backend for Cpu {
    type Buffer = Buffer;
    type Matrix<'w> = Weight<'w>;

    fn buffer(&self, len: usize) -> Result<Buffer> {
        Buffer::zeroed::<f32>(len)
    }

    fn activation(&self, len: usize) -> Result<Buffer> {
        match self.precision {
            Precision::F32 => Buffer::zeroed::<f32>(len),
            Precision::Bf16 => Buffer::zeroed::<bf16>(len),
        }
    }

    fn activation_bytes(&self) -> usize {
        match self.precision {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }

    fn upload(&self, to: &mut Buffer, from: &[f32]) -> Result<()> {
        convert(self.bf16_isa, to.values_mut().first(from.len()), Values::F32(from))
    }

    fn download(&self, to: &mut [f32], from: &Buffer) -> Result<()> {
        let len = to.len();
        convert(self.bf16_isa, ValuesMut::F32(to), from.values().first(len))
    }

    fn copy(&self, to: &mut Buffer, to_start: usize, from: &Buffer, len: usize) -> Result<()> {
        match (to, from) {
            (Buffer::F32(to), Buffer::F32(from)) => self.copy_values(&mut to[to_start..to_start + len], &from[..len]),
            (Buffer::Bf16(to), Buffer::Bf16(from)) => self.copy_values(&mut to[to_start..to_start + len], &from[..len]),
            (to, from) => convert(self.bf16_isa, to.values_mut().skip(to_start).first(len), from.values().first(len))?,
        }
        Ok(())
    }

    fn zero(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        match buffer {
            Buffer::F32(values) => self.zero_values(&mut values[..len]),
            Buffer::Bf16(values) => self.zero_values(&mut values[..len]),
        }
        Ok(())
    }

    fn matrix<'w>(&self, weight: Weight<'w>) -> Result<Weight<'w>> {
        Ok(weight)
    }

    fn embed(&self, out: &mut Buffer, table: &Weight<'_>, tokens: &[u32]) -> Result<()> {
        self.embed_rows(f32::of_mut(out), table, tokens);
        Ok(())
    }

    fn rms_norm(
        &self,
        y: &mut Buffer,
        inv_rms: &mut Buffer,
        tokens: usize,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
    ) -> Result<()> {
        let (inv_rms, x, weight) = (f32::of_mut(inv_rms), f32::of(x), f32::of(weight));
        match y {
            Buffer::F32(y) => self.rms_norm_rows(y, inv_rms, tokens, x, weight, eps),
            Buffer::Bf16(y) => self.rms_norm_rows(y, inv_rms, tokens, x, weight, eps),
        }
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Buffer,
        tokens: usize,
        dy: &Buffer,
        x: &Buffer,
        inv_rms: &Buffer,
        weight: &Buffer,
    ) -> Result<()> {
        let (dy, x, inv_rms, weight) = (f32::of(dy), f32::of(x), f32::of(inv_rms), f32::of(weight));
        self.rms_norm_backward_rows(f32::of_mut(dx), tokens, dy, x, inv_rms, weight);
        Ok(())
    }

    fn rope(
        &self,
        x: &mut Buffer,
        n_heads: usize,
        head_dim: usize,
        table: &Buffer,
        positions: &[u32],
        inverse: bool,
    ) -> Result<()> {
        let table = f32::of(table);
        match x {
            Buffer::F32(x) => self.rope_rows(x, n_heads, head_dim, table, positions, inverse),
            Buffer::Bf16(x) => self.rope_rows(x, n_heads, head_dim, table, positions, inverse),
        }
        Ok(())
    }

    fn linear(
        &self,
        y: &mut Buffer,
        residual: Option<&Buffer>,
        tokens: usize,
        x: &Buffer,
        weight: &Weight<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &mut Buffer)>,
    ) -> Result<()> {
        let adapter = adapter.map(|(args, adapter_state)| (args, f32::of_mut(adapter_state)));
        let (y, residual, x) = (y.values_mut(), residual.map(Buffer::values), x.values());
        match self.precision {
            Precision::F32 => linear::forward::<f32>(self, self.isa, y, residual, tokens, x, weight, adapter),
            Precision::Bf16 => linear::forward::<bf16>(self, self.bf16_isa, y, residual, tokens, x, weight, adapter),
        }
    }

    fn linear_backward(
        &self,
        dx: Option<(&mut Buffer, Accumulate)>,
        dparams: Option<&mut Buffer>,
        tokens: usize,
        dy: &Buffer,
        x: &Buffer,
        weight: &Weight<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &Buffer)>,
    ) -> Result<()> {
        let dx = dx.map(|(dx, store)| (dx.values_mut(), store));
        let dparams = dparams.map(f32::of_mut);
        let adapter = adapter.map(|(args, adapter_state)| (args, f32::of(adapter_state)));
        let (dy, x) = (dy.values(), x.values());
        match self.precision {
            Precision::F32 => linear::backward::<f32>(self, self.isa, dx, dparams, tokens, dy, x, weight, adapter),
            Precision::Bf16 => {
                linear::backward::<bf16>(self, self.bf16_isa, dx, dparams, tokens, dy, x, weight, adapter)
            }
        }
    }

    fn attention(
        &self,
        o: &mut Buffer,
        lse: &mut Buffer,
        shape: AttentionShape,
        segments: &[Segment],
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        prefix: Option<Prefix<'_, Self>>,
    ) -> Result<()> {
        let lse = f32::of_mut(lse);
        match self.precision {
            Precision::F32 => {
                let [q, k, v] = [q, k, v].map(f32::of);
                let prefix = prefix.map(|p| (f32::of(p.k), f32::of(p.v), p.len));
                attention::forward(self, self.isa, f32::of_mut(o), lse, shape, segments, q, k, v, prefix)
            }
            Precision::Bf16 => {
                let [q, k, v] = [q, k, v].map(bf16::of);
                let prefix = prefix.map(|p| (bf16::of(p.k), bf16::of(p.v), p.len));
                attention::forward(self, self.bf16_isa, bf16::of_mut(o), lse, shape, segments, q, k, v, prefix)
            }
        }
    }

    fn attention_backward(
        &self,
        dq: &mut Buffer,
        dk: &mut Buffer,
        dv: &mut Buffer,
        shape: AttentionShape,
        segments: &[Segment],
        d_o: &Buffer,
        o: &Buffer,
        lse: &Buffer,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        let (gradients, lse) = ([dq, dk, dv], f32::of(lse));
        match self.precision {
            Precision::F32 => {
                let ([dq, dk, dv], [d_o, o, q, k, v]) = (gradients.map(f32::of_mut), [d_o, o, q, k, v].map(f32::of));
                let saved = attention::Saved { d_o, o, lse, q, k, v };
                attention::backward(self, self.isa, dq, dk, dv, shape, segments, saved)
            }
            Precision::Bf16 => {
                let ([dq, dk, dv], [d_o, o, q, k, v]) = (gradients.map(bf16::of_mut), [d_o, o, q, k, v].map(bf16::of));
                let saved = attention::Saved { d_o, o, lse, q, k, v };
                attention::backward(self, self.bf16_isa, dq, dk, dv, shape, segments, saved)
            }
        }
    }

    fn swiglu(&self, out: &mut Buffer, len: usize, gate: &Buffer, up: &Buffer) -> Result<()> {
        fn run<E: Element>(cpu: &Cpu, out: &mut Buffer, len: usize, gate: &Buffer, up: &Buffer) {
            cpu.swiglu_values(&mut E::of_mut(out)[..len], &E::of(gate)[..len], &E::of(up)[..len]);
        }
        match self.precision {
            Precision::F32 => run::<f32>(self, out, len, gate, up),
            Precision::Bf16 => run::<bf16>(self, out, len, gate, up),
        }
        Ok(())
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Buffer,
        dup: &mut Buffer,
        len: usize,
        gate: &Buffer,
        up: &Buffer,
    ) -> Result<()> {
        fn run<E: Element>(cpu: &Cpu, gradients: [&mut Buffer; 2], len: usize, values: [&Buffer; 2]) {
            let ([dgate, dup], [gate, up]) = (gradients.map(E::of_mut), values.map(E::of));
            cpu.swiglu_backward_values(&mut dgate[..len], &mut dup[..len], &gate[..len], &up[..len]);
        }
        match self.precision {
            Precision::F32 => run::<f32>(self, [dgate, dup], len, [gate, up]),
            Precision::Bf16 => run::<bf16>(self, [dgate, dup], len, [gate, up]),
        }
        Ok(())
    }

    fn gather(&self, out: &mut Buffer, x: &Buffer, rows: &[u32], d: usize) -> Result<()> {
        fn gather<E: Element>(out: &mut Buffer, x: &[E], rows: &[u32], d: usize) {
            for (out, &row) in E::of_mut(out).chunks_exact_mut(d).zip(rows) {
                out.copy_from_slice(&x[row as usize * d..][..d]);
            }
        }
        match x.values() {
            Values::F32(x) => gather(out, x, rows, d),
            Values::Bf16(x) => gather(out, x, rows, d),
        }
        Ok(())
    }

    fn scatter(&self, out: &mut Buffer, tokens: usize, x: &Buffer, rows: &[u32], d: usize) -> Result<()> {
        let out = f32::of_mut(out);
        self.zero_values(&mut out[..tokens * d]);
        for (x, &row) in f32::of(x).chunks_exact(d).zip(rows) {
            out[row as usize * d..][..d].copy_from_slice(x);
        }
        Ok(())
    }

    fn head_loss(
        &self,
        nll: &mut Buffer,
        dx: Option<&mut Buffer>,
        x: &Buffer,
        head: &Weight<'_>,
        targets: &[u32],
        scale: f32,
    ) -> Result<()> {
        let (nll, dx, x) = (f32::of_mut(nll), dx.map(f32::of_mut), x.values());
        match self.precision {
            Precision::F32 => loss::head_loss::<f32>(self, self.isa, nll, dx, x, head, targets, scale),
            Precision::Bf16 => loss::head_loss::<bf16>(self, self.bf16_isa, nll, dx, x, head, targets, scale),
        }
    }

    fn head_rows(&self, out: &mut [f32], x: &Buffer, rows: usize, head: &Weight<'_>, ids: &[u32]) -> Result<()> {
        loss::head_rows(self, out, x.values(), rows, head, ids)
    }

    fn sum_of_squares(&self, x: &Buffer, len: usize) -> Result<f64> {
        Ok(self.sum_of_squares_values(&f32::of(x)[..len]))
    }

    fn adamw(
        &self,
        params: &mut Buffer,
        m: &mut Buffer,
        v: &mut Buffer,
        grads: &Buffer,
        rates: &[(Range<usize>, f32)],
        adam: AdamW,
        t: u64,
        grad_scale: f32,
    ) -> Result<()> {
        let ([params, m, v], grads) = ([params, m, v].map(f32::of_mut), f32::of(grads));
        for (range, lr) in rates {
            let part = (&mut params[range.clone()], &mut m[range.clone()], &mut v[range.clone()]);
            self.adamw_values(part, &grads[range.clone()], adam, t, *lr, grad_scale);
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let (isa, precision) = match self.precision {
            Precision::F32 => (self.isa.name(), "f32"),
            Precision::Bf16 => (self.bf16_isa.name(), "bf16"),
        };
        format!("cpu, {} thread{}, {isa}, {precision}", self.threads(), if self.threads() == 1 { "" } else { "s" })
    }

    fn workspace_bytes(&self, tokens: usize, config: &Config) -> u64 {
        Workspace::bytes(tokens, config.d_ffn.max(config.d_model), self.threads())
    }
}
