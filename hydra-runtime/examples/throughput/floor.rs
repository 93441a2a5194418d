//! How long an operation takes at least: its arithmetic at the rate of products in registers, its bytes at memory's.

use crate::peak::{Pick, bf16_peak, f32_peak, fastest, q8_peak};
use hydra_kernels::{Bf16Isa, Isa, Q8Isa};
use hydra_runtime::backend::cpu::{CpuOptions, Precision};
use hydra_runtime::backend::{AttentionShape, HydraShape};
use hydra_runtime::batch::Segment;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::AddAssign;

/// What an operation has to do.
#[derive(Clone, Copy, Default)]
pub struct Work {
    /// Multiplications and additions in products.
    pub operations: f64,
    /// Bytes of frozen weights, as they are stored.
    pub weights: f64,
    /// Bytes of other values that are read and written, where there are no products.
    pub values: f64,
}

impl Work {
    /// A frozen matrix [rows, cols] of so many bytes, times `tokens` vectors.
    pub fn product(tokens: usize, [rows, cols]: [usize; 2], bytes: usize) -> Self {
        Self { operations: 2.0 * (tokens * rows * cols) as f64, weights: bytes as f64, values: 0.0 }
    }

    /// An adapter's products, for `tokens` tokens.
    pub fn adapter(tokens: usize, shape: HydraShape) -> Self {
        let HydraShape { d_in, d_out, .. } = shape;
        let products = d_in * shape.stacked_rows() + d_out * shape.mixed_width();
        Self { operations: 2.0 * (tokens * products) as f64, ..Self::default() }
    }

    /// So many products of a query with a key, and as many of a score with a value, as causal attention has.
    pub fn attention(shape: AttentionShape, segments: &[Segment], window: Option<NonZeroUsize>, prefix: usize) -> Self {
        let window = window.map_or(usize::MAX, NonZeroUsize::get);
        let keys = |len: usize| (1..=len).map(|own| (prefix + own).min(window)).sum::<usize>();
        let pairs: usize = segments.iter().map(|segment| keys(segment.len)).sum();
        Self { operations: 4.0 * (pairs * shape.q_width()) as f64, ..Self::default() }
    }

    /// So many values of `size` bytes that are read or written.
    pub fn values(count: usize, size: usize) -> Self {
        Self { values: (count * size) as f64, ..Self::default() }
    }

    /// `times` as many operations.
    pub fn times(self, times: f64) -> Self {
        Self { operations: times * self.operations, ..self }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.operations += other.operations;
        self.weights += other.weights;
        self.values += other.values;
    }
}

/// What the machine does in a second, with all threads of a CPU backend.
pub struct Machine {
    threads: usize,
    /// Operations; 0 where this isn't known.
    operations: f64,
    /// Bytes read.
    read: f64,
    /// Bytes read and written.
    update: f64,
}

impl Machine {
    /// Measures it, for some seconds.
    pub fn measure(options: CpuOptions, threads: usize) -> Self {
        // Not the fastest: others may share the cores, in the run, too.
        let median: Pick = |times| times[times.len() / 2];
        let peak = || match options.precision {
            Precision::F32 => f32_peak(options.isa.unwrap_or_else(Isa::detect), median),
            Precision::Bf16 => bf16_peak(options.bf16_isa.unwrap_or_else(Bf16Isa::detect), median),
            Precision::Q8 => q8_peak(options.q8_isa.unwrap_or_else(Q8Isa::detect), median),
        };
        let [operations, read, update] = together(threads, || {
            let (read, update) = memory_rates();
            [peak(), read, update]
        });
        Self { threads, operations, read, update }
    }

    /// Seconds that the work takes at least; `None` where a rate isn't known.
    pub fn floor(&self, work: Work) -> Option<f64> {
        if work.operations > 0.0 && self.operations == 0.0 {
            return None;
        }
        let products = if work.operations > 0.0 { work.operations / self.operations } else { 0.0 };
        Some(products.max(work.weights / self.read) + work.values / self.update)
    }

    /// A line for people.
    pub fn describe(&self) -> String {
        let Self { threads, operations, read, update } = self;
        let [operations, read, update] = [operations, read, update].map(|rate| rate * 1e-9);
        let memory = format!("{read:.0} GB/s read, {update:.0} GB/s read and written");
        format!("{threads} threads: {operations:.0} GFLOP/s in registers, {memory}")
    }
}

/// Bytes a second that one core reads from memory, and that it reads and writes in `y += x`.
fn memory_rates() -> (f64, f64) {
    const LEN: usize = 16 << 20; // larger than a core's share of any cache
    let (mut y, x) = (vec![1f32; LEN], vec![1f32; LEN]);
    let read = || x.chunks_exact(16).fold([0f32; 16], |sums, x| std::array::from_fn(|i| sums[i] + x[i]));
    let read = (4 * LEN) as f64 / fastest(5, read);
    let update = || y.iter_mut().zip(black_box(&x)).for_each(|(y, x)| *y += x);
    (read, (12 * LEN) as f64 / fastest(5, update))
}

/// What `threads` threads reach together if each does `op`, which returns one's rates, at the same time.
fn together(threads: usize, op: impl Fn() -> [f64; 3] + Sync) -> [f64; 3] {
    let start = std::sync::Barrier::new(threads);
    std::thread::scope(|scope| {
        let run = || {
            start.wait();
            op()
        };
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let rates = running.into_iter().map(|thread| thread.join().expect("measuring doesn't panic"));
        rates.fold([0.0; 3], |sums, rates| std::array::from_fn(|i| sums[i] + rates[i]))
    })
}
