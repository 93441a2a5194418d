//! A backend that measures how long each operation of another one takes.

use hydra_runtime::Result;
use hydra_runtime::backend::{Accumulate, AdamW, AdapterArgs, AttentionShape, Backend, HydraShape, Prefix, Weight};
use hydra_runtime::batch::Segment;
use hydra_runtime::config::Config;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
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
pub struct Timed<'t, B> {
    pub inner: B,
    /// `None`: nothing is measured.
    pub times: Option<&'t Times>,
}

impl<B: Backend> Timed<'_, B> {
    fn time<R>(&self, name: impl Into<String>, op: impl FnOnce(&B) -> R) -> R {
        match self.times {
            Some(times) => times.of(name, || op(&self.inner)),
            None => op(&self.inner),
        }
    }
}

fn args<'a, B: Backend>(args: &AdapterArgs<'a, Timed<'_, B>>) -> AdapterArgs<'a, B> {
    let AdapterArgs { slot, params, labels, dropout, head_dropout, balance } = *args;
    AdapterArgs { slot, params, labels, dropout, head_dropout, balance }
}

fn size(name: &str, adapter: Option<HydraShape>) -> String {
    match adapter {
        Some(shape) => format!("{name} {} to {}, adapted", shape.d_in, shape.d_out),
        None => name.into(),
    }
}

impl<B: Backend> Backend for Timed<'_, B> {
    type Buffer = B::Buffer;
    type Matrix<'w> = B::Matrix<'w>;

    fn inside<R: Send>(&self, op: impl FnOnce() -> R + Send) -> R {
        self.inner.inside(op)
    }
    fn buffer(&self, len: usize) -> Result<B::Buffer> {
        self.inner.buffer(len)
    }
    fn activation(&self, len: usize) -> Result<B::Buffer> {
        self.inner.activation(len)
    }
    fn activation_bytes(&self) -> usize {
        self.inner.activation_bytes()
    }
    fn upload(&self, to: &mut B::Buffer, from: &[f32]) -> Result<()> {
        self.time("upload", |b| b.upload(to, from))
    }
    fn download(&self, to: &mut [f32], from: &B::Buffer) -> Result<()> {
        self.time("download", |b| b.download(to, from))
    }
    fn copy(&self, to: &mut B::Buffer, to_start: usize, from: &B::Buffer, len: usize) -> Result<()> {
        self.time("copy", |b| b.copy(to, to_start, from, len))
    }
    fn zero(&self, buffer: &mut B::Buffer, len: usize) -> Result<()> {
        self.time("zero", |b| b.zero(buffer, len))
    }
    fn matrix<'w>(&self, weight: Weight<'w>) -> Result<B::Matrix<'w>> {
        self.inner.matrix(weight)
    }
    fn embed(&self, out: &mut B::Buffer, table: &B::Matrix<'_>, tokens: &[u32]) -> Result<()> {
        self.time("embed", |b| b.embed(out, table, tokens))
    }
    fn rms_norm(
        &self,
        y: &mut B::Buffer,
        inv_rms: &mut B::Buffer,
        tokens: usize,
        x: &B::Buffer,
        weight: &B::Buffer,
        eps: f32,
    ) -> Result<()> {
        self.time("rms_norm", |b| b.rms_norm(y, inv_rms, tokens, x, weight, eps))
    }
    fn rms_norm_backward(
        &self,
        dx: &mut B::Buffer,
        tokens: usize,
        dy: &B::Buffer,
        x: &B::Buffer,
        inv_rms: &B::Buffer,
        weight: &B::Buffer,
    ) -> Result<()> {
        self.time("rms_norm_backward", |b| b.rms_norm_backward(dx, tokens, dy, x, inv_rms, weight))
    }
    fn rope(
        &self,
        x: &mut B::Buffer,
        heads: usize,
        head_dim: usize,
        table: &B::Buffer,
        positions: &[u32],
        inverse: bool,
    ) -> Result<()> {
        self.time("rope", |b| b.rope(x, heads, head_dim, table, positions, inverse))
    }
    fn linear(
        &self,
        y: &mut B::Buffer,
        residual: Option<&B::Buffer>,
        tokens: usize,
        x: &B::Buffer,
        weight: &B::Matrix<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &mut B::Buffer)>,
    ) -> Result<()> {
        let name = size("linear", adapter.as_ref().map(|(args, _)| args.slot.shape));
        match adapter {
            Some((adapter, adapter_state)) => {
                let adapter = args(adapter);
                self.time(name, |b| b.linear(y, residual, tokens, x, weight, Some((&adapter, adapter_state))))
            }
            None => self.time(name, |b| b.linear(y, residual, tokens, x, weight, None)),
        }
    }
    fn linear_backward(
        &self,
        dx: Option<(&mut B::Buffer, Accumulate)>,
        dparams: Option<&mut B::Buffer>,
        tokens: usize,
        dy: &B::Buffer,
        x: &B::Buffer,
        weight: &B::Matrix<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &B::Buffer)>,
    ) -> Result<()> {
        let name = size("linear_backward", adapter.map(|(args, _)| args.slot.shape));
        match adapter {
            Some((adapter, adapter_state)) => {
                let adapter = args(adapter);
                self.time(name, |b| {
                    b.linear_backward(dx, dparams, tokens, dy, x, weight, Some((&adapter, adapter_state)))
                })
            }
            None => self.time(name, |b| b.linear_backward(dx, dparams, tokens, dy, x, weight, None)),
        }
    }
    fn attention(
        &self,
        o: &mut B::Buffer,
        lse: &mut B::Buffer,
        shape: AttentionShape,
        segments: &[Segment],
        q: &B::Buffer,
        k: &B::Buffer,
        v: &B::Buffer,
        prefix: Option<Prefix<'_, Self>>,
    ) -> Result<()> {
        let prefix = prefix.map(|Prefix { k, v, len }| Prefix { k, v, len });
        self.time("attention", |b| b.attention(o, lse, shape, segments, q, k, v, prefix))
    }
    fn attention_backward(
        &self,
        dq: &mut B::Buffer,
        dk: &mut B::Buffer,
        dv: &mut B::Buffer,
        shape: AttentionShape,
        segments: &[Segment],
        d_o: &B::Buffer,
        o: &B::Buffer,
        lse: &B::Buffer,
        q: &B::Buffer,
        k: &B::Buffer,
        v: &B::Buffer,
    ) -> Result<()> {
        self.time("attention_backward", |b| b.attention_backward(dq, dk, dv, shape, segments, d_o, o, lse, q, k, v))
    }
    fn swiglu(&self, out: &mut B::Buffer, len: usize, gate: &B::Buffer, up: &B::Buffer) -> Result<()> {
        self.time("swiglu", |b| b.swiglu(out, len, gate, up))
    }
    fn swiglu_backward(
        &self,
        dgate: &mut B::Buffer,
        dup: &mut B::Buffer,
        len: usize,
        gate: &B::Buffer,
        up: &B::Buffer,
    ) -> Result<()> {
        self.time("swiglu_backward", |b| b.swiglu_backward(dgate, dup, len, gate, up))
    }
    fn gather(&self, out: &mut B::Buffer, x: &B::Buffer, rows: &[u32], d: usize) -> Result<()> {
        self.time("gather", |b| b.gather(out, x, rows, d))
    }
    fn scatter(&self, out: &mut B::Buffer, tokens: usize, x: &B::Buffer, rows: &[u32], d: usize) -> Result<()> {
        self.time("scatter", |b| b.scatter(out, tokens, x, rows, d))
    }
    fn head_loss(
        &self,
        nll: &mut B::Buffer,
        dx: Option<&mut B::Buffer>,
        x: &B::Buffer,
        head: &B::Matrix<'_>,
        targets: &[u32],
        scale: f32,
    ) -> Result<()> {
        self.time("head_loss", |b| b.head_loss(nll, dx, x, head, targets, scale))
    }
    fn head_rows(&self, out: &mut [f32], x: &B::Buffer, rows: usize, head: &B::Matrix<'_>, ids: &[u32]) -> Result<()> {
        self.time("head_rows", |b| b.head_rows(out, x, rows, head, ids))
    }
    fn sum_of_squares(&self, x: &B::Buffer, len: usize) -> Result<f64> {
        self.time("sum_of_squares", |b| b.sum_of_squares(x, len))
    }
    fn adamw(
        &self,
        params: &mut B::Buffer,
        m: &mut B::Buffer,
        v: &mut B::Buffer,
        grads: &B::Buffer,
        rates: &[(Range<usize>, f32)],
        adam: AdamW,
        t: u64,
        grad_scale: f32,
    ) -> Result<()> {
        self.time("adamw", |b| b.adamw(params, m, v, grads, rates, adam, t, grad_scale))
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn workspace_bytes(&self, tokens: usize, config: &Config) -> u64 {
        self.inner.workspace_bytes(tokens, config)
    }
}
