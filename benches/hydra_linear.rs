//! The operator (r = 8, N = 4) at real sizes, forward and backward, in f32 and bf16, on one thread and on all of them;
//! beside it the same layer without an adapter, and the published order: a loop over heads, tensor by tensor.
//!
//! Before a shape is timed, sampled elements of y are held to an f64 sum, the gradients of the two orders to each
//! other, and all threads to one.

mod common;
#[path = "hydra_linear/published.rs"]
mod published;
#[path = "hydra_linear/threaded.rs"]
mod threaded;

use common::{fastest, peaks};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use hydra_kernels::hydra::{
    AdapterGradients, BackwardArgs, ForwardArgs, Gradients, HydraLayer, backward, backward_scratch, forward,
    forward_scratch,
};
use hydra_kernels::{
    Accumulate, AdapterRef, Bf16Isa, Element, Format, Gate, HydraShape, Isa, Routing, RowOrder, Weight, Workspace,
};
use std::hint::black_box;
use std::time::Duration;
use threaded::Threads;

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

struct Problem {
    tokens: usize,
    shape: HydraShape,
    x: Vec<f32>,
    dy: Vec<f32>,
    w: Vec<u8>,
    a: Vec<f32>,
    b: Vec<f32>,
}

/// What the passes write, and their memory.
struct Memory {
    y: Vec<f32>,
    adapter_state: Vec<f32>,
    dx: Vec<f32>,
    da: Vec<f32>,
    db: Vec<f32>,
    scratch: Vec<f32>,
}

impl Problem {
    fn new(tokens: usize, d_out: usize, d_in: usize) -> Self {
        let shape = HydraShape { d_in, d_out, rank: RANK, lora_heads: HEADS, per_head_a: false, router: true };
        Problem {
            tokens,
            shape,
            x: values(tokens * d_in, 1, 1.0),
            dy: values(tokens * d_out, 2, 1.0),
            w: values(d_out * d_in, 3, 0.05).into_iter().flat_map(|w| bf16::from_f32(w).to_le_bytes()).collect(),
            a: values(shape.stacked_rows() * d_in, 4, 0.05),
            b: values(d_out * shape.mixed_width(), 5, 0.05),
        }
    }

    fn weight(&self) -> Weight<'_> {
        Weight::new(Format::Bf16, self.shape.d_out, self.shape.d_in, &self.w, RowOrder::Natural).unwrap()
    }

    fn layer(&self, adapted: bool) -> HydraLayer<'_> {
        let gate = Gate::Router(Routing::default());
        let adapter = AdapterRef { shape: self.shape, a: &self.a, b: &self.b, scale: SCALE, gate };
        HydraLayer { weight: self.weight(), adapter: adapted.then_some(adapter) }
    }

    fn memory(&self) -> Memory {
        let (shape, tokens) = (&self.shape, self.tokens);
        let need = forward_scratch::<f32>(shape, tokens, false).or(backward_scratch::<f32>(shape, tokens, false));
        let zeros = |len: usize| vec![0.0; len];
        Memory {
            y: zeros(tokens * shape.d_out),
            adapter_state: zeros(tokens * shape.state_width()),
            dx: zeros(self.x.len()),
            da: zeros(self.a.len()),
            db: zeros(self.b.len()),
            scratch: zeros(need.0),
        }
    }

    /// One thread: the operator as an embedder calls it.
    fn forward<E: Element>(&self, isa: E::Isa, adapted: bool, memory: &mut Memory) {
        let Memory { y, adapter_state, scratch, .. } = memory;
        let (layer, args) = (self.layer(adapted), ForwardArgs::new(self.tokens, black_box(&self.x[..])));
        let adapter_state = if adapted { &mut adapter_state[..] } else { &mut [] };
        forward::<E>(isa, &layer, &args, &mut y[..], adapter_state, &mut Workspace::new(scratch)).unwrap();
    }

    fn backward<E: Element>(&self, isa: E::Isa, adapted: bool, memory: &mut Memory) {
        let Memory { adapter_state, dx, da, db, scratch, .. } = memory;
        let (layer, args) = (self.layer(adapted), BackwardArgs::new(self.tokens, &self.dy[..], black_box(&self.x[..])));
        let adapter_state = if adapted { &adapter_state[..] } else { &[] };
        let dx = Some(((&mut dx[..]).into(), Accumulate::Overwrite));
        let gradients = Gradients { dx, adapter: adapted.then_some(AdapterGradients { da, db }) };
        let workspace = &mut Workspace::new(scratch);
        backward::<E>(isa, &layer, &args, Some(adapter_state), gradients, workspace).unwrap();
    }

    /// Sampled elements of y against f64.
    fn check(&self, y: &[f32], tolerance: f64) {
        let HydraShape { d_in, d_out, .. } = self.shape;
        let mut row = vec![0.0; d_in];
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        for sample in 0..32 {
            let (t, o) = (sample * 7919 % self.tokens, sample * 104_729 % d_out);
            let x = &self.x[t * d_in..][..d_in];
            let stacked: Vec<f64> = self.a.chunks(d_in).map(|a| dot(x, a)).collect();
            let (lora_down, logits) = stacked.split_at(RANK);
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            self.weight().decode_row(Isa::Portable, o, 0, &mut row);
            let mut want = dot(x, &row);
            for (column, b) in self.b[o * HEADS * RANK..][..HEADS * RANK].iter().enumerate() {
                let gate = logits[column / RANK].exp() / sum;
                want += f64::from(SCALE) * f64::from(*b) * gate * lora_down[column % RANK];
            }
            let got = f64::from(y[t * d_out + o]);
            assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "[{t}, {o}]: {got} where {want} is right");
        }
    }

    /// One thread, all threads and the published order compute the same, the first two bit for bit.
    fn check_all<E: Element>(&self, isa: E::Isa, threads: Threads, tolerance: f64) {
        let [mut one, mut all, mut published] = [(); 3].map(|()| self.memory());
        self.forward::<E>(isa, true, &mut one);
        self.check(&one.y, tolerance);
        self.backward::<E>(isa, true, &mut one);
        self.forward_on::<E>(threads, isa, true, &mut all);
        self.backward_on::<E>(threads, isa, true, &mut all);
        let saved = published::forward(self, &mut published);
        published::backward(self, &mut published, &saved);
        let results = |memory: &Memory| [&memory.y, &memory.dx, &memory.da, &memory.db].map(Vec::clone);
        assert!(results(&one) == results(&all), "threads");
        for (which, (got, want)) in results(&one).iter().zip(&results(&published)).enumerate() {
            let largest = want.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let close = |(got, want): (&f32, &f32)| f64::from((got - want).abs()) <= tolerance * f64::from(largest);
            assert!(got.iter().zip(want).all(close), "result {which} and the published order's");
        }
    }
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Times one precision.
fn time<E: Element>(group: &mut Group<'_>, problem: &Problem, isa: E::Isa, name: &str, threads: Threads) {
    let memory = &mut problem.memory();
    for (kind, adapted) in [("no adapter", false), ("hydra", true)] {
        group.bench_function(format!("{name}, {kind}, forward, 1 thread"), |bench| {
            bench.iter(|| problem.forward::<E>(isa, adapted, memory));
        });
        group.bench_function(format!("{name}, {kind}, backward, 1 thread"), |bench| {
            bench.iter(|| problem.backward::<E>(isa, adapted, memory));
        });
        group.bench_function(format!("{name}, {kind}, forward, all threads"), |bench| {
            bench.iter(|| problem.forward_on::<E>(threads, isa, adapted, memory));
        });
        group.bench_function(format!("{name}, {kind}, backward, all threads"), |bench| {
            bench.iter(|| problem.backward_on::<E>(threads, isa, adapted, memory));
        });
    }
}

fn projections(criterion: &mut Criterion) {
    let (peak, _) = peaks();
    let threads = Threads(std::thread::available_parallelism().map_or(1, |n| n.get()));
    for (name, tokens, d_out, d_in) in SHAPES {
        let problem = Problem::new(tokens, d_out, d_in);
        let (isa, bf16_isa) = (Isa::detect(), Bf16Isa::detect());
        problem.check_all::<f32>(isa, threads, 1e-3);
        problem.check_all::<bf16>(bf16_isa, threads, 5e-2);

        let memory = &mut problem.memory();
        let alone = fastest(5, || problem.forward::<f32>(isa, false, memory));
        let adapted = fastest(5, || problem.forward::<f32>(isa, true, memory));
        let share = 100.0 * (2 * tokens * d_out * d_in) as f64 / alone / peak;
        println!(
            "{name}: frozen at {share:.0} % of the f32 peak; Hydra forward over frozen alone {:.2}",
            adapted / alone
        );

        let mut group = criterion.benchmark_group(format!("{name} {tokens}x{d_out}x{d_in}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        group.throughput(Throughput::Elements(tokens as u64));
        time::<f32>(&mut group, &problem, isa, "f32", threads);
        time::<bf16>(&mut group, &problem, bf16_isa, "bf16", threads);
        group.bench_function("f32, loop over heads, forward, 1 thread", |bench| {
            bench.iter(|| published::forward(&problem, memory));
        });
        let saved = published::forward(&problem, memory);
        group.bench_function("f32, loop over heads, backward, 1 thread", |bench| {
            bench.iter(|| published::backward(&problem, memory, &saved));
        });
        group.finish();
    }
}

criterion_group!(benches, projections);
criterion_main!(benches);
