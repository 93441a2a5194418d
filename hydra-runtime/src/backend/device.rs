//! A device that is chosen at run time: the CPU, or with the feature `cuda` a GPU. Programs that use it need no type parameter
//! for the device.

mod values;

use super::cpu::{self, Cpu, CpuOptions};
#[cfg(feature = "cuda")]
use super::cuda::{Cuda, Gpu};
use super::{
    AdamWStep, AdapterArgs, AnyBuffer, AnyBufferMut, Attention, AttentionBackward, AttentionRows, Backend, CachedRows,
    HeadLoss, HeadNorm, HeadNormBackward, Linear, LinearBackward, LinearOutput, LinearRows, Prefix, RmsNorm,
    RmsNormBackward, Rope, RowGroup, StoredWeight, Workload,
};
use crate::Result;
use crate::config::Config;
use std::ops::Range;

use values::Member;
pub use values::{Activations, Buffer, Matrix};

/// A device that is chosen at run time.
pub enum Device {
    /// The CPU.
    Cpu(Cpu),
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(Box<Cuda<Gpu>>),
}

impl Device {
    /// The CPU. Fails if it can't start its threads.
    pub fn cpu(options: CpuOptions) -> Result<Self> {
        Cpu::new(options).map(Self::Cpu)
    }

    /// The NVIDIA GPU of this number, from 0. Fails if there is no such device, or no driver.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: u32) -> Result<Self> {
        Ok(Self::Cuda(Box::new(Cuda::new(Gpu::open(ordinal)?))))
    }
}

/// `$body` with the backend that the device is, and, if asked for, with its type.
macro_rules! on {
    ($device:expr, $backend:ident => $body:expr) => {
        match $device {
            Device::Cpu($backend) => $body,
            #[cfg(feature = "cuda")]
            Device::Cuda($backend) => $body,
        }
    };
    ($device:expr, $backend:ident: $Member:ident => $body:expr) => {
        match $device {
            Device::Cpu($backend) => {
                type $Member = Cpu;
                $body
            }
            #[cfg(feature = "cuda")]
            Device::Cuda($backend) => {
                type $Member = Cuda<Gpu>;
                $body
            }
        }
    };
}

fn any<'a, B: Member>(buffer: AnyBuffer<'a, Device>) -> Result<AnyBuffer<'a, B>> {
    Ok(match buffer {
        AnyBuffer::Buffer(buffer) => AnyBuffer::Buffer(B::f32(buffer)?),
        AnyBuffer::Activations(activations) => AnyBuffer::Activations(B::act(activations)?),
    })
}

fn any_mut<'a, B: Member>(buffer: AnyBufferMut<'a, Device>) -> Result<AnyBufferMut<'a, B>> {
    Ok(match buffer {
        AnyBufferMut::Buffer(buffer) => AnyBufferMut::Buffer(B::f32_mut(buffer)?),
        AnyBufferMut::Activations(activations) => AnyBufferMut::Activations(B::act_mut(activations)?),
    })
}

fn output<'a, B: Member>(output: LinearOutput<'a, Device>) -> Result<LinearOutput<'a, B>> {
    Ok(match output {
        LinearOutput::Buffer { y, residual } => {
            LinearOutput::Buffer { y: B::f32_mut(y)?, residual: residual.map(B::f32).transpose()? }
        }
        LinearOutput::Activations { y, residual } => {
            LinearOutput::Activations { y: B::act_mut(y)?, residual: residual.map(B::act).transpose()? }
        }
    })
}

fn adapter<'a, B: Member>(args: &AdapterArgs<'a, Device>) -> Result<AdapterArgs<'a, B>> {
    let AdapterArgs { slot, params, labels, dropout, head_dropout, balance } = *args;
    Ok(AdapterArgs { slot, params: B::f32(params)?, labels, dropout, head_dropout, balance })
}

fn prefix<'a, B: Member>(prefix: Prefix<'a, Device>) -> Result<Prefix<'a, B>> {
    let Prefix { k, v, len } = prefix;
    Ok(Prefix { k: B::act(k)?, v: B::act(v)?, len })
}

fn row_group<'a, B: Member>(group: &RowGroup<'a, Device>) -> Result<RowGroup<'a, B>> {
    Ok(RowGroup { rows: group.rows, adapter: group.adapter.as_ref().map(adapter::<B>).transpose()? })
}

fn cached_rows<'a, B: Member>(rows: &CachedRows<'a, Device>) -> Result<CachedRows<'a, B>> {
    let &CachedRows { rows, k, v, len } = rows;
    Ok(CachedRows { rows, k: B::act(k)?, v: B::act(v)?, len })
}

impl Backend for Device {
    type Buffer = Buffer;
    type Activations = Activations;
    type Matrix = Matrix;

    fn buffer(&self, len: usize) -> Result<Buffer> {
        on!(self, backend => backend.buffer(len).map(Buffer::from))
    }

    fn activations(&self, len: usize) -> Result<Activations> {
        on!(self, backend => backend.activations(len).map(Activations::from))
    }

    fn bind_caller(&self) -> Option<cpu::Bound> {
        on!(self, backend => backend.bind_caller())
    }

    fn operand(&self, rows: usize, width: usize) -> Result<Activations> {
        on!(self, backend => backend.operand(rows, width).map(Activations::from))
    }

    fn operand_bytes(&self, rows: usize, width: usize) -> u64 {
        on!(self, backend => backend.operand_bytes(rows, width))
    }

    fn activation_bytes(&self) -> usize {
        on!(self, backend => backend.activation_bytes())
    }

    fn matrix(&self, weight: StoredWeight) -> Result<Matrix> {
        on!(self, backend => backend.matrix(weight).map(Matrix::from))
    }

    fn upload(&self, to: &mut Buffer, from: &[f32]) -> Result<()> {
        on!(self, backend: B => backend.upload(B::f32_mut(to)?, from))
    }

    fn download(&self, to: &mut [f32], from: &Buffer) -> Result<()> {
        on!(self, backend: B => backend.download(to, B::f32(from)?))
    }

    fn upload_activations(&self, to: &mut Activations, from: &[f32]) -> Result<()> {
        on!(self, backend: B => backend.upload_activations(B::act_mut(to)?, from))
    }

    fn download_activations(&self, to: &mut [f32], from: &Activations) -> Result<()> {
        on!(self, backend: B => backend.download_activations(to, B::act(from)?))
    }

    fn copy(&self, to: &mut Buffer, start: usize, from: &Buffer, len: usize) -> Result<()> {
        on!(self, backend: B => backend.copy(B::f32_mut(to)?, start, B::f32(from)?, len))
    }

    fn copy_activations(
        &self,
        to: &mut Activations,
        start: usize,
        from: &Activations,
        values: Range<usize>,
    ) -> Result<()> {
        on!(self, backend: B => {
            backend.copy_activations(B::act_mut(to)?, start, B::act(from)?, values)
        })
    }

    fn zero(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        on!(self, backend: B => backend.zero(B::f32_mut(buffer)?, len))
    }

    fn add(&self, y: &mut Buffer, x: &Buffer, len: usize) -> Result<()> {
        on!(self, backend: B => backend.add(B::f32_mut(y)?, B::f32(x)?, len))
    }

    fn embed(&self, out: &mut Buffer, table: &Matrix, tokens: &[u32]) -> Result<()> {
        on!(self, backend: B => backend.embed(B::f32_mut(out)?, B::weight(table)?, tokens))
    }

    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<()> {
        let RmsNorm { y, inv_rms, tokens, x, weight, eps } = args;
        on!(self, backend: B => {
            let (y, inv_rms) = (B::act_mut(y)?, B::f32_mut(inv_rms)?);
            backend.rms_norm(RmsNorm { y, inv_rms, tokens, x: B::f32(x)?, weight: B::f32(weight)?, eps })
        })
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()> {
        let RmsNormBackward { dx, tokens, dy, x, inv_rms, weight } = args;
        on!(self, backend: B => {
            let (dy, x, inv_rms) = (B::f32(dy)?, B::f32(x)?, B::f32(inv_rms)?);
            let (dx, weight) = (B::f32_mut(dx)?, B::f32(weight)?);
            backend.rms_norm_backward(RmsNormBackward { dx, tokens, dy, x, inv_rms, weight })
        })
    }

    fn head_norm(&self, args: HeadNorm<'_, Self>) -> Result<()> {
        let HeadNorm { y, heads, x, weight, eps } = args;
        on!(self, backend: B => {
            let (y, x, weight) = (B::act_mut(y)?, B::act(x)?, B::f32(weight)?);
            backend.head_norm(HeadNorm { y, heads, x, weight, eps })
        })
    }

    fn head_norm_backward(&self, args: HeadNormBackward<'_, Self>) -> Result<()> {
        let HeadNormBackward { dx, heads, x, weight, eps } = args;
        on!(self, backend: B => {
            let (dx, x, weight) = (B::act_mut(dx)?, B::act(x)?, B::f32(weight)?);
            backend.head_norm_backward(HeadNormBackward { dx, heads, x, weight, eps })
        })
    }

    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        let Rope { x, n_heads, head_dim, table, positions, inverse } = args;
        on!(self, backend: B => {
            let (x, table) = (B::act_mut(x)?, B::f32(table)?);
            backend.rope(Rope { x, n_heads, head_dim, table, positions, inverse })
        })
    }

    fn linear(&self, args: Linear<'_, Self>) -> Result<()> {
        let Linear { output: y, tokens, x, weight, bias, adapter: args } = args;
        on!(self, backend: B => {
            let (output, x, weight) = (output::<B>(y)?, B::act(x)?, B::weight(weight)?);
            let bias = bias.map(B::f32).transpose()?;
            let Some((args, state)) = args else {
                return backend.linear(Linear { output, tokens, x, weight, bias, adapter: None });
            };
            let adapter = Some((&adapter::<B>(args)?, B::f32_mut(state)?));
            backend.linear(Linear { output, tokens, x, weight, bias, adapter })
        })
    }

    fn batches(&self) -> bool {
        on!(self, backend => backend.batches())
    }

    fn linear_rows(&self, args: LinearRows<'_, Self>) -> Result<()> {
        let LinearRows { output: y, x, weight, bias, kind, groups, states } = args;
        on!(self, backend: B => {
            let (output, x, weight) = (output::<B>(y)?, B::act(x)?, B::weight(weight)?);
            let (bias, states) = (bias.map(B::f32).transpose()?, states.map(B::f32_mut).transpose()?);
            let groups = &groups.iter().map(row_group::<B>).collect::<Result<Vec<_>>>()?;
            backend.linear_rows(LinearRows { output, x, weight, bias, kind, groups, states })
        })
    }

    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<()> {
        let LinearBackward { dx, dparams, tokens, dy, x, weight, adapter: args } = args;
        on!(self, backend: B => {
            let dx = match dx {
                Some((dx, accumulate)) => Some((any_mut::<B>(dx)?, accumulate)),
                None => None,
            };
            let dparams = dparams.map(B::f32_mut).transpose()?;
            let (dy, x, weight) = (any::<B>(dy)?, B::act(x)?, B::weight(weight)?);
            let Some((args, state)) = args else {
                return backend.linear_backward(LinearBackward { dx, dparams, tokens, dy, x, weight, adapter: None });
            };
            let adapter = Some((&adapter::<B>(args)?, B::f32(state)?));
            backend.linear_backward(LinearBackward { dx, dparams, tokens, dy, x, weight, adapter })
        })
    }

    fn attention(&self, args: Attention<'_, Self>) -> Result<()> {
        let Attention { o, lse, shape, segments, window, q, k, v, prefix: before } = args;
        on!(self, backend: B => {
            let (o, lse) = (B::act_mut(o)?, B::f32_mut(lse)?);
            let (q, k, v) = (B::act(q)?, B::act(k)?, B::act(v)?);
            let prefix = before.map(prefix::<B>).transpose()?;
            backend.attention(Attention { o, lse, shape, segments, window, q, k, v, prefix })
        })
    }

    fn attention_rows(&self, args: AttentionRows<'_, Self>) -> Result<()> {
        let AttentionRows { o, lse, shape, window, q, k, v, kind, sequences } = args;
        on!(self, backend: B => {
            let (o, lse) = (B::act_mut(o)?, B::f32_mut(lse)?);
            let (q, k, v) = (B::act(q)?, B::act(k)?, B::act(v)?);
            let sequences = &sequences.iter().map(cached_rows::<B>).collect::<Result<Vec<_>>>()?;
            backend.attention_rows(AttentionRows { o, lse, shape, window, q, k, v, kind, sequences })
        })
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        let AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v } = args;
        on!(self, backend: B => {
            let (dq, dk, dv) = (B::act_mut(dq)?, B::act_mut(dk)?, B::act_mut(dv)?);
            let (d_o, o, lse) = (B::act(d_o)?, B::act(o)?, B::f32(lse)?);
            let (q, k, v) = (B::act(q)?, B::act(k)?, B::act(v)?);
            backend.attention_backward(AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v })
        })
    }

    fn swiglu(&self, out: &mut Activations, len: usize, gate: &Activations, up: &Activations) -> Result<()> {
        on!(self, backend: B => {
            backend.swiglu(B::act_mut(out)?, len, B::act(gate)?, B::act(up)?)
        })
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Activations,
        dup: &mut Activations,
        len: usize,
        gate: &Activations,
        up: &Activations,
    ) -> Result<()> {
        on!(self, backend: B => {
            let (dgate, dup) = (B::act_mut(dgate)?, B::act_mut(dup)?);
            backend.swiglu_backward(dgate, dup, len, B::act(gate)?, B::act(up)?)
        })
    }

    fn gather(&self, out: &mut Buffer, x: &Buffer, rows: &[u32], d: usize) -> Result<()> {
        on!(self, backend: B => backend.gather(B::f32_mut(out)?, B::f32(x)?, rows, d))
    }

    fn gather_activations(&self, out: &mut Activations, x: &Activations, rows: &[u32], d: usize) -> Result<()> {
        on!(self, backend: B => backend.gather_activations(B::act_mut(out)?, B::act(x)?, rows, d))
    }

    fn scatter(&self, out: &mut Buffer, tokens: usize, x: &Buffer, rows: &[u32], d: usize) -> Result<()> {
        on!(self, backend: B => backend.scatter(B::f32_mut(out)?, tokens, B::f32(x)?, rows, d))
    }

    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Result<()> {
        let HeadLoss { nll, dx, x, lm_head, targets, scale } = args;
        on!(self, backend: B => {
            let (nll, dx) = (B::f32_mut(nll)?, dx.map(B::f32_mut).transpose()?);
            let (x, lm_head) = (B::act(x)?, B::weight(lm_head)?);
            backend.head_loss(HeadLoss { nll, dx, x, lm_head, targets, scale })
        })
    }

    fn head_rows(&self, out: &mut [f32], x: &Activations, rows: usize, head: &Matrix, ids: &[u32]) -> Result<()> {
        on!(self, backend: B => backend.head_rows(out, B::act(x)?, rows, B::weight(head)?, ids))
    }

    fn sum_of_squares(&self, x: &Buffer, len: usize) -> Result<f64> {
        on!(self, backend: B => backend.sum_of_squares(B::f32(x)?, len))
    }

    fn adamw(&self, args: AdamWStep<'_, Self>) -> Result<()> {
        let AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step, grad_scale } = args;
        on!(self, backend: B => {
            let (params, grads) = (B::f32_mut(params)?, B::f32(grads)?);
            let (exp_avg, exp_avg_sq) = (B::f32_mut(exp_avg)?, B::f32_mut(exp_avg_sq)?);
            backend.adamw(AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step, grad_scale })
        })
    }

    fn supports(&self, config: &Config) -> Result<()> {
        on!(self, backend => backend.supports(config))
    }

    fn describe(&self) -> String {
        on!(self, backend => backend.describe())
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        on!(self, backend => backend.free_bytes())
    }

    fn trains(&self) -> Result<()> {
        on!(self, backend => backend.trains())
    }

    fn workspace_bytes(&self, work: &[Workload<'_>]) -> u64 {
        on!(self, backend => backend.workspace_bytes(work))
    }
}
