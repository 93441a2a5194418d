//! The CPU: `hydra-kernels` on a pool of threads.
//!
//! Threads live here and nowhere else. Kernels are pure and single-threaded; this module splits rows of outputs among
//! threads, or adds up parts in a fixed order, so that no result depends on the number of threads.

mod attention;
mod elementwise;
mod linear;
mod loss;
mod product;
mod workspace;

use super::{AdamW, AdapterArgs, AttentionShape, Backend, Prefix, Store, Weight};
use crate::batch::Segment;
use crate::{Error, Result};
use half::bf16;
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
    threads: usize,
    precision: Precision,
    isa: Isa,
    bf16_isa: Bf16Isa,
    workspace: Mutex<Workspace>,
    /// One a thread, the last for callers that aren't of the pool; taken for the length of one task.
    scratch: Vec<Mutex<Vec<f32>>>,
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
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        body(&mut scratch[..len])
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

    /// Rows a task takes: four tasks a thread to even out the load, a multiple of every ISA's tile height, and few enough
    /// that a task's operands stay in its core's L2.
    fn row_chunk(&self, rows: usize) -> usize {
        rows.div_ceil(4 * self.threads).next_multiple_of(48).clamp(48, 384)
    }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Matrix<'w> = Weight<'w>;

    fn buffer(&self, len: usize) -> Result<Vec<f32>> {
        let mut buffer = Vec::<f32>::new();
        let refused = |_| Error::Invalid(format!("out of memory: {} MiB asked for", (len as u64) >> 18));
        buffer.try_reserve_exact(len).map_err(refused)?;
        drop(buffer);
        // Zeroed pages come from the system untouched: memory that is never used is never resident.
        Ok(vec![0.0; len])
    }

    fn upload(&self, to: &mut Vec<f32>, from: &[f32]) -> Result<()> {
        to[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&self, to: &mut [f32], from: &Vec<f32>) -> Result<()> {
        let len = to.len();
        to.copy_from_slice(&from[..len]);
        Ok(())
    }

    fn copy(&self, to: &mut Vec<f32>, to_start: usize, from: &Vec<f32>, len: usize) -> Result<()> {
        to[to_start..to_start + len].copy_from_slice(&from[..len]);
        Ok(())
    }

    fn zero(&self, buffer: &mut Vec<f32>, len: usize) -> Result<()> {
        buffer[..len].fill(0.0);
        Ok(())
    }

    fn matrix<'w>(&self, weight: Weight<'w>) -> Result<Weight<'w>> {
        Ok(weight)
    }

    fn embed(&self, out: &mut Vec<f32>, table: &Weight<'_>, tokens: &[u32]) -> Result<()> {
        self.embed_rows(out, table, tokens);
        Ok(())
    }

    fn rms_norm(
        &self,
        y: &mut Vec<f32>,
        inv_rms: &mut Vec<f32>,
        tokens: usize,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        eps: f32,
    ) -> Result<()> {
        self.rms_norm_rows(y, inv_rms, tokens, x, weight, eps);
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Vec<f32>,
        tokens: usize,
        dy: &Vec<f32>,
        x: &Vec<f32>,
        inv_rms: &Vec<f32>,
        weight: &Vec<f32>,
    ) -> Result<()> {
        self.rms_norm_backward_rows(dx, tokens, dy, x, inv_rms, weight);
        Ok(())
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        heads: usize,
        head_dim: usize,
        table: &Vec<f32>,
        positions: &[u32],
        inverse: bool,
    ) -> Result<()> {
        self.rope_rows(x, heads, head_dim, table, positions, inverse);
        Ok(())
    }

    fn linear(
        &self,
        y: &mut Vec<f32>,
        store: Store,
        tokens: usize,
        x: &Vec<f32>,
        weight: &Weight<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &mut Vec<f32>)>,
    ) -> Result<()> {
        let adapter = adapter.map(|(args, hidden)| (args, &mut hidden[..]));
        match self.precision {
            Precision::F32 => linear::forward::<f32>(self, self.isa, y, store, tokens, x, weight, adapter),
            Precision::Bf16 => linear::forward::<bf16>(self, self.bf16_isa, y, store, tokens, x, weight, adapter),
        }
    }

    fn linear_backward(
        &self,
        dx: Option<(&mut Vec<f32>, Store)>,
        dparams: Option<&mut Vec<f32>>,
        tokens: usize,
        dy: &Vec<f32>,
        x: &Vec<f32>,
        weight: &Weight<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &Vec<f32>)>,
    ) -> Result<()> {
        let dx = dx.map(|(dx, store)| (&mut dx[..], store));
        let dparams = dparams.map(|d| &mut d[..]);
        let adapter = adapter.map(|(args, hidden)| (args, &hidden[..]));
        match self.precision {
            Precision::F32 => linear::backward::<f32>(self, self.isa, dx, dparams, tokens, dy, x, weight, adapter),
            Precision::Bf16 => {
                linear::backward::<bf16>(self, self.bf16_isa, dx, dparams, tokens, dy, x, weight, adapter)
            }
        }
    }

    fn attention(
        &self,
        o: &mut Vec<f32>,
        lse: &mut Vec<f32>,
        shape: AttentionShape,
        segments: &[Segment],
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        prefix: Option<Prefix<'_, Self>>,
    ) -> Result<()> {
        let prefix = prefix.map(|p| (&p.k[..], &p.v[..], p.len));
        attention::forward(self, o, lse, shape, segments, q, k, v, prefix)
    }

    fn attention_backward(
        &self,
        dq: &mut Vec<f32>,
        dk: &mut Vec<f32>,
        dv: &mut Vec<f32>,
        shape: AttentionShape,
        segments: &[Segment],
        d_o: &Vec<f32>,
        o: &Vec<f32>,
        lse: &Vec<f32>,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
    ) -> Result<()> {
        let saved = attention::Saved { d_o, o, lse, q, k, v };
        attention::backward(self, dq, dk, dv, shape, segments, saved)
    }

    fn swiglu(&self, out: &mut Vec<f32>, len: usize, gate: &Vec<f32>, up: &Vec<f32>) -> Result<()> {
        self.swiglu_values(&mut out[..len], &gate[..len], &up[..len]);
        Ok(())
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Vec<f32>,
        dup: &mut Vec<f32>,
        len: usize,
        gate: &Vec<f32>,
        up: &Vec<f32>,
    ) -> Result<()> {
        self.swiglu_backward_values(&mut dgate[..len], &mut dup[..len], &gate[..len], &up[..len]);
        Ok(())
    }

    fn gather(&self, out: &mut Vec<f32>, x: &Vec<f32>, rows: &[u32], d: usize) -> Result<()> {
        for (out, &row) in out.chunks_exact_mut(d).zip(rows) {
            out.copy_from_slice(&x[row as usize * d..][..d]);
        }
        Ok(())
    }

    fn scatter(&self, out: &mut Vec<f32>, tokens: usize, x: &Vec<f32>, rows: &[u32], d: usize) -> Result<()> {
        out[..tokens * d].fill(0.0);
        for (x, &row) in x.chunks_exact(d).zip(rows) {
            out[row as usize * d..][..d].copy_from_slice(x);
        }
        Ok(())
    }

    fn head_loss(
        &self,
        nll: &mut Vec<f32>,
        dx: Option<&mut Vec<f32>>,
        x: &Vec<f32>,
        head: &Weight<'_>,
        targets: &[u32],
        scale: f32,
    ) -> Result<()> {
        let dx = dx.map(|dx| &mut dx[..]);
        match self.precision {
            Precision::F32 => loss::head_loss::<f32>(self, self.isa, nll, dx, x, head, targets, scale),
            Precision::Bf16 => loss::head_loss::<bf16>(self, self.bf16_isa, nll, dx, x, head, targets, scale),
        }
    }

    fn head_rows(&self, out: &mut [f32], x: &Vec<f32>, rows: usize, head: &Weight<'_>, ids: &[u32]) -> Result<()> {
        loss::head_rows(self, out, &x[..rows * head.cols()], head, ids)
    }

    fn sum_of_squares(&self, x: &Vec<f32>, len: usize) -> Result<f64> {
        Ok(self.sum_of_squares_values(&x[..len]))
    }

    fn adamw(
        &self,
        params: &mut Vec<f32>,
        m: &mut Vec<f32>,
        v: &mut Vec<f32>,
        grads: &Vec<f32>,
        len: usize,
        adam: AdamW,
        t: u64,
        lr: f32,
        grad_scale: f32,
    ) -> Result<()> {
        let state = (&mut params[..len], &mut m[..len], &mut v[..len]);
        self.adamw_values(state, &grads[..len], adam, t, lr, grad_scale);
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
            let mut y = vec![0.5; rows];
            cpu(threads).linear(&mut y, store, 1, &x, &weight, None).unwrap();
            y
        };
        let (set, added) = (run(1, Store::Overwrite), run(1, Store::Accumulate));
        assert!(set.iter().zip(&added).all(|(set, added)| 0.5 + set == *added));
        for threads in [2, 3, 8] {
            assert_eq!(run(threads, Store::Overwrite), set);
            assert_eq!(run(threads, Store::Accumulate), added);
        }
    }
}
