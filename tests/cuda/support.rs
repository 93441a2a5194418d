//! Random operands on two backends, and comparisons.

#[path = "../close.rs"]
mod close;

use hydra_runtime::backend::Backend;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::backend::cuda::{Cuda, Gpu};
use std::path::{Path, PathBuf};

/// A golden case's folder, in `HYDRA_GOLDEN` where the tests run on another machine than the one that built them.
pub fn golden_case(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("HYDRA_GOLDEN").map_or(here, PathBuf::from).join(name)
}

/// Tolerance for bf16 operands or results, relative to the largest value.
pub const BF16: f32 = 1e-2;
/// Tolerance where everything is f32.
pub const F32: f32 = 1e-4;

/// Device number `HYDRA_CUDA_DEVICE`, or the first one.
pub fn gpu() -> Cuda<Gpu> {
    let ordinal = std::env::var("HYDRA_CUDA_DEVICE").map_or(0, |number| number.parse().expect("a device's number"));
    Cuda::new(Gpu::open(ordinal).expect("a CUDA device"))
}

pub fn cpu() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap()
}

/// The number of cases of a test on a GPU; `HYDRA_CUDA_CASES` limits it under slow tools.
pub fn cases(all: u64) -> u64 {
    let most = std::env::var("HYDRA_CUDA_CASES").map(|text| text.parse().expect("HYDRA_CUDA_CASES is a number"));
    most.map_or(all, |most| all.min(most))
}

/// A reproducible random generator.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// A number in `from ..= to`.
    pub fn within(&mut self, from: usize, to: usize) -> usize {
        from + self.bits() as usize % (to - from + 1)
    }

    pub fn coin(&mut self) -> bool {
        self.bits() & 1 == 1
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.bits() as f32 / (1u64 << 31) as f32 - 1.0).collect()
    }

    /// Values that bf16 represents exactly.
    pub fn rounded(&mut self, len: usize) -> Vec<f32> {
        self.values(len).into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect()
    }

    pub fn ids(&mut self, len: usize, below: usize) -> Vec<u32> {
        (0..len).map(|_| self.bits() % below as u32).collect()
    }
}

/// A buffer with these values.
pub fn put<B: Backend>(backend: &B, values: &[f32]) -> B::Buffer {
    let mut buffer = backend.buffer(values.len()).unwrap();
    backend.upload(&mut buffer, values).unwrap();
    buffer
}

/// Activations with these values.
pub fn put_activations<B: Backend>(backend: &B, values: &[f32]) -> B::Activations {
    let mut activations = backend.activations(values.len()).unwrap();
    backend.upload_activations(&mut activations, values).unwrap();
    activations
}

/// Activations with these values in rows, which a device may leave room behind.
pub fn put_rows<B: Backend>(backend: &B, width: usize, values: &[f32]) -> B::Activations {
    let mut activations = backend.operand(values.len() / width, width).unwrap();
    backend.upload_activations(&mut activations, values).unwrap();
    activations
}

/// A buffer's first `len` values.
pub fn get<B: Backend>(backend: &B, buffer: &B::Buffer, len: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; len];
    backend.download(&mut values, buffer).unwrap();
    values
}

/// The first `len` activations.
pub fn get_activations<B: Backend>(backend: &B, activations: &B::Activations, len: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; len];
    backend.download_activations(&mut values, activations).unwrap();
    values
}

/// The smallest scale of a comparison: terms of order 1 cancel in smaller results, such as the gradient of one key's
/// softmax.
const CANCELLED: f64 = 0.1;

/// Asserts that each element of `got` is within `tolerance` of `want`, relative to the largest `want`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    close::assert_close(what, got, want, tolerance.into(), CANCELLED);
}

/// An operation's results on one backend, by name.
pub type Results = Vec<(&'static str, Vec<f32>)>;

/// Compares the results of two backends one by one.
#[track_caller]
pub fn assert_same(case: &str, got: Results, want: Results, tolerance: f32) {
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        assert_close(&format!("{case}: {name}"), got, want, tolerance);
    }
    assert_eq!(got.len(), want.len());
}
