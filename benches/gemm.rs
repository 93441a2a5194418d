//! Products at the projections' real sizes on one core, decoding and packing of the frozen weight included, beside the
//! core's peak: a loop of independent FMAs (VDPBF16PS, or products of AMX tiles) in registers, measured in the same
//! run.
//!
//! Products of activations in eight bits with block formats, their quantization included, stand beside the f32 peak.
//! f32 products of dense weights are timed beside those of the `gemm` crate, and bf16 products beside PyTorch's if
//! HYDRA_PYTHON names a Python that has it. Before a product is timed, sampled elements are compared with an f64 sum.

mod common;
#[path = "common/torch.rs"]
mod torch;

use common::{aligned, fastest, peaks};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use hydra_kernels::{
    Accumulate, Bf16Isa, Element, Format, Isa, MatRef, Panels, Q8Isa, RowOrder, Source, Term, Values, Weight,
    Workspace, gemm, matvec, pack, panels_len, q8, to_bf16,
};
use std::hint::black_box;
use std::time::Duration;
use torch::{PYTHON, Torch};

/// (name, tokens, d_out, d_in)
const SHAPES: [(&str, usize, usize, usize); 7] = [
    ("SmolLM2-135M q,o", 512, 576, 576),
    ("SmolLM2-135M k,v", 512, 192, 576),
    ("SmolLM2-135M gate,up", 512, 1536, 576),
    ("SmolLM2-135M down", 512, 576, 1536),
    ("LLaMA-2-7B q,k,v,o", 512, 4096, 4096),
    ("LLaMA-2-7B gate,up", 512, 11008, 4096),
    ("LLaMA-2-7B down", 512, 4096, 11008),
];

/// Columns that are packed together, as in the runtime.
fn chunk(k: usize) -> usize {
    ((1 << 20) / k).max(512).next_multiple_of(32)
}

/// A bf16 product with a larger k is summed in f32 first, as in the runtime.
const DEEP: usize = 2048;

/// Small values, exact in bf16.
fn value(i: usize) -> f32 {
    (i.wrapping_mul(2_654_435_761) >> 16 & 15) as f32 / 8.0 - 1.0
}

fn weight_bytes(format: Format, elements: usize) -> Vec<u8> {
    match format {
        Format::Bf16 => (0..elements).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect(),
        // A block of Q4_1 or Q4_K starts with two f16 scales, here 1/4 and 1/8; one of Q8_0 with one. Any bytes are valid
        // behind them.
        _ => (0..elements / format.block_len())
            .flat_map(|block| {
                let rest = (4..format.block_bytes()).map(move |i| ((block + i).wrapping_mul(37) >> 2) as u8);
                [0x00, 0x34, 0x00, 0x30].into_iter().chain(rest)
            })
            .collect(),
    }
}

/// Packs W by chunks of rows, and calls `multiply` with each chunk's first row and its term.
fn by_chunks<E: Element>(
    isa: E::Isa,
    x: Values<'_>,
    weight: Weight<'_>,
    panels: &mut [E],
    mut multiply: impl FnMut(usize, Term<'_, E>),
) {
    let (n, k) = (weight.rows(), weight.cols());
    for first in (0..n).step_by(chunk(k)) {
        let columns = chunk(k).min(n - first);
        pack(isa, panels, k, columns, Source::WeightRows { weight, first }, 1.0).unwrap();
        multiply(first, Term { a: MatRef::row_major(x, k), b: Panels::new(&*panels, k, columns) });
    }
}

/// X Wᵀ in f32, packing included.
fn product(isa: Isa, y: &mut [f32], x: &[f32], m: usize, weight: Weight<'_>, panels: &mut [f32]) {
    let n = weight.rows();
    by_chunks(isa, x.into(), weight, panels, |first, term| {
        gemm(isa, &mut y[first..], n, m, term.b.n, Accumulate::Overwrite, &[term]).unwrap();
    });
}

/// X Wᵀ in bf16, packing included.
fn product_rounded(
    isa: Bf16Isa,
    y: &mut [bf16],
    x: &[bf16],
    m: usize,
    weight: Weight<'_>,
    panels: &mut [bf16],
    sums: &mut [f32],
) {
    let n = weight.rows();
    by_chunks(isa, x.into(), weight, panels, |first, term| {
        let columns = term.b.n;
        if weight.cols() <= DEEP {
            return gemm(isa, &mut y[first..], n, m, columns, Accumulate::Overwrite, &[term]).unwrap();
        }
        let sums = &mut sums[..m * columns];
        gemm(isa, &mut *sums, columns, m, columns, Accumulate::Overwrite, &[term]).unwrap();
        for (y, sums) in y.chunks_exact_mut(n).zip(sums.chunks_exact(columns)) {
            to_bf16(isa, &mut y[first..first + columns], sums).unwrap();
        }
    });
}

/// X Wᵀ by the `gemm` crate on one thread, from a weight that is f32 already.
fn other_crate(y: &mut [f32], x: &[f32], w: &[f32], m: usize, n: usize, k: usize) {
    assert!(y.len() == m * n && x.len() == m * k && w.len() == n * k);
    let parallelism = gemm_crate::Parallelism::None;
    // SAFETY: the assert is the size of the three dense matrices: x and y row-major, w [n, k] as the columns of [k, n].
    unsafe {
        gemm_crate::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n as isize,
            false,
            x.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// What a product rounds, and so how far it may be from an f64 sum of k products.
#[derive(Clone, Copy)]
enum Rounding {
    /// f32 sums.
    Exact,
    /// Quantized weights and results, to bf16.
    Bf16,
    /// Activations, to eight bits.
    Q8,
}

impl Rounding {
    /// In units of the sum of the products' magnitudes.
    fn tolerance(self, k: usize) -> f64 {
        match self {
            Rounding::Exact => (k + 8) as f64 * 6e-8,
            Rounding::Bf16 => 4e-3,
            Rounding::Q8 => 1e-2,
        }
    }
}

/// Compares 64 elements of `y` with the f64 sum over decoded rows.
fn check(y: &[f32], x: impl Fn(usize) -> f32, m: usize, weight: Weight<'_>, rounding: Rounding) {
    let n = weight.rows();
    let sampled: Vec<f32> = (0..64).map(|sample| y[sample * 7919 % m * n + sample * 104_729 % n]).collect();
    check_sampled(&sampled, x, m, weight, rounding);
}

fn check_sampled(sampled: &[f32], x: impl Fn(usize) -> f32, m: usize, weight: Weight<'_>, rounding: Rounding) {
    let (n, k) = (weight.rows(), weight.cols());
    let mut row = vec![0.0; k];
    for (sample, &got) in sampled.iter().enumerate() {
        let (i, j) = (sample * 7919 % m, sample * 104_729 % n);
        weight.decode_row(Isa::Portable, j, 0, &mut row);
        let (mut want, mut size) = (0.0, 0.0);
        for (p, &w) in row.iter().enumerate() {
            let product = f64::from(x(i * k + p)) * f64::from(w);
            want += product;
            size += product.abs();
        }
        let got = f64::from(got);
        assert!((got - want).abs() <= rounding.tolerance(k) * size, "[{i}, {j}]: expected {want}, found {got}");
    }
}

/// One product: its name, its sizes and its frozen weight.
struct Problem<'a> {
    name: &'a str,
    m: usize,
    n: usize,
    k: usize,
    weight: Weight<'a>,
}

impl Problem<'_> {
    /// Columns of the panels of a chunk.
    fn panel_columns(&self) -> usize {
        chunk(self.k).min(self.n)
    }

    fn print(&self, kind: &str, seconds: f64, peak: f64) {
        let speed = (2 * self.m * self.n * self.k) as f64 / seconds;
        let format = self.weight.format().name();
        println!(
            "{}, {format}: {kind} {:.1} GFLOP/s, {:.0} % of the peak",
            self.name,
            speed * 1e-9,
            100.0 * speed / peak
        );
    }
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

fn f32_products(group: &mut Group<'_>, problem: &Problem<'_>, peak: f64) {
    let &Problem { m, n, k, weight, .. } = problem;
    let format = weight.format();
    let isa = Isa::detect();
    let x: Vec<f32> = (0..m * k).map(value).collect();
    let mut y = vec![0.0; m * n];
    let mut panels = aligned(panels_len::<f32>(isa, k, problem.panel_columns()), 0.0);
    let panels = panels.on_line();
    let seconds = fastest(3, || product(isa, &mut y, &x, m, weight, panels));
    check(&y, value, m, weight, Rounding::Exact);
    problem.print("f32", seconds, peak);
    group.bench_function(BenchmarkId::new("f32", format.name()), |bench| {
        bench.iter(|| product(isa, &mut y, black_box(&x), m, weight, panels));
    });
    if format == Format::Bf16 {
        let mut dense = vec![0.0; n * k];
        for (row, out) in dense.chunks_exact_mut(k).enumerate() {
            weight.decode_row(isa, row, 0, out);
        }
        other_crate(&mut y, &x, &dense, m, n, k);
        check(&y, value, m, weight, Rounding::Exact);
        group.bench_function(BenchmarkId::new("f32", "dense, the gemm crate"), |bench| {
            bench.iter(|| other_crate(&mut y, black_box(&x), &dense, m, n, k));
        });
    }
}

fn bf16_products(group: &mut Group<'_>, problem: &Problem<'_>, peak: f64) {
    let &Problem { m, n, k, weight, .. } = problem;
    let format = weight.format();
    let isa = Bf16Isa::detect();
    let mut panels = aligned(panels_len::<bf16>(isa, k, problem.panel_columns()), bf16::ZERO);
    let mut x = aligned(m * k, bf16::ZERO);
    let (mut y, mut sums) = (aligned(m * n, bf16::ZERO), aligned(m * chunk(k), 0.0));
    let (panels, x, y, sums) = (panels.on_line(), x.on_line(), y.on_line(), sums.on_line());
    x.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(value(i)));
    let seconds = fastest(3, || product_rounded(isa, y, x, m, weight, panels, sums));
    let widened: Vec<f32> = y.iter().map(|y| y.to_f32()).collect();
    check(&widened, value, m, weight, Rounding::Bf16);
    problem.print("bf16", seconds, peak);
    group.bench_function(BenchmarkId::new("bf16", format.name()), |bench| {
        bench.iter(|| product_rounded(isa, y, black_box(x), m, weight, panels, sums));
    });
    if format == Format::Bf16
        && let Some((mut torch, sampled)) = Torch::begin(m, n, k)
    {
        check_sampled(&sampled, value, m, weight, Rounding::Bf16);
        group.bench_function(BenchmarkId::new("bf16", "dense, PyTorch"), |bench| {
            bench.iter_custom(|products| torch.time(products));
        });
    }
}

/// Activations in eight bits, quantized as a part of the product.
fn q8_products(group: &mut Group<'_>, problem: &Problem<'_>, f32_peak: f64) {
    let &Problem { m, n, k, weight, .. } = problem;
    let (isa, width) = (Q8Isa::detect(), q8::blocks(k));
    let x: Vec<f32> = (0..m * k).map(value).collect();
    let (mut y, mut quantized) = (vec![0.0; m * n], vec![q8::Block::ZERO; m * width]);
    let mut memory = aligned(q8::product_scratch(k).0, 0.0);
    let memory = memory.on_line();
    let mut product = |y: &mut [f32], x: &[f32]| {
        q8::quantize(isa.widened(), &mut quantized, k, x).unwrap();
        q8::product(isa, y, weight, 0..n, &quantized, &mut Workspace::new(memory)).unwrap();
    };
    let seconds = fastest(3, || product(&mut y, &x));
    check(&y, value, m, weight, Rounding::Q8);
    problem.print("q8", seconds, f32_peak);
    group.bench_function(BenchmarkId::new("q8", weight.format().name()), |bench| {
        bench.iter(|| product(&mut y, black_box(&x)));
    });
}

fn shapes(criterion: &mut Criterion) {
    let (f32_peak, bf16_peak) = peaks();
    if std::env::var_os(PYTHON).is_none() {
        println!("{PYTHON} names no Python with PyTorch: PyTorch's products are not timed");
    }
    println!("peak of one core: {:.1} GFLOP/s f32, {:.1} bf16", f32_peak * 1e-9, bf16_peak * 1e-9);
    for (name, m, n, k) in SHAPES {
        let mut group = criterion.benchmark_group(format!("{name} {m}x{n}x{k}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        for format in [Format::Bf16, Format::Q4_1, Format::Q8_0, Format::Q4K] {
            if k % format.block_len() != 0 {
                continue; // rows of the K-formats are whole super-blocks
            }
            let bytes = weight_bytes(format, n * k);
            let weight = Weight::new(format, n, k, &bytes, RowOrder::Natural).unwrap();
            let problem = Problem { name, m, n, k, weight };
            f32_products(&mut group, &problem, f32_peak);
            bf16_products(&mut group, &problem, bf16_peak);
            if q8::serves(format) {
                q8_products(&mut group, &problem, f32_peak);
            }
        }
        group.finish();
    }
}

/// One token times SmolLM2-135M's lm_head, in bytes of weight per second.
fn token(criterion: &mut Criterion) {
    let (n, k) = (49_152, 576);
    let mut group = criterion.benchmark_group(format!("SmolLM2-135M lm_head, one token {n}x{k}"));
    group.sample_size(10).measurement_time(Duration::from_secs(1));
    for format in [Format::Bf16, Format::Q4_1] {
        let bytes = weight_bytes(format, n * k);
        let weight = Weight::new(format, n, k, &bytes, RowOrder::Natural).unwrap();
        let x: Vec<f32> = (0..k).map(value).collect();
        let mut y = vec![0.0; n];
        matvec(Isa::detect(), &mut y, weight, 0, &x).unwrap();
        check(&y, value, 1, weight, Rounding::Exact);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format.name(), |bench| {
            bench.iter(|| matvec(Isa::detect(), &mut y, weight, 0, black_box(&x)).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, shapes, token);
criterion_main!(benches);
