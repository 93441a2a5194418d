//! A backend that measures how long each operation of another one takes.

use hydra_runtime::Result;
use hydra_runtime::backend::cpu::Bound;
use hydra_runtime::backend::{
    AdamWStep, AdapterArgs, AnyBuffer, AnyBufferMut, Attention, AttentionBackward, Backend, HeadLoss, HeadNorm,
    HeadNormBackward, HydraShape, Linear, LinearBackward, LinearOutput, Prefix, RmsNorm, RmsNormBackward, Rope,
    StoredWeight,
};
use hydra_runtime::config::Config;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Wall-clock time by operation.
#[derive(Default)]
pub struct Times(Mutex<BTreeMap<String, Duration>>);

impl Times {
    fn of<R>(&self, name: impl Into<String>, op: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = op();
        *self.0.lock().expect("no operation panicked").entry(name.into()).or_default() += start.elapsed();
        result
    }

    /// Forgets what has been measured.
    pub fn reset(&self) {
        self.0.lock().expect("no operation panicked").clear();
    }

    /// Prints each operation's share of `total`, the largest first, and what no operation took.
    pub fn print(&self, total: Duration) {
        let times = self.0.lock().expect("no operation panicked");
        let mut lines: Vec<_> = times.iter().map(|(name, time)| (time.as_secs_f64(), name.as_str())).collect();
        let rest = total.as_secs_f64() - lines.iter().map(|line| line.0).sum::<f64>();
        lines.push((rest, "outside of operations"));
        lines.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (time, name) in lines {
            println!("{:5.1} %  {name}", 100.0 * time / total.as_secs_f64());
        }
    }
}

/// The backend.
pub struct Timed<B> {
    pub inner: B,
    /// `None`: nothing is measured.
    pub times: Option<Arc<Times>>,
}

impl<B: Backend> Timed<B> {
    fn time<R>(&self, name: impl Into<String>, op: impl FnOnce(&B) -> R) -> R {
        match &self.times {
            Some(times) => times.of(name, || op(&self.inner)),
            None => op(&self.inner),
        }
    }
}

fn adapter_args<'a, B: Backend>(args: &AdapterArgs<'a, Timed<B>>) -> AdapterArgs<'a, B> {
    let AdapterArgs { slot, params, labels, dropout, head_dropout, balance } = *args;
    AdapterArgs { slot, params, labels, dropout, head_dropout, balance }
}

fn size(name: &str, adapter: Option<HydraShape>) -> String {
    match adapter {
        Some(shape) => format!("{name} {} to {}, adapted", shape.d_in, shape.d_out),
        None => name.into(),
    }
}

impl<B: Backend> Backend for Timed<B> {
    type Buffer = B::Buffer;
    type Activations = B::Activations;
    type Matrix = B::Matrix;

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
    fn matrix(&self, weight: StoredWeight) -> Result<B::Matrix> {
        self.inner.matrix(weight)
    }
    fn upload(&self, to: &mut B::Buffer, from: &[f32]) -> Result<()> {
        self.time("upload", |b| b.upload(to, from))
    }
    fn download(&self, to: &mut [f32], from: &B::Buffer) -> Result<()> {
        self.time("download", |b| b.download(to, from))
    }
    fn upload_activations(&self, to: &mut B::Activations, from: &[f32]) -> Result<()> {
        self.time("upload_activations", |b| b.upload_activations(to, from))
    }
    fn download_activations(&self, to: &mut [f32], from: &B::Activations) -> Result<()> {
        self.time("download_activations", |b| b.download_activations(to, from))
    }
    fn copy(&self, to: &mut B::Buffer, start: usize, from: &B::Buffer, len: usize) -> Result<()> {
        self.time("copy", |b| b.copy(to, start, from, len))
    }
    fn copy_activations(
        &self,
        to: &mut B::Activations,
        start: usize,
        from: &B::Activations,
        values: Range<usize>,
    ) -> Result<()> {
        self.time("copy_activations", |b| b.copy_activations(to, start, from, values))
    }
    fn zero(&self, buffer: &mut B::Buffer, len: usize) -> Result<()> {
        self.time("zero", |b| b.zero(buffer, len))
    }
    fn embed(&self, out: &mut B::Buffer, table: &B::Matrix, tokens: &[u32]) -> Result<()> {
        self.time("embed", |b| b.embed(out, table, tokens))
    }
    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<()> {
        let RmsNorm { y, inv_rms, tokens, x, weight, eps } = args;
        self.time("rms_norm", |b| b.rms_norm(RmsNorm { y, inv_rms, tokens, x, weight, eps }))
    }
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()> {
        let RmsNormBackward { dx, tokens, dy, x, inv_rms, weight } = args;
        self.time("rms_norm_backward", |b| b.rms_norm_backward(RmsNormBackward { dx, tokens, dy, x, inv_rms, weight }))
    }
    fn head_norm(&self, args: HeadNorm<'_, Self>) -> Result<()> {
        let HeadNorm { y, heads, x, weight, eps } = args;
        self.time("head_norm", |b| b.head_norm(HeadNorm { y, heads, x, weight, eps }))
    }
    fn head_norm_backward(&self, args: HeadNormBackward<'_, Self>) -> Result<()> {
        let HeadNormBackward { dx, heads, x, weight, eps } = args;
        self.time("head_norm_backward", |b| b.head_norm_backward(HeadNormBackward { dx, heads, x, weight, eps }))
    }
    fn rope(&self, args: Rope<'_, Self>) -> Result<()> {
        let Rope { x, n_heads, head_dim, table, positions, inverse } = args;
        self.time("rope", |b| b.rope(Rope { x, n_heads, head_dim, table, positions, inverse }))
    }
    fn linear(&self, args: Linear<'_, Self>) -> Result<()> {
        let Linear { output, tokens, x, weight, bias, adapter } = args;
        let output = match output {
            LinearOutput::Buffer { y, residual } => LinearOutput::Buffer { y, residual },
            LinearOutput::Activations { y, residual } => LinearOutput::Activations { y, residual },
        };
        let name = size("linear", adapter.as_ref().map(|(args, _)| args.slot.shape));
        let (args, adapter_state) = adapter.map(|(args, state)| (adapter_args(args), state)).unzip();
        let adapter = args.as_ref().zip(adapter_state);
        self.time(name, |b| b.linear(Linear { output, tokens, x, weight, bias, adapter }))
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
        let name = size("linear_backward", adapter.map(|(args, _)| args.slot.shape));
        let (args, adapter_state) = adapter.map(|(args, state)| (adapter_args(args), state)).unzip();
        let adapter = args.as_ref().zip(adapter_state);
        self.time(name, |b| b.linear_backward(LinearBackward { dx, dparams, tokens, dy, x, weight, adapter }))
    }
    fn attention(&self, args: Attention<'_, Self>) -> Result<()> {
        let Attention { o, lse, shape, segments, window, q, k, v, prefix } = args;
        let prefix = prefix.map(|Prefix { k, v, len }| Prefix { k, v, len });
        self.time("attention", |b| b.attention(Attention { o, lse, shape, segments, window, q, k, v, prefix }))
    }
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        let AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v } = args;
        self.time("attention_backward", |b| {
            b.attention_backward(AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v })
        })
    }
    fn swiglu(&self, out: &mut B::Activations, len: usize, gate: &B::Activations, up: &B::Activations) -> Result<()> {
        self.time("swiglu", |b| b.swiglu(out, len, gate, up))
    }
    fn swiglu_backward(
        &self,
        dgate: &mut B::Activations,
        dup: &mut B::Activations,
        len: usize,
        gate: &B::Activations,
        up: &B::Activations,
    ) -> Result<()> {
        self.time("swiglu_backward", |b| b.swiglu_backward(dgate, dup, len, gate, up))
    }
    fn gather(&self, out: &mut B::Buffer, x: &B::Buffer, rows: &[u32], d: usize) -> Result<()> {
        self.time("gather", |b| b.gather(out, x, rows, d))
    }
    fn gather_activations(&self, out: &mut B::Activations, x: &B::Activations, rows: &[u32], d: usize) -> Result<()> {
        self.time("gather_activations", |b| b.gather_activations(out, x, rows, d))
    }
    fn scatter(&self, out: &mut B::Buffer, tokens: usize, x: &B::Buffer, rows: &[u32], d: usize) -> Result<()> {
        self.time("scatter", |b| b.scatter(out, tokens, x, rows, d))
    }
    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Result<()> {
        let HeadLoss { nll, dx, x, lm_head, targets, scale } = args;
        self.time("head_loss", |b| b.head_loss(HeadLoss { nll, dx, x, lm_head, targets, scale }))
    }
    fn head_rows(&self, out: &mut [f32], x: &B::Activations, rows: usize, head: &B::Matrix, ids: &[u32]) -> Result<()> {
        self.time("head_rows", |b| b.head_rows(out, x, rows, head, ids))
    }
    fn add(&self, y: &mut B::Buffer, x: &B::Buffer, len: usize) -> Result<()> {
        self.time("add", |b| b.add(y, x, len))
    }
    fn sum_of_squares(&self, x: &B::Buffer, len: usize) -> Result<f64> {
        self.time("sum_of_squares", |b| b.sum_of_squares(x, len))
    }
    fn adamw(&self, args: AdamWStep<'_, Self>) -> Result<()> {
        let AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step, grad_scale } = args;
        self.time("adamw", |b| b.adamw(AdamWStep { params, exp_avg, exp_avg_sq, grads, rates, adam, step, grad_scale }))
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
    fn workspace_bytes(&self, tokens: usize, config: &Config) -> u64 {
        self.inner.workspace_bytes(tokens, config)
    }
}
