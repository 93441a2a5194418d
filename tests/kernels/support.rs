//! Numbers, tolerances and instruction sets shared by the tests.

use half::bf16;
use hydra_kernels::{Bf16Isa, Element, Isa};

/// Rounding of one f32 operation.
pub const EPSILON: f64 = f32::EPSILON as f64 / 2.0;

/// The tolerances of all tests.
pub mod tolerance {
    use super::EPSILON;

    /// Of a product of f32 (or of bf16 values) over `k`, in units of Σ |a·b|: the bound of sequential summation.
    pub fn product(k: usize) -> f64 {
        (k as f64 + 8.0) * EPSILON
    }
    /// The whole operator in f32, relative to the largest element of the result.
    pub const OPERATOR_F32: f64 = 1e-5;
    /// With W's products in bf16.
    pub const OPERATOR_BF16: f64 = 2e-2;
    /// Gradients of the f64 reference against its central differences.
    pub const DIFFERENCES: f64 = 1e-6;
    /// Softmax and its gradient, absolute (probabilities are at most 1).
    pub const SOFTMAX: f64 = 1e-6;
    /// exp, ln, √: in units in the last place.
    pub const ULPS: f64 = 2.0;
}

/// An element type with its conversions.
pub trait TestElement: Element {
    const OPERATOR: f64;
    fn from(x: f32) -> Self;
    fn wide(self) -> f32;
    fn isas() -> Vec<Self::Isa>;
}

impl TestElement for f32 {
    const OPERATOR: f64 = tolerance::OPERATOR_F32;
    fn from(x: f32) -> f32 {
        x
    }
    fn wide(self) -> f32 {
        self
    }
    fn isas() -> Vec<Isa> {
        isas()
    }
}

impl TestElement for bf16 {
    const OPERATOR: f64 = tolerance::OPERATOR_BF16;
    fn from(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
    fn isas() -> Vec<Bf16Isa> {
        isas();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        let emulated = crate::amx::emulated();
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        let emulated = None;
        Bf16Isa::available().chain(emulated).collect()
    }
}

/// Every instruction set of the machine; panics if the one in `HYDRA_REQUIRE_ISA` isn't among them.
pub fn isas() -> Vec<Isa> {
    if let Ok(name) = std::env::var("HYDRA_REQUIRE_ISA") {
        let there = Isa::by_name(&name).is_some() || Bf16Isa::by_name(&name).is_some();
        assert!(there, "HYDRA_REQUIRE_ISA={name}, which this machine doesn't have");
    }
    Isa::available().collect()
}

/// `len` reproducible values in −1 .. 1 with 8 significant bits, so that they are exact in bf16.
pub fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32()
    };
    (0..len).map(|_| next()).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Asserts that `got` is `want` within `tolerance` times the largest `want`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-30, |m: f64, w| m.max(w.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance * largest, "{what}[{i}]: {got} where {want} is right (largest {largest})");
    }
}
