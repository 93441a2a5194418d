//! A backend that measures how long each operation of another one takes, and counts what it had to do.

use crate::floor::{Machine, Work};
use hydra_runtime::Result;
use hydra_runtime::backend::cpu::Bound;
use hydra_runtime::backend::{
    AdamWStep, AdapterArgs, AnyBuffer, AnyBufferMut, Attention, AttentionBackward, Backend, HeadLoss, HeadNorm,
    HeadNormBackward, Linear, LinearBackward, LinearOutput, Prefix, RmsNorm, RmsNormBackward, Rope, StoredWeight,
    Workload,
};
use hydra_runtime::config::Config;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Wall-clock time and work by operation.
#[derive(Default)]
pub struct Times {
    /// Whether anything is measured, which takes a microsecond for each operation.
    on: AtomicBool,
    done: Mutex<BTreeMap<String, (Duration, Work)>>,
}

impl Times {
    fn of<R>(&self, name: impl Into<String>, work: Work, op: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = op();
        let elapsed = start.elapsed();
        let mut times = self.done.lock().expect("no operation panicked");
        let (time, done) = times.entry(name.into()).or_default();
        *time += elapsed;
        *done += work;
        result
    }

    /// Whether to measure from here on.
    pub fn switch(&self, on: bool) {
        self.on.store(on, Relaxed);
    }

    /// Forgets what has been measured, to measure anew.
    pub fn reset(&self) {
        if self.on.load(Relaxed) {
            self.done.lock().expect("no operation panicked").clear();
        }
    }

    /// Seconds that all of it takes at least.
    pub fn floor(&self, machine: &Machine) -> Option<f64> {
        let times = self.done.lock().expect("no operation panicked");
        times.values().map(|(_, work)| machine.floor(*work)).sum()
    }

    /// Prints each operation's share of `total` and how near it is to its floor, the largest first, and what no
    /// operation took.
    pub fn print(&self, machine: &Machine, total: Duration) {
        let times = self.done.lock().expect("no operation panicked");
        let line = |(name, (time, work)): (&String, &(Duration, Work))| {
            let time = time.as_secs_f64();
            let floor = machine.floor(*work).filter(|floor| *floor > 0.0);
            let floor = floor.map_or(String::new(), |floor| format!("{:.0} %", 100.0 * floor / time));
            (time, floor, name.clone())
        };
        let mut lines: Vec<_> = times.iter().map(line).collect();
        let rest = total.as_secs_f64() - lines.iter().map(|line| line.0).sum::<f64>();
        lines.push((rest, String::new(), "outside of operations".into()));
        lines.sort_by(|a, b| b.0.total_cmp(&a.0));
        println!("  time  of its floor  operation");
        for (time, floor, name) in lines {
            println!("{:5.1} %  {floor:>12}  {name}", 100.0 * time / total.as_secs_f64());
        }
    }
}

/// The backend.
pub struct Timed<B> {
    pub inner: B,
    pub times: Arc<Times>,
    /// Width of the residual stream.
    pub hidden: usize,
}

/// A frozen matrix whose size is known.
pub struct SizedMatrix<M> {
    inner: M,
    size: [usize; 2],
    bytes: usize,
}

impl<M> SizedMatrix<M> {
    fn work(&self, tokens: usize) -> Work {
        Work::product(tokens, self.size, self.bytes)
    }

    /// The work of reading so many of its rows.
    fn rows(&self, rows: usize) -> Work {
        Work { weights: (rows * self.bytes / self.size[0].max(1)) as f64, ..Work::default() }
    }
}

impl<B: Backend> Timed<B> {
    fn time<R>(&self, name: impl Into<String>, work: Work, op: impl FnOnce(&B) -> R) -> R {
        if self.times.on.load(Relaxed) {
            return self.times.of(name, work, || op(&self.inner));
        }
        op(&self.inner)
    }

    /// The work of reading and writing so many f32 and activations.
    fn values(&self, f32s: usize, activations: usize) -> Work {
        let mut work = Work::values(f32s, size_of::<f32>());
        work += Work::values(activations, self.inner.activation_bytes());
        work
    }
}

fn adapter_args<'a, B: Backend>(args: &AdapterArgs<'a, Timed<B>>) -> AdapterArgs<'a, B> {
    let AdapterArgs { slot, params, labels, dropout, head_dropout, balance } = *args;
    AdapterArgs { slot, params, labels, dropout, head_dropout, balance }
}

fn named<M>(name: &str, weight: &SizedMatrix<M>, adapted: bool) -> String {
    let [d_out, d_in] = weight.size;
    format!("{name} {d_in} to {d_out}{}", if adapted { ", adapted" } else { "" })
}

impl<B: Backend> Backend for Timed<B> {
    type Buffer = B::Buffer;
    type Activations = B::Activations;
    type Matrix = SizedMatrix<B::Matrix>;

    fn buffer(&self, len: usize) -> Result<B::Buffer> {
        self.inner.buffer(len)
    }
    fn activations(&self, len: usize) -> Result<B::Activations> {
        self.inner.activations(len)
    }
    fn operand(&self, rows: usize, width: usize) -> Result<B::Activations> {
        self.inner.operand(rows, width)
    }
    fn operand_bytes(&self, rows: usize, width: usize) -> u64 {
        self.inner.operand_bytes(rows, width)
    }
    fn activation_bytes(&self) -> usize {
        self.inner.activation_bytes()
    }
    fn matrix(&self, weight: StoredWeight) -> Result<Self::Matrix> {
        let view = weight.weight();
        let (size, bytes) =
            ([view.rows(), view.cols()], view.format().row_bytes(view.cols()).unwrap_or(0) * view.rows());
        Ok(SizedMatrix { inner: self.inner.matrix(weight)?, size, bytes })
    }
    fn upload(&self, to: &mut B::Buffer, from: &[f32]) -> Result<()> {
        self.time("upload", self.values(2 * from.len(), 0), |b| b.upload(to, from))
    }
    fn download(&self, to: &mut [f32], from: &B::Buffer) -> Result<()> {
        self.time("download", self.values(2 * to.len(), 0), |b| b.download(to, from))
    }
    fn upload_activations(&self, to: &mut B::Activations, from: &[f32]) -> Result<()> {
        self.time("upload_activations", self.values(from.len(), from.len()), |b| b.upload_activations(to, from))
    }
    fn download_activations(&self, to: &mut [f32], from: &B::Activations) -> Result<()> {
        self.time("download_activations", self.values(to.len(), to.len()), |b| b.download_activations(to, from))
    }
    fn copy(&self, to: &mut B::Buffer, start: usize, from: &B::Buffer, len: usize) -> Result<()> {
        self.time("copy", self.values(2 * len, 0), |b| b.copy(to, start, from, len))
    }
    fn copy_activations(
        &self,
        to: &mut B::Activations,
        start: usize,
        from: &B::Activations,
        values: Range<usize>,
    ) -> Result<()> {
        self.time("copy_activations", self.values(0, 2 * values.len()), |b| b.copy_activations(to, start, from, values))
    }
    fn zero(&self, buffer: &mut B::Buffer, len: usize) -> Result<()> {
        self.time("zero", self.values(len, 0), |b| b.zero(buffer, len))
    }
    fn embed(&self, out: &mut B::Buffer, table: &Self::Matrix, tokens: &[u32]) -> Result<()> {
        self.time("embed", table.rows(tokens.len()), |b| b.embed(out, &table.inner, tokens))
    }
    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<()> {
        let RmsNorm { y, inv_rms, tokens, x, weight, eps } = args;
        self.time("rms_norm", self.values(tokens * self.hidden, tokens * self.hidden), |b| {
            b.rms_norm(RmsNorm { y, inv_rms, tokens, x, weight, eps })
        })
    }
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()> {
        let RmsNormBackward { dx, tokens, dy, x, inv_rms, weight } = args;
        let work = self.values(4 * tokens * self.hidden, 0);
        self.time("rms_norm_backward", work, |b| {
            b.rms_norm_backward(RmsNormBackward { dx, tokens, dy, x, inv_rms, weight })
        })
    }
    fn head_norm(&self, args: HeadNorm<'_, Self>) -> Result<()> {
        let HeadNorm { y, heads, x, weight, eps } = args;
        self.time("head_norm", Work::default(), |b| b.head_norm(HeadNorm { y, heads, x, weight, eps }))
    }
    fn head_norm_backward(&self, args: HeadNormBackward<'_, Self>) -> Result<()> {
        let HeadNormBackward { dx, heads, x, weight, eps } = args;
        self.time("head_norm_backward", Work::default(), |b| {
            b.head_norm_backward(HeadNormBackward { dx, heads, x, weight, eps })
        })
    }
    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        let Rope { x, n_heads, head_dim, table, positions, inverse } = args;
        self.time("rope", self.values(0, 2 * positions.len() * n_heads * head_dim), |b| {
            b.rope(Rope { x, n_heads, head_dim, table, positions, inverse })
        })
    }
    fn linear(&self, args: Linear<'_, Self>) -> Result<()> {
        let Linear { output, tokens, x, weight, bias, adapter } = args;
        let output = match output {
            LinearOutput::Buffer { y, residual } => LinearOutput::Buffer { y, residual },
            LinearOutput::Activations { y, residual } => LinearOutput::Activations { y, residual },
        };
        let shape = adapter.as_ref().map(|(args, _)| args.slot.shape);
        let (name, mut work) = (named("linear", weight, shape.is_some()), weight.work(tokens));
        work += shape.map_or(Work::default(), |shape| Work::adapter(tokens, shape));
        let (args, adapter_state) = adapter.map(|(args, state)| (adapter_args(args), state)).unzip();
        let adapter = args.as_ref().zip(adapter_state);
        let weight = &weight.inner;
        self.time(name, work, |b| b.linear(Linear { output, tokens, x, weight, bias, adapter }))
    }
    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<()> {
        let LinearBackward { dx, dparams, tokens, dy, x, weight, adapter } = args;
        let dx = dx.map(|(dx, accumulate)| match dx {
            AnyBufferMut::Buffer(dx) => (AnyBufferMut::Buffer(dx), accumulate),
            AnyBufferMut::Activations(dx) => (AnyBufferMut::Activations(dx), accumulate),
        });
        let dy = match dy {
            AnyBuffer::Buffer(dy) => AnyBuffer::Buffer(dy),
            AnyBuffer::Activations(dy) => AnyBuffer::Activations(dy),
        };
        let shape = adapter.map(|(args, _)| args.slot.shape);
        let name = named("linear_backward", weight, shape.is_some());
        let mut work = if dx.is_some() { weight.work(tokens) } else { Work::default() };
        // Each of the forward pass's products has two gradients.
        work += shape.map_or(Work::default(), |shape| Work::adapter(tokens, shape).times(2.0));
        let (args, adapter_state) = adapter.map(|(args, state)| (adapter_args(args), state)).unzip();
        let adapter = args.as_ref().zip(adapter_state);
        let weight = &weight.inner;
        self.time(name, work, |b| b.linear_backward(LinearBackward { dx, dparams, tokens, dy, x, weight, adapter }))
    }
    fn attention(&self, args: Attention<'_, Self>) -> Result<()> {
        let Attention { o, lse, shape, segments, window, q, k, v, prefix } = args;
        let prefix = prefix.map(|Prefix { k, v, len }| Prefix { k, v, len });
        let work = Work::attention(shape, segments, window, prefix.as_ref().map_or(0, |prefix| prefix.len));
        self.time("attention", work, |b| b.attention(Attention { o, lse, shape, segments, window, q, k, v, prefix }))
    }
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        let AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v } = args;
        // Scores again, and two gradients of each of the two products.
        let work = Work::attention(shape, segments, window, 0).times(2.5);
        self.time("attention_backward", work, |b| {
            b.attention_backward(AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v })
        })
    }
    fn swiglu(&self, out: &mut B::Activations, len: usize, gate: &B::Activations, up: &B::Activations) -> Result<()> {
        self.time("swiglu", self.values(0, 3 * len), |b| b.swiglu(out, len, gate, up))
    }
    fn swiglu_backward(
        &self,
        dgate: &mut B::Activations,
        dup: &mut B::Activations,
        len: usize,
        gate: &B::Activations,
        up: &B::Activations,
    ) -> Result<()> {
        self.time("swiglu_backward", self.values(0, 5 * len), |b| b.swiglu_backward(dgate, dup, len, gate, up))
    }
    fn gather(&self, out: &mut B::Buffer, x: &B::Buffer, rows: &[u32], d: usize) -> Result<()> {
        self.time("gather", self.values(2 * rows.len() * d, 0), |b| b.gather(out, x, rows, d))
    }
    fn gather_activations(&self, out: &mut B::Activations, x: &B::Activations, rows: &[u32], d: usize) -> Result<()> {
        self.time("gather_activations", self.values(0, 2 * rows.len() * d), |b| b.gather_activations(out, x, rows, d))
    }
    fn scatter(&self, out: &mut B::Buffer, tokens: usize, x: &B::Buffer, rows: &[u32], d: usize) -> Result<()> {
        self.time("scatter", self.values((tokens + rows.len()) * d, 0), |b| b.scatter(out, tokens, x, rows, d))
    }
    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Result<()> {
        let HeadLoss { nll, dx, x, lm_head, targets, scale } = args;
        let products = if dx.is_some() { 2.0 } else { 1.0 };
        let (work, lm_head) = (lm_head.work(targets.len()).times(products), &lm_head.inner);
        self.time("head_loss", work, |b| b.head_loss(HeadLoss { nll, dx, x, lm_head, targets, scale }))
    }
    fn head_rows(
        &self,
        out: &mut [f32],
        x: &B::Activations,
        rows: usize,
        head: &Self::Matrix,
        ids: &[u32],
    ) -> Result<()> {
        let work = Work::product(rows, [ids.len(), head.size[1]], head.bytes * ids.len() / head.size[0].max(1));
        self.time("head_rows", work, |b| b.head_rows(out, x, rows, &head.inner, ids))
    }
    fn add(&self, y: &mut B::Buffer, x: &B::Buffer, len: usize) -> Result<()> {
        self.time("add", self.values(3 * len, 0), |b| b.add(y, x, len))
    }
    fn sum_of_squares(&self, x: &B::Buffer, len: usize) -> Result<f64> {
        self.time("sum_of_squares", self.values(len, 0), |b| b.sum_of_squares(x, len))
    }
    fn adamw(&self, args: AdamWStep<'_, Self>) -> Result<()> {
        let AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step, grad_scale } = args;
        let work = self.values(7 * rates.iter().map(|(range, _)| range.len()).sum::<usize>(), 0);
        self.time("adamw", work, |b| {
            b.adamw(AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step, grad_scale })
        })
    }
    fn supports(&self, config: &Config) -> Result<()> {
        self.inner.supports(config)
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn bind_caller(&self) -> Option<Bound> {
        self.inner.bind_caller()
    }
    fn trains(&self) -> Result<()> {
        self.inner.trains()
    }
    fn workspace_bytes(&self, work: &[Workload<'_>]) -> u64 {
        self.inner.workspace_bytes(work)
    }
}
