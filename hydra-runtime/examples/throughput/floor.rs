//! How long an operation takes at least: its arithmetic at the rate of products in registers, and its bytes at that of memory.

use crate::peak::{Pick, bf16_peak, f32_peak, memory_rates, q8_peak, together};
use hydra_kernels::{Bf16Isa, Isa, Q8Isa};
use hydra_runtime::backend::cpu::{CpuOptions, Precision};
use hydra_runtime::backend::{AttentionShape, HydraShape};
use hydra_runtime::batch::Segment;
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
        let peak = || match options.precision {
            Precision::F32 => f32_peak(options.isa.unwrap_or_else(Isa::detect), Pick::Median),
            Precision::Bf16 => bf16_peak(options.bf16_isa.unwrap_or_else(Bf16Isa::detect), Pick::Median),
            Precision::Q8 => q8_peak(options.q8_isa.unwrap_or_else(Q8Isa::detect), Pick::Median),
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
        format!(
            "{threads} threads: {operations:.0} GFLOP/s in registers, {read:.0} GB/s read, {update:.0} GB/s read and written"
        )
    }
}
