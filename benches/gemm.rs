//! Single-core products at the projections' real sizes, with the frozen weight decoded and packed in the time, beside this
//! core's peak: a loop of independent FMAs (VDPBF16PS, products of AMX tiles) in registers, measured in the same run.
//!
//! f32 products of dense weights are timed beside those of the `gemm` crate, bf16 ones beside PyTorch's, if HYDRA_PYTHON names a
//! Python that has it. Before a shape is timed, sampled elements are held to an f64 sum.

mod common;
#[path = "common/torch.rs"]
mod torch;

use common::{aligned, fastest, peaks};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use hydra_kernels::{
    Accumulate, Bf16Isa, Element, Format, Isa, MatRef, Panels, RowOrder, Source, Term, Values, Weight, gemm, matvec,
    pack, panels_len, to_bf16,
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

/// Columns packed together, as the engine does.
fn chunk(k: usize) -> usize {
    ((1 << 20) / k).max(512).next_multiple_of(32)
}

/// Deeper products into bf16 are summed beside their place, as the engine does.
const DEEP: usize = 2048;

/// Small values, exact in bf16.
fn value(i: usize) -> f32 {
    (i.wrapping_mul(2_654_435_761) >> 16 & 15) as f32 / 8.0 - 1.0
}

fn weight_bytes(format: Format, elements: usize) -> Vec<u8> {
    match format {
        Format::Bf16 => (0..elements).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect(),
        // Q4_1 and Q4_K begin with two f16 scales: 1/4 and 1/8; whatever follows is valid.
        _ => (0..elements / format.block_len())
            .flat_map(|block| {
                let rest = (4..format.block_bytes()).map(move |i| ((block + i).wrapping_mul(37) >> 2) as u8);
                [0x00, 0x34, 0x00, 0x30].into_iter().chain(rest)
            })
            .collect(),
    }
}

/// Hands `multiply` X and each chunk of W's rows, packed, with the first's number.
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
        multiply(first, Term { a: MatRef::row_major(x, k), b: Panels { data: &*panels, k, n: columns } });
    }
}

/// One X Wᵀ by chunks of columns, packing included.
fn product(isa: Isa, y: &mut [f32], x: &[f32], m: usize, weight: Weight<'_>, panels: &mut [f32]) {
    let n = weight.rows();
    by_chunks(isa, x.into(), weight, panels, |first, term| {
        gemm(isa, &mut y[first..], n, m, term.b.n, Accumulate::Overwrite, &[term]).unwrap();
    });
}

/// The same into bf16.
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

/// The same by the `gemm` crate, from a weight that is f32 already, on one thread.
fn other_crate(y: &mut [f32], x: &[f32], w: &[f32], m: usize, n: usize, k: usize) {
    assert!(y.len() == m * n && x.len() == m * k && w.len() == n * k);
    let parallelism = gemm_crate::Parallelism::None;
    // SAFETY: the assert: three dense matrices, x and y by rows, w by columns of [k, n].
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

/// Holds 64 elements of `y` to the f64 sum over decoded rows.
fn check(y: &[f32], x: impl Fn(usize) -> f32, m: usize, weight: Weight<'_>, exact: bool) {
    let n = weight.rows();
    let sampled: Vec<f32> = (0..64).map(|sample| y[sample * 7919 % m * n + sample * 104_729 % n]).collect();
    check_sampled(&sampled, x, m, weight, exact);
}

fn check_sampled(sampled: &[f32], x: impl Fn(usize) -> f32, m: usize, weight: Weight<'_>, exact: bool) {
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
        // Quantised weights are rounded to bf16 where the product is bf16's, and so are its results.
        let tolerance = if exact { (k + 8) as f64 * 6e-8 } else { 4e-3 };
        let got = f64::from(got);
        assert!((got - want).abs() <= tolerance * size, "[{i}, {j}]: {got} where {want} is right");
    }
}

fn shapes(criterion: &mut Criterion) {
    let (f32_peak, bf16_peak) = peaks();
    if std::env::var_os(PYTHON).is_none() {
        println!("{PYTHON} names no Python with PyTorch: its products are left out");
    }
    println!("peak of one core: {:.1} GFLOP/s f32, {:.1} bf16", f32_peak * 1e-9, bf16_peak * 1e-9);
    for (name, m, n, k) in SHAPES {
        let mut group = criterion.benchmark_group(format!("{name} {m}x{n}x{k}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        let operations = (2 * m * n * k) as f64;
        group.throughput(Throughput::Elements(operations as u64));
        for format in [Format::Bf16, Format::Q4_1, Format::Q4K] {
            if k % format.block_len() != 0 {
                continue; // K-formats need rows of whole super-blocks
            }
            let bytes = weight_bytes(format, n * k);
            let weight = Weight::new(format, n, k, &bytes, RowOrder::Natural).unwrap();
            let mut y = vec![0.0; m * n];

            let x: Vec<f32> = (0..m * k).map(value).collect();
            let isa = Isa::detect();
            let mut panels = aligned(panels_len::<f32>(isa, k, chunk(k).min(n)), 0.0);
            let panels = panels.on_line();
            let seconds = fastest(3, || product(isa, &mut y, &x, m, weight, panels));
            check(&y, value, m, weight, true);
            let share = 100.0 * operations / seconds / f32_peak;
            println!(
                "{name}, {}: f32 {:.1} GFLOP/s, {share:.0} % of the peak",
                format.name(),
                operations / seconds * 1e-9
            );
            group.bench_function(BenchmarkId::new("f32", format.name()), |bench| {
                bench.iter(|| product(isa, &mut y, black_box(&x), m, weight, panels));
            });

            if format == Format::Bf16 {
                let mut dense = vec![0.0; n * k];
                for (row, out) in dense.chunks_exact_mut(k).enumerate() {
                    weight.decode_row(Isa::detect(), row, 0, out);
                }
                let mut theirs = vec![0.0; m * n];
                other_crate(&mut theirs, &x, &dense, m, n, k);
                check(&theirs, value, m, weight, true);
                group.bench_function(BenchmarkId::new("f32", "dense, the gemm crate"), |bench| {
                    bench.iter(|| other_crate(&mut theirs, black_box(&x), &dense, m, n, k));
                });
            }

            let x: Vec<bf16> = x.into_iter().map(bf16::from_f32).collect();
            let isa = Bf16Isa::detect();
            let mut panels = aligned(panels_len::<bf16>(isa, k, chunk(k).min(n)), bf16::ZERO);
            let panels = panels.on_line();
            let mut narrow = aligned(x.len(), bf16::ZERO);
            let narrow = narrow.on_line();
            narrow.copy_from_slice(&x);
            let x = &*narrow;
            let (mut rounded, mut sums) = (aligned(m * n, bf16::ZERO), aligned(m * chunk(k), 0.0));
            let (rounded, sums) = (rounded.on_line(), sums.on_line());
            let seconds = fastest(3, || product_rounded(isa, rounded, x, m, weight, panels, sums));
            y.iter_mut().zip(&*rounded).for_each(|(y, x)| *y = x.to_f32());
            check(&y, value, m, weight, false);
            let share = 100.0 * operations / seconds / bf16_peak;
            println!(
                "{name}, {}: bf16 {:.1} GFLOP/s, {share:.0} % of the peak",
                format.name(),
                operations / seconds * 1e-9
            );
            group.bench_function(BenchmarkId::new("bf16", format.name()), |bench| {
                bench.iter(|| product_rounded(isa, rounded, black_box(x), m, weight, panels, sums));
            });
            if format == Format::Bf16
                && let Some((mut torch, sampled)) = Torch::begin(m, n, k)
            {
                check_sampled(&sampled, value, m, weight, false);
                group.bench_function(BenchmarkId::new("bf16", "dense, PyTorch"), |bench| {
                    bench.iter_custom(|products| torch.time(products));
                });
            }
        }
        group.finish();
    }
}

/// One token against SmolLM2-135M's head: bytes of weight a second.
fn token(criterion: &mut Criterion) {
    let (n, k) = (49_152, 576);
    let mut group = criterion.benchmark_group(format!("SmolLM2-135M head, one token {n}x{k}"));
    group.sample_size(10).measurement_time(Duration::from_secs(1));
    for format in [Format::Bf16, Format::Q4_1] {
        let bytes = weight_bytes(format, n * k);
        let weight = Weight::new(format, n, k, &bytes, RowOrder::Natural).unwrap();
        let x: Vec<f32> = (0..k).map(value).collect();
        let mut y = vec![0.0; n];
        matvec(Isa::detect(), &mut y, weight, 0, &x).unwrap();
        check(&y, value, 1, weight, true);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format.name(), |bench| {
            bench.iter(|| matvec(Isa::detect(), &mut y, weight, 0, black_box(&x)).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, shapes, token);
criterion_main!(benches);
