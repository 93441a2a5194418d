//! The CPU: `hydra-kernels` on a pool of threads.
//!
//! Threads live here and nowhere else. Kernels are pure and single-threaded; this module splits rows of outputs among
//! threads, or adds up parts in a fixed order, so that no result depends on the number of threads.

mod aligned;
mod attention;
mod attentive;
mod buffer;
mod elementwise;
mod gradient;
mod heads;
mod linear;
mod loss;
mod product;
mod workspace;

use super::{AdamW, AdapterArgs, AttentionShape, Backend, Prefix, Store, Weight};
use crate::batch::Segment;
use crate::{Error, Result};
pub use aligned::Aligned;
use attentive::Attentive;
pub use buffer::Buffer;
use buffer::{Element, convert};
use core::ops::Range;
use half::bf16;
use hydra_kernels::gemm::{Values, ValuesMut};
use hydra_kernels::isa::{Bf16Isa, Isa};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Mutex, MutexGuard, PoisonError};
use workspace::Workspace;

/// What matrices are multiplied in; everything else, and every sum, is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout: agrees with the reference to rounding.
    F32,
    /// The operands of the large products are rounded to bf16.
    Bf16,
}

/// How to set up the CPU.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// Number of threads; `None` takes one a core.
    pub threads: Option<usize>,
    /// Operand precision.
    pub precision: Precision,
    /// The widest f32 instruction set to use; `None` takes the machine's best.
    pub isa: Option<Isa>,
    /// The same for bf16 products.
    pub bf16_isa: Option<Bf16Isa>,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self { threads: None, precision: Precision::F32, isa: None, bf16_isa: None }
    }
}

/// The CPU as a [`Backend`].
pub struct Cpu {
    pool: ThreadPool,
    attentive: Attentive,
    threads: usize,
    precision: Precision,
    isa: Isa,
    bf16_isa: Bf16Isa,
    workspace: Mutex<Workspace>,
    /// One a thread, the last for callers that aren't of the pool; taken for the length of one task.
    scratch: Vec<Mutex<Aligned<f32>>>,
}

impl Cpu {
    /// Starts the threads. Fails if there can't be that many.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let threads = match options.threads {
            Some(0) => return Err(Error::Invalid("0 threads".into())),
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("hydra-{i}"))
            .build()
            .map_err(|e| Error::Invalid(format!("can't start {threads} threads: {e}")))?;
        Ok(Self {
            pool,
            attentive: Attentive::default(),
            threads,
            precision: options.precision,
            isa: options.isa.unwrap_or_else(Isa::detect),
            bf16_isa: options.bf16_isa.unwrap_or_else(Bf16Isa::detect),
            workspace: Mutex::default(),
            scratch: (0..=threads).map(|_| Mutex::default()).collect(),
        })
    }

    /// Number of threads in use.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Operand precision.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    fn workspace(&self) -> MutexGuard<'_, Workspace> {
        // What a panicking call left behind is overwritten before it is read.
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` floats of this thread's scratch; what they hold is not specified.
    fn with_scratch<R>(&self, len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
        let slot = self.pool.current_thread_index().unwrap_or(self.threads);
        let mut scratch = self.scratch[slot].lock().unwrap_or_else(PoisonError::into_inner);
        body(&mut scratch.reserve(len)[..len])
    }

    /// Runs `op` on parts of `len` values of `y` and their places, the first of them here: a small result takes no other thread.
    fn in_parts(&self, y: &mut [f32], len: usize, op: impl Fn(usize, &mut [f32]) -> Result<()> + Sync) -> Result<()> {
        let (here, others) = y.split_at_mut(len.min(y.len()));
        if others.is_empty() {
            return op(0, here);
        }
        let failed = Mutex::new(None);
        let done = self.pool.in_place_scope(|scope| {
            for (i, part) in others.chunks_mut(len).enumerate() {
                let (op, failed) = (&op, &failed);
                scope.spawn(move |_| {
                    if let Err(error) = op((i + 1) * len, part) {
                        *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    }
                });
            }
            op(0, here)
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(done, Err)
    }

    /// Rows a task takes: two tasks a thread, a multiple of the tile's height, and few enough that a task's results stay in its
    /// core's L2 for what comes next; every task reads all of a weight's panels.
    fn row_chunk(&self, rows: usize) -> usize {
        let multiple = match self.precision {
            Precision::F32 => 48,
            Precision::Bf16 => 32,
        };
        rows.div_ceil(2 * self.threads).next_multiple_of(multiple).clamp(multiple, 16 * multiple)
    }
}

impl Backend for Cpu {
    type Buffer = Buffer;
    type Matrix<'w> = Weight<'w>;

    fn inside<R: Send>(&self, op: impl FnOnce() -> R + Send) -> R {
        self.attentive.run(&self.pool, op)
    }

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
        heads: usize,
        head_dim: usize,
        table: &Buffer,
        positions: &[u32],
        inverse: bool,
    ) -> Result<()> {
        let table = f32::of(table);
        match x {
            Buffer::F32(x) => self.rope_rows(x, heads, head_dim, table, positions, inverse),
            Buffer::Bf16(x) => self.rope_rows(x, heads, head_dim, table, positions, inverse),
        }
        Ok(())
    }

    fn linear(
        &self,
        y: &mut Buffer,
        store: Store,
        tokens: usize,
        x: &Buffer,
        weight: &Weight<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &mut Buffer)>,
    ) -> Result<()> {
        let adapter = adapter.map(|(args, hidden)| (args, f32::of_mut(hidden)));
        let (y, x) = (y.values_mut(), x.values());
        match self.precision {
            Precision::F32 => linear::forward::<f32>(self, self.isa, y, store, tokens, x, weight, adapter),
            Precision::Bf16 => linear::forward::<bf16>(self, self.bf16_isa, y, store, tokens, x, weight, adapter),
        }
    }

    fn linear_backward(
        &self,
        dx: Option<(&mut Buffer, Store)>,
        dparams: Option<&mut Buffer>,
        tokens: usize,
        dy: &Buffer,
        x: &Buffer,
        weight: &Weight<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &Buffer)>,
    ) -> Result<()> {
        let dx = dx.map(|(dx, store)| (dx.values_mut(), store));
        let dparams = dparams.map(f32::of_mut);
        let adapter = adapter.map(|(args, hidden)| (args, f32::of(hidden)));
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
        let x = f32::of(x);
        for (out, &row) in f32::of_mut(out).chunks_exact_mut(d).zip(rows) {
            out.copy_from_slice(&x[row as usize * d..][..d]);
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
        format!("cpu, {} thread{}, {isa}, {precision}", self.threads, if self.threads == 1 { "" } else { "s" })
    }

    fn workspace_bytes(&self, tokens: usize, widest: usize) -> u64 {
        Workspace::bytes(tokens, widest, self.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_kernels::{Format, RowOrder};

    fn cpu(threads: usize) -> Cpu {
        Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).unwrap()
    }

    #[test]
    fn parts_know_their_places_and_their_errors() {
        let cpu = cpu(3);
        for len in [1, 3, 4, 10, 11] {
            let mut y = vec![0.0; 10];
            let number = |first: usize, y: &mut [f32]| {
                y.iter_mut().enumerate().for_each(|(i, y)| *y = (first + i) as f32);
                Ok(())
            };
            cpu.in_parts(&mut y, len, number).unwrap();
            assert!(y.iter().enumerate().all(|(i, &y)| y == i as f32), "{y:?}");
            for bad in (0..10).step_by(len) {
                let fail = |first, _: &mut [f32]| if first == bad { Err(Error::Invalid("bad".into())) } else { Ok(()) };
                assert!(cpu.in_parts(&mut y, len, fail).is_err());
            }
        }
    }

    /// A weight that is worth several threads: the same bits from any number of them.
    #[test]
    fn one_token_has_the_same_bits_on_any_number_of_threads() {
        let (rows, cols) = (1001, 1024);
        let data: Vec<u8> = (0..rows * cols).flat_map(|i| ((i % 251) as f32 - 125.0).to_le_bytes()).collect();
        let weight = Weight::new(Format::F32, rows, cols, &data, RowOrder::Natural).unwrap();
        let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |threads: usize, store: Store| {
            let (mut y, x) = (Buffer::F32(vec![0.5; rows].as_slice().into()), Buffer::F32(x.as_slice().into()));
            cpu(threads).linear(&mut y, store, 1, &x, &weight, None).unwrap();
            f32::of(&y).to_vec()
        };
        let (set, added) = (run(1, Store::Overwrite), run(1, Store::Accumulate));
        assert!(set.iter().zip(&added).all(|(set, added)| 0.5 + set == *added));
        for threads in [2, 3, 8] {
            assert_eq!(run(threads, Store::Overwrite), set);
            assert_eq!(run(threads, Store::Accumulate), added);
        }
    }
}
