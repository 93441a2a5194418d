//! The CPU's operations that architectures differ by, against plain f64 loops: biases, the norm of each head, sliding windows.
//!
//! Each is held on every instruction set, in both precisions, and has the same bits for any number of threads.

#[path = "../../tests/close.rs"]
mod close;

use half::bf16;
use hydra_kernels::hydra::{ForwardArgs, HydraLayer};
use hydra_kernels::isa::{Bf16Isa, Isa};
use hydra_kernels::{AdapterRef, Gate, HydraShape, Routing, RowOrder, Values, Weight};
use hydra_runtime::backend::cpu::{Activations, Buffer, Cpu, CpuOptions, Precision};
use hydra_runtime::backend::{
    Attention, AttentionBackward, AttentionShape, Backend, Format, HeadLoss, HeadNorm, HeadNormBackward, Linear,
    LinearOutput, Prefix, StoredWeight,
};
use hydra_runtime::batch::Segment;
use std::num::NonZeroUsize;

/// An operation's results, by name.
type Results = Vec<(&'static str, Vec<f32>)>;

/// Numbers in −1 .. 1 that bf16 represents exactly.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 56) as f32 / 128.0 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn activations(cpu: &Cpu, values: &[f32]) -> Activations {
    let mut activations = cpu.activations(values.len()).unwrap();
    cpu.upload_activations(&mut activations, values).unwrap();
    activations
}

fn get(cpu: &Cpu, activations: &Activations, len: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; len];
    cpu.download_activations(&mut values, activations).unwrap();
    values
}

/// Compares what `run` computes with `want`, on every instruction set and for several numbers of threads.
#[track_caller]
fn hold(case: &str, want: &[(&str, Vec<f64>)], run: impl Fn(&Cpu) -> Results) {
    let f32s = Isa::available().map(|isa| CpuOptions { isa: Some(isa), ..CpuOptions::default() });
    let bf16s = Bf16Isa::available().map(|isa| CpuOptions {
        bf16_isa: Some(isa),
        precision: Precision::Bf16,
        ..CpuOptions::default()
    });
    for options in f32s.chain(bf16s) {
        let on = |threads| Cpu::new(CpuOptions { threads: Some(threads), ..options }).unwrap();
        let cpu = on(1);
        let got = run(&cpu);
        let tolerance = if options.precision == Precision::F32 { 1e-5 } else { 1e-2 };
        assert_eq!(got.len(), want.len());
        for ((name, got), (_, want)) in got.iter().zip(want) {
            let what = format!("{case} on {}: {name}", cpu.describe());
            // Terms of order 1 cancel in smaller results.
            close::assert_close(&what, got, want, tolerance, 0.1);
        }
        for threads in [2, 3] {
            assert!(run(&on(threads)) == got, "{case}: {threads} threads on {}", cpu.describe());
        }
    }
}

#[test]
fn a_bias_is_added_to_every_row() {
    // A token; a handful; rows for several threads; columns in two blocks.
    for [tokens, d_out, d_in] in [[1, 5, 8], [1, 1001, 64], [4, 70, 33], [37, 12, 9], [300, 66, 32], [37, 530, 2100]] {
        let (x, w) = (values(tokens * d_in, 1), values(d_out * d_in, 2));
        let (bias, residual) = (values(d_out, 3), values(tokens * d_out, 4));
        let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
        let weight = StoredWeight::new(Format::F32, d_out, d_in, bytes, RowOrder::Natural).unwrap();
        let want: Vec<f64> = (0..tokens * d_out)
            .map(|i| {
                let (x, w) = (&x[i / d_out * d_in..][..d_in], &w[i % d_out * d_in..][..d_in]);
                x.iter().zip(w).map(|(x, w)| f64::from(x * w)).sum::<f64>() + f64::from(bias[i % d_out])
            })
            .collect();
        let after: Vec<f64> = want.iter().zip(&residual).map(|(y, r)| y + f64::from(*r)).collect();
        hold(&format!("{tokens} tokens, {d_in} to {d_out}"), &[("y", want), ("after", after)], |cpu| {
            let (x, bias, residual) = (&activations(cpu, &x), &Buffer::from(&*bias), &Buffer::from(&*residual));
            let (mut y, mut after) = (cpu.activations(tokens * d_out).unwrap(), cpu.buffer(tokens * d_out).unwrap());
            for output in [
                LinearOutput::Activations { y: &mut y, residual: None },
                LinearOutput::Buffer { y: &mut after, residual: Some(residual) },
            ] {
                cpu.linear(Linear { output, tokens, x, weight: &weight, bias: Some(bias), adapter: None }).unwrap();
            }
            vec![("y", get(cpu, &y, tokens * d_out)), ("after", after.to_vec())]
        });
    }
}

/// x / √(mean of x² + eps) · weight of each head.
fn head_norm(x: &[f64], weight: &[f32], eps: f64) -> Vec<f64> {
    let norm = |x: &[f64]| {
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().zip(weight).map(move |(x, w)| x * scale * f64::from(*w)).collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(norm).collect()
}

#[test]
fn heads_are_normalised_one_by_one() {
    const EPS: f32 = 1e-5;
    for [heads, head_dim] in [[1, 2], [7, 10], [33, 64], [3, 300], [600, 128]] {
        let len = heads * head_dim;
        let (x, weight, dy) = (values(len, 5), values(head_dim, 6), values(len, 7));
        let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        // The gradient is the slope of Σ dy ∘ y, value by value.
        let slope = |i: usize| {
            let head = i / head_dim * head_dim..i / head_dim * head_dim + head_dim;
            let at = |step: f64| {
                let mut moved = wide[head.clone()].to_vec();
                moved[i - head.start] += step;
                let y = head_norm(&moved, &weight, f64::from(EPS));
                y.iter().zip(&dy[head.clone()]).map(|(y, dy)| y * f64::from(*dy)).sum::<f64>()
            };
            (at(1e-5) - at(-1e-5)) / 2e-5
        };
        let y = head_norm(&wide, &weight, f64::from(EPS));
        let want = [("y", y), ("dx", (0..len).map(slope).collect())];
        hold(&format!("{heads} heads of {head_dim}"), &want, |cpu| {
            let (x, weight) = (&activations(cpu, &x), &Buffer::from(&*weight));
            let (mut y, mut dx) = (cpu.activations(len).unwrap(), activations(cpu, &dy));
            cpu.head_norm(HeadNorm { y: &mut y, heads, x, weight, eps: EPS }).unwrap();
            cpu.head_norm_backward(HeadNormBackward { dx: &mut dx, heads, x, weight, eps: EPS }).unwrap();
            vec![("y", get(cpu, &y, len)), ("dx", get(cpu, &dx, len))]
        });
    }
}

/// A case of attention: heads, segments, rows of the prefix, and the window.
struct Case {
    shape: AttentionShape,
    segments: Vec<Segment>,
    prefix: usize,
    window: Option<NonZeroUsize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_o: Vec<f32>,
    prefix_k: Vec<f32>,
    prefix_v: Vec<f32>,
}

impl Case {
    fn new(shape: AttentionShape, lens: &[usize], prefix: usize, window: usize) -> Self {
        let mut start = 0;
        let segment = |&len: &usize| {
            let segment = Segment { start, len };
            start += len;
            segment
        };
        let segments = lens.iter().map(segment).collect();
        let (wide, narrow) = (start * shape.q_width(), start * shape.kv_width());
        let before = prefix * shape.kv_width();
        let [q, k, v, d_o] = [(wide, 11), (narrow, 12), (narrow, 13), (wide, 14)].map(|(len, seed)| values(len, seed));
        let [prefix_k, prefix_v] = [(before, 15), (before, 16)].map(|(len, seed)| values(len, seed));
        Self { shape, segments, prefix, window: NonZeroUsize::new(window), q, k, v, d_o, prefix_k, prefix_v }
    }

    fn name(&self) -> String {
        let lens: Vec<_> = self.segments.iter().map(|segment| segment.len).collect();
        format!("{:?}, segments of {lens:?} after {}, window {:?}", self.shape, self.prefix, self.window)
    }

    /// A query head's columns of a row, and its key head's of a row of keys or values; row −1 is the prefix's last.
    fn query<'a>(&self, x: &'a [f32], row: usize, head: usize) -> &'a [f32] {
        &x[row * self.shape.q_width() + head * self.shape.head_dim..][..self.shape.head_dim]
    }

    fn key<'a>(&self, x: &'a [f32], row: usize, head: usize) -> &'a [f32] {
        let head = head / self.shape.group();
        &x[row * self.shape.kv_width() + head * self.shape.head_dim..][..self.shape.head_dim]
    }

    /// o, lse, dq, dk and dv.
    fn reference(&self, prefix: usize) -> [Vec<f64>; 5] {
        let (shape, d) = (self.shape, self.shape.head_dim);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let scale = 1.0 / (d as f64).sqrt();
        let [mut o, mut dq] = [(); 2].map(|()| vec![0.0; self.q.len()]);
        let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; self.k.len()]);
        let mut lse = vec![0.0; self.q.len() / d];
        for segment in &self.segments {
            for (row, head) in (0..segment.len).flat_map(|row| (0..shape.n_heads).map(move |head| (row, head))) {
                let place = prefix + row;
                let first = self.window.map_or(0, |window| (place + 1).saturating_sub(window.get()));
                let at = segment.start + row;
                let q = self.query(&self.q, at, head);
                // A key's row in the segment, if it isn't one of the prefix.
                let own = |key: usize| key.checked_sub(prefix).map(|key| segment.start + key);
                let k = |key| match own(key) {
                    Some(row) => self.key(&self.k, row, head),
                    None => self.key(&self.prefix_k, key, head),
                };
                let v = |key| match own(key) {
                    Some(row) => self.key(&self.v, row, head),
                    None => self.key(&self.prefix_v, key, head),
                };
                let scores: Vec<f64> = (first..=place).map(|key| scale * dot(q, k(key))).collect();
                let total: f64 = scores.iter().map(|s| s.exp()).sum();
                lse[at * shape.n_heads + head] = total.ln();
                let p: Vec<f64> = scores.iter().map(|s| s.exp() / total).collect();
                let d_o = self.query(&self.d_o, at, head);
                let dp: Vec<f64> = (first..=place).map(|key| dot(d_o, v(key))).collect();
                let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                let out = at * shape.q_width() + head * d;
                for (i, key) in (first..=place).enumerate() {
                    let ds = scale * p[i] * (dp[i] - delta);
                    for c in 0..d {
                        o[out + c] += p[i] * f64::from(v(key)[c]);
                        dq[out + c] += ds * f64::from(k(key)[c]);
                        if let Some(row) = own(key) {
                            let to = row * shape.kv_width() + head / shape.group() * d + c;
                            dk[to] += ds * f64::from(q[c]);
                            dv[to] += p[i] * f64::from(d_o[c]);
                        }
                    }
                }
            }
        }
        [o, lse, dq, dk, dv]
    }

    fn run(&self, cpu: &Cpu) -> Results {
        let (shape, segments, window) = (self.shape, self.segments.as_slice(), self.window);
        let [q, k, v, d_o, prefix_k, prefix_v] = [&self.q, &self.k, &self.v, &self.d_o, &self.prefix_k, &self.prefix_v]
            .map(|values| activations(cpu, values));
        let (q, k, v) = (&q, &k, &v);
        let (wide, narrow, rows) = (self.q.len(), self.k.len(), self.q.len() / shape.head_dim);
        let (mut o, mut lse) = (activations(cpu, &vec![f32::NAN; wide]), cpu.buffer(rows).unwrap());
        if self.prefix > 0 {
            let prefix = Some(Prefix { k: &prefix_k, v: &prefix_v, len: self.prefix });
            cpu.attention(Attention { o: &mut o, lse: &mut lse, shape, segments, window, q, k, v, prefix }).unwrap();
            return vec![("o", get(cpu, &o, wide)), ("lse", lse.to_vec())];
        }
        cpu.attention(Attention { o: &mut o, lse: &mut lse, shape, segments, window, q, k, v, prefix: None }).unwrap();
        let [mut dq, mut dk, mut dv] = [wide, narrow, narrow].map(|len| activations(cpu, &vec![f32::NAN; len]));
        let (dqs, dks, dvs, o, lse, d_o) = (&mut dq, &mut dk, &mut dv, &o, &lse, &d_o);
        let outputs = AttentionBackward { dq: dqs, dk: dks, dv: dvs, shape, segments, window, d_o, o, lse, q, k, v };
        cpu.attention_backward(outputs).unwrap();
        let gradients = [("dq", &dq, wide), ("dk", &dk, narrow), ("dv", &dv, narrow)];
        let results = [("o", get(cpu, o, wide)), ("lse", lse.to_vec())].into_iter();
        results.chain(gradients.map(|(name, x, len)| (name, get(cpu, x, len)))).collect()
    }

    fn hold(&self) {
        let [o, lse, dq, dk, dv] = self.reference(self.prefix);
        let want = match self.prefix {
            0 => vec![("o", o), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv)],
            _ => vec![("o", o), ("lse", lse)],
        };
        hold(&self.name(), &want, |cpu| self.run(cpu));
    }
}

/// Windows of one key, around the width of a vector and of the blocks of keys and queries, and longer than everything.
#[test]
fn a_window_hides_what_lies_before_it() {
    let shape = AttentionShape { n_heads: 3, kv_heads: 1, head_dim: 6 };
    for window in [0, 1, 2, 15, 16, 17, 31, 100, 127, 128, 129, 255, 256, 257, 400, 10_000] {
        Case::new(shape, &[1, 3, 5, 33, 390], 0, window).hold();
    }
    let shape = AttentionShape { n_heads: 4, kv_heads: 2, head_dim: 16 };
    for window in [5, 140, 300] {
        Case::new(shape, &[290, 2, 128], 0, window).hold();
    }
}

/// The softmax over a single key is constant: a score's gradient is not small, it is zero.
#[test]
fn a_window_of_one_key_leaves_no_gradient_of_scores() {
    let case = Case::new(AttentionShape { n_heads: 2, kv_heads: 1, head_dim: 34 }, &[1, 40, 300], 0, 1);
    for precision in [Precision::F32, Precision::Bf16] {
        let results = case.run(&Cpu::new(CpuOptions { precision, ..CpuOptions::default() }).unwrap());
        for (name, values) in results {
            let zero = values.iter().all(|x| *x == 0.0);
            assert_eq!(zero, ["dq", "dk"].contains(&name), "{name} in {precision:?}");
        }
    }
}

/// The window reaches back into the prefix, whether a segment is a handful of queries or many.
#[test]
fn a_window_reaches_into_the_prefix() {
    let shape = AttentionShape { n_heads: 2, kv_heads: 1, head_dim: 10 };
    for prefix in [1, 37, 300] {
        for window in [0, 1, 2, 4, 20, 64, 290, 310, 1000] {
            Case::new(shape, &[1, 4, 5, 60], prefix, window).hold();
        }
    }
    let shape = AttentionShape { n_heads: 2, kv_heads: 2, head_dim: 64 };
    for window in [3, 700] {
        // Enough values that a query's heads are shared among threads.
        Case::new(shape, &[1, 300], 600, window).hold();
    }
}

/// Of a wide model, whose head is taken by blocks of few ids.
#[test]
fn the_loss_has_the_same_bits_for_any_number_of_threads() {
    let [d, vocab, tokens] = [4096, 1000, 8];
    let head = bytemuck::cast_slice(&values(vocab * d, 5)).to_vec();
    let lm_head = StoredWeight::new(Format::F32, vocab, d, head, RowOrder::Natural).unwrap();
    let (x, targets) = (values(tokens * d, 6), [7, 999, 500, 0, 31, 32, 640, 8]);
    for precision in [Precision::F32, Precision::Bf16] {
        let results = |threads| {
            let cpu = Cpu::new(CpuOptions { threads: Some(threads), precision, ..CpuOptions::default() }).unwrap();
            let (mut nll, mut dx) = (cpu.buffer(tokens).unwrap(), cpu.buffer(tokens * d).unwrap());
            let (x, targets) = (&activations(&cpu, &x), &targets);
            let args = HeadLoss { nll: &mut nll, dx: Some(&mut dx), x, lm_head: &lm_head, targets, scale: 1.0 };
            cpu.head_loss(args).unwrap();
            (nll.to_vec(), dx.to_vec())
        };
        let one = results(1);
        for threads in [2, 6, 16] {
            assert!(results(threads) == one, "{threads} threads in {precision:?}");
        }
    }
}

#[test]
fn a_residual_of_another_type_is_refused_before_anything_is_written() {
    let shape = HydraShape { d_in: 64, d_out: 48, rank: 2, lora_heads: 2, per_head_a: false, router: true };
    let (w, a, b) = (values(64 * 48, 1), values(4 * 64, 2), values(48 * 4, 3));
    let adapter = AdapterRef { shape, a: &a, b: &b, scale: 2.0, gate: Gate::Router(Routing::default()) };
    let layer = HydraLayer { weight: Weight::from_f32(48, 64, &w).unwrap(), adapter: Some(adapter) };
    let cpu = Cpu::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    for tokens in [1, 2, 8] {
        let (x, residual) = (values(tokens * 64, 4), vec![bf16::ONE; tokens * 48]);
        let args = ForwardArgs { residual: Some(Values::Bf16(&residual)), ..ForwardArgs::new(tokens, &x[..]) };
        let (mut y, mut state) = (vec![7.0; tokens * 48], vec![7.0; tokens * 4]);
        assert!(cpu.layer_forward(layer, args, &mut y[..], &mut state).is_err());
        assert!(y.iter().chain(&state).all(|&x| x == 7.0), "{tokens} tokens");
    }
}

#[test]
fn layers_without_columns_are_refused() {
    for (precision, format) in [(Precision::F32, Format::F32), (Precision::Q8, Format::Q8_0)] {
        let cpu = Cpu::new(CpuOptions { threads: Some(2), precision, ..CpuOptions::default() }).unwrap();
        for (d_in, d_out) in [(0, 64), (64, 0)] {
            let weight = Weight::new(format, d_out, d_in, &[], RowOrder::Natural).unwrap();
            let layer = HydraLayer { weight, adapter: None };
            for tokens in [1, 2, 8] {
                let (x, mut y) = (values(tokens * d_in, 1), vec![7.0; tokens * d_out]);
                let refused = cpu.layer_forward(layer, ForwardArgs::new(tokens, &x[..]), &mut y[..], &mut []);
                assert!(refused.is_err() && y.iter().all(|&y| y == 7.0), "{d_in} to {d_out}, {tokens} tokens");
            }
        }
    }
}
