//! One token times a weight: bytes of stored weight per second on one core, beside a plain read of a large buffer in
//! the same run, which is the limit that memory sets.
//!
//! Before a format is timed, sampled rows are compared with an f64 sum over the decoded row.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hydra_kernels::{Format, Isa, Q8Isa, RowOrder, Weight, Workspace, matvec, q8};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// (name, d_out, d_in): the lm_head, whose weights come from memory, and layers that may fit in a cache.
const SHAPES: [(&str, usize, usize); 3] =
    [("SmolLM2-135M lm_head", 49_152, 576), ("SmolLM2-135M down", 576, 1536), ("LLaMA-2-7B q,k,v,o", 4096, 4096)];

/// Bytes of the plain read: more than the caches hold.
const BUFFER: usize = 256 << 20;

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Seconds of the fastest of `tries`.
fn fastest<R>(tries: usize, mut op: impl FnMut() -> R) -> f64 {
    let times = (0..tries).map(|_| {
        let start = Instant::now();
        black_box(op());
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Bytes per second at which one core reads a large buffer and combines its words.
fn bandwidth() -> f64 {
    let buffer = vec![1u64; BUFFER / 8];
    let mix = |x: &[u64]| {
        Isa::detect().vectorize(
            #[inline(always)]
            || x.iter().fold(0u64, |mix, x| mix ^ x),
        )
    };
    BUFFER as f64 / fastest(5, || mix(black_box(&buffer)))
}

/// Blocks with scales of 1/8 and arbitrary other bytes; small numbers in plain formats.
fn weight_bytes(format: Format, elements: usize) -> Vec<u8> {
    let eighth = [0x00, 0x30]; // f16
    let scales: &[usize] = match format {
        Format::F32 => return (0..elements).flat_map(|i| value(i).to_le_bytes()).collect(),
        Format::F16 => return (0..elements).flat_map(|i| half::f16::from_f32(value(i)).to_le_bytes()).collect(),
        Format::Bf16 => return (0..elements).flat_map(|i| half::bf16::from_f32(value(i)).to_le_bytes()).collect(),
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 | Format::IQ4_NL | Format::IQ4_XS => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q2K => &[80, 82],
        Format::Q3K => &[108],
        Format::Q6K => &[208],
    };
    let mut bytes: Vec<u8> = (0..elements / format.block_len() * format.block_bytes())
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        scales.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&eighth));
    }
    bytes
}

/// Small values, exact in bf16.
fn value(i: usize) -> f32 {
    (i.wrapping_mul(2_654_435_761) >> 16 & 15) as f32 / 8.0 - 1.0
}

/// `rounding`: how far a result may be, in units of the sum of the products' magnitudes.
fn check(y: &[f32], x: &[f32], weight: Weight<'_>, rounding: f64) {
    let mut row = vec![0.0; weight.cols()];
    for sample in 0..64 {
        let at = sample * 104_729 % weight.rows();
        weight.decode_row(Isa::Portable, at, 0, &mut row);
        let terms = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
        let (want, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        let error = (f64::from(y[at]) - want).abs();
        assert!(error <= rounding * size, "row {at}: expected {want}, found {}", y[at]);
    }
}

fn print(name: &str, format: Format, isa: &str, speed: f64, memory: f64) {
    let (speed, share) = (speed * 1e-9, 100.0 * speed / memory);
    println!("{name}, {} on {isa}: {speed:.1} GB/s, {share:.0} % of a plain read", format.name());
}

/// Activations in eight bits, quantized as a part of the product.
fn q8_products(group: &mut Group<'_>, (name, memory): (&str, f64), weight: Weight<'_>, x: &[f32]) {
    let (rows, cols, format) = (weight.rows(), weight.cols(), weight.format());
    let bytes = rows * format.row_bytes(cols).expect("whole blocks");
    let (mut y, mut quantized) = (vec![0.0; rows], vec![q8::Block::ZERO; q8::blocks(cols)]);
    let mut scratch = vec![0.0; q8::product_scratch(cols).0];
    for isa in Q8Isa::available().filter(|&isa| isa != Q8Isa::Portable || Q8Isa::detect() == Q8Isa::Portable) {
        let mut product = |y: &mut [f32], x: &[f32]| {
            q8::quantize(isa.widened(), &mut quantized, cols, x).unwrap();
            q8::product(isa, y, weight, 0..rows, &quantized, &mut Workspace::new(&mut scratch)).unwrap();
        };
        product(&mut y, x);
        check(&y, x, weight, 1e-2);
        let kind = format!("{} in q8", isa.name());
        print(name, format, &kind, bytes as f64 / fastest(10, || product(&mut y, x)), memory);
        group.bench_function(BenchmarkId::new(kind, format.name()), |bench| {
            bench.iter(|| product(&mut y, black_box(x)));
        });
    }
}

fn decode(criterion: &mut Criterion) {
    let memory = bandwidth();
    println!("a plain read: {:.1} GB/s", memory * 1e-9);
    for (name, rows, cols) in SHAPES {
        let mut group = criterion.benchmark_group(format!("{name} {rows}x{cols}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
        let x: Vec<f32> = (0..cols).map(value).collect();
        let mut y = vec![0.0; rows];
        for format in Format::ALL.into_iter().filter(|format| cols.is_multiple_of(format.block_len())) {
            let bytes = weight_bytes(format, rows * cols);
            let weight = Weight::new(format, rows, cols, &bytes, RowOrder::Natural).unwrap();
            group.throughput(Throughput::Bytes(bytes.len() as u64));
            for isa in Isa::available().filter(|&isa| isa != Isa::Portable || Isa::detect() == Isa::Portable) {
                matvec(isa, &mut y, weight, 0, &x).unwrap();
                check(&y, &x, weight, (cols + 8) as f64 * 6e-8);
                let speed = bytes.len() as f64 / fastest(10, || matvec(isa, &mut y, weight, 0, &x).unwrap());
                print(name, format, isa.name(), speed, memory);
                group.bench_function(BenchmarkId::new(isa.name(), format.name()), |bench| {
                    bench.iter(|| matvec(isa, &mut y, weight, 0, black_box(&x)).unwrap());
                });
            }
            if q8::serves(format) {
                q8_products(&mut group, (name, memory), weight, &x);
            }
        }
        group.finish();
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
