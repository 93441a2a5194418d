//! A frozen projection alone and with Hydra (r = 8, N = 4): forward, and forward with backward, on one core; beside it the
//! published order, a loop over heads that projects the gated input of each head in full.
//!
//! Before a shape is timed, sampled elements of y are held to an f64 sum, and both orders to each other.

mod common;

use common::{fastest, peaks};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use hydra_kernels::hydra::{backward, backward_scratch, forward, forward_scratch};
use hydra_kernels::{
    Accumulate, AdapterRef, Dropouts, Element, Format, Gate, HydraShape, Isa, MatRef, Panels, Routing, RowOrder,
    Source, Term, Weight, Workspace, gemm, pack, panels_len,
};
use std::hint::black_box;
use std::time::Duration;

/// (name, tokens, d_out, d_in)
const SHAPES: [(&str, usize, usize, usize); 3] = [
    ("SmolLM2-135M gate,up", 512, 1536, 576),
    ("SmolLM2-135M down", 512, 576, 1536),
    ("LLaMA-2-7B q,k,v,o", 512, 4096, 4096),
];
const RANK: usize = 8;
const HEADS: usize = 4;
const SCALE: f32 = 4.0;

fn values(len: usize, seed: usize, size: f32) -> Vec<f32> {
    (0..len)
        .map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 16 & 0xff) as f32 / 128.0 - 1.0)
        .map(|x| x * size)
        .collect()
}

/// y = x Wᵀ (`Accumulate::Overwrite`) or y += it, W packed by chunks of 256 rows into `panels`.
#[allow(clippy::too_many_arguments)]
fn linear(y: &mut [f32], x: &[f32], m: usize, weight: Weight<'_>, scale: f32, store: Accumulate, panels: &mut [f32]) {
    let (isa, n, k) = (Isa::detect(), weight.rows(), weight.cols());
    for first in (0..n).step_by(256) {
        let columns = 256.min(n - first);
        pack(isa, panels, k, columns, Source::WeightRows { weight, first }, scale).unwrap();
        let term = Term { a: MatRef::row_major(x, k), b: Panels { data: &*panels, k, n: columns } };
        gemm(isa, &mut y[first..], n, m, columns, store, &[term]).unwrap();
    }
}

struct Problem {
    shape: HydraShape,
    x: Vec<f32>,
    dy: Vec<f32>,
    w: Vec<u8>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Problem {
    fn new(tokens: usize, d_out: usize, d_in: usize) -> Self {
        let shape = HydraShape { tokens, d_in, d_out, rank: RANK, lora_heads: HEADS, per_head_a: false, router: true };
        Problem {
            shape,
            x: values(tokens * d_in, 1, 1.0),
            dy: values(tokens * d_out, 2, 1.0),
            w: values(d_out * d_in, 3, 0.05).into_iter().flat_map(|w| bf16::from_f32(w).to_le_bytes()).collect(),
            a: values(shape.stacked_rows() * d_in, 4, 0.05),
            b: values(d_out * shape.mixed(), 5, 0.05),
        }
    }

    fn weight(&self) -> Weight<'_> {
        Weight::new(Format::Bf16, self.shape.d_out, self.shape.d_in, &self.w, RowOrder::Natural).unwrap()
    }

    fn adapter(&self) -> AdapterRef<'_> {
        AdapterRef { a: &self.a, b: &self.b, scale: SCALE }
    }

    fn forward<E: Element>(&self, isa: E::Isa, y: &mut [f32], adapter_state: &mut [f32], memory: &mut [f32]) {
        let workspace = &mut Workspace::new(memory);
        let (weight, adapter) = (self.weight(), self.adapter());
        forward::<E>(
            isa,
            &self.shape,
            y,
            adapter_state,
            &self.x,
            weight,
            adapter,
            Gate::Router(Routing::default()),
            Dropouts::default(),
            workspace,
        )
        .unwrap();
    }

    fn backward<E: Element>(&self, isa: E::Isa, grads: &mut [Vec<f32>; 3], adapter_state: &[f32], memory: &mut [f32]) {
        let workspace = &mut Workspace::new(memory);
        let (weight, adapter, [dx, da, db]) = (self.weight(), self.adapter(), grads);
        let (dy, x) = (&self.dy, &self.x);
        backward::<E>(
            isa,
            &self.shape,
            dx,
            da,
            db,
            dy,
            x,
            weight,
            adapter,
            adapter_state,
            Gate::Router(Routing::default()),
            Dropouts::default(),
            workspace,
        )
        .unwrap();
    }

    /// The published order: for each head, gate_e ∘ (s · B_e (A x)) added to y, tensor by tensor.
    fn naive(&self, y: &mut [f32], panels: &mut [f32]) {
        let HydraShape { tokens, d_in, d_out, .. } = self.shape;
        linear(y, &self.x, tokens, self.weight(), 1.0, Accumulate::Overwrite, panels);
        let (a, r) = self.a.split_at(RANK * d_in);
        let mut logits = vec![0.0; tokens * HEADS];
        linear(
            &mut logits,
            &self.x,
            tokens,
            Weight::from_f32(HEADS, d_in, r).unwrap(),
            1.0,
            Accumulate::Overwrite,
            panels,
        );
        hydra_kernels::softmax::softmax_rows(Isa::detect(), &mut logits, HEADS).unwrap();
        for head in 0..HEADS {
            let mut down = vec![0.0; tokens * RANK];
            linear(
                &mut down,
                &self.x,
                tokens,
                Weight::from_f32(RANK, d_in, a).unwrap(),
                1.0,
                Accumulate::Overwrite,
                panels,
            );
            let b: Vec<f32> =
                self.b.chunks(HEADS * RANK).flat_map(|row| &row[head * RANK..][..RANK]).copied().collect();
            let mut up = vec![0.0; tokens * d_out];
            let b = Weight::from_f32(d_out, RANK, &b).unwrap();
            linear(&mut up, &down, tokens, b, SCALE, Accumulate::Overwrite, panels);
            for ((y, up), gate) in y.chunks_mut(d_out).zip(up.chunks(d_out)).zip(logits.chunks(HEADS)) {
                y.iter_mut().zip(up).for_each(|(y, up)| *y += gate[head] * up);
            }
        }
    }

    /// Sampled elements of y against f64.
    fn check(&self, y: &[f32], tolerance: f64) {
        let HydraShape { d_in, d_out, .. } = self.shape;
        let mut row = vec![0.0; d_in];
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        for sample in 0..32 {
            let (t, o) = (sample * 7919 % self.shape.tokens, sample * 104_729 % d_out);
            let x = &self.x[t * d_in..][..d_in];
            let stacked: Vec<f64> = self.a.chunks(d_in).map(|a| dot(x, a)).collect();
            let (down, logits) = stacked.split_at(RANK);
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            self.weight().decode_row(Isa::Portable, o, 0, &mut row);
            let mut want = dot(x, &row);
            for (column, b) in self.b[o * HEADS * RANK..][..HEADS * RANK].iter().enumerate() {
                let gate = logits[column / RANK].exp() / sum;
                want += f64::from(SCALE) * f64::from(*b) * gate * down[column % RANK];
            }
            let got = f64::from(y[t * d_out + o]);
            assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "[{t}, {o}]: {got} where {want} is right");
        }
    }
}

fn projections(criterion: &mut Criterion) {
    let (peak, _) = peaks();
    for (name, tokens, d_out, d_in) in SHAPES {
        let problem = Problem::new(tokens, d_out, d_in);
        let shape = &problem.shape;
        let (isa, bf16_isa) = (Isa::detect(), hydra_kernels::Bf16Isa::detect());
        let (mut y, mut adapter_state) = (vec![0.0; tokens * d_out], vec![0.0; tokens * shape.state_width()]);
        let mut grads = [&problem.x, &problem.a, &problem.b].map(|like| vec![0.0; like.len()]);
        let need = forward_scratch::<f32>(shape, false).or(backward_scratch::<f32>(shape, false));
        let need = need.or(forward_scratch::<bf16>(shape, false)).or(backward_scratch::<bf16>(shape, false));
        let mut memory = vec![0.0; need.0];
        let mut panels = vec![0.0; panels_len::<f32>(isa, d_in, 256)];

        problem.forward::<f32>(isa, &mut y, &mut adapter_state, &mut memory);
        problem.check(&y, 1e-3);
        problem.naive(&mut y, &mut panels);
        problem.check(&y, 1e-3);
        problem.forward::<bf16>(bf16_isa, &mut y, &mut adapter_state, &mut memory);
        problem.check(&y, 5e-2);

        let alone = fastest(5, || {
            linear(&mut y, black_box(&problem.x), tokens, problem.weight(), 1.0, Accumulate::Overwrite, &mut panels)
        });
        let adapted = fastest(5, || problem.forward::<f32>(isa, &mut y, &mut adapter_state, &mut memory));
        let share = 100.0 * (2 * tokens * d_out * d_in) as f64 / alone / peak;
        println!(
            "{name}: frozen at {share:.0} % of the f32 peak; Hydra forward over frozen alone {:.2}",
            adapted / alone
        );

        let mut group = criterion.benchmark_group(format!("{name} {tokens}x{d_out}x{d_in}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function("frozen alone, forward", |bench| {
            bench.iter(|| {
                linear(&mut y, black_box(&problem.x), tokens, problem.weight(), 1.0, Accumulate::Overwrite, &mut panels)
            });
        });
        group.bench_function("hydra, forward", |bench| {
            bench.iter(|| problem.forward::<f32>(isa, &mut y, &mut adapter_state, &mut memory));
        });
        group.bench_function("loop over heads, forward", |bench| {
            bench.iter(|| problem.naive(&mut y, &mut panels));
        });
        group.bench_function("hydra, forward and backward", |bench| {
            bench.iter(|| {
                problem.forward::<f32>(isa, &mut y, &mut adapter_state, &mut memory);
                problem.backward::<f32>(isa, &mut grads, &adapter_state, &mut memory);
            });
        });
        group.bench_function("hydra in bf16, forward and backward", |bench| {
            bench.iter(|| {
                problem.forward::<bf16>(bf16_isa, &mut y, &mut adapter_state, &mut memory);
                problem.backward::<bf16>(bf16_isa, &mut grads, &adapter_state, &mut memory);
            });
        });
        group.finish();
    }
}

criterion_group!(benches, projections);
criterion_main!(benches);
