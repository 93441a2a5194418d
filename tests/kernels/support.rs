//! Tolerances, comparisons, random values and instruction sets, shared by the tests.

#[path = "../close.rs"]
mod close;

pub use close::assert_close;

use half::bf16;
use hydra_kernels::random::SplitMix64;
use hydra_kernels::{Bf16Isa, Element, Isa, Q8Isa};
use proptest::prelude::ProptestConfig;

/// The largest relative error of one f32 operation.
pub const EPSILON: f64 = f32::EPSILON as f64 / 2.0;

/// The tolerances of all tests.
pub mod tolerance {
    use super::EPSILON;

    /// An f32 sum of `k` products, in units of Σ |a·b|: the bound of sequential summation.
    pub fn product(k: usize) -> f64 {
        (k as f64 + 8.0) * EPSILON
    }
    /// One rounding to bf16, relative.
    pub const BF16: f64 = 1.0 / 256.0;
    /// The operator in f32, as [`super::assert_close`] measures it.
    pub const OPERATOR_F32: f64 = 1e-5;
    /// The operator with bf16 products or activations, as [`super::assert_close`] measures it.
    pub const OPERATOR_BF16: f64 = 2e-2;
    /// Gradients of the f64 reference against its central differences, relative to the gradient or to 1.
    pub const DIFFERENCES: f64 = 1e-6;
    /// Softmax and its gradient, absolute; log Σ exp, relative to its value or to 1.
    pub const SOFTMAX: f64 = 1e-6;
    /// exp, ln and 1 / √x, in units in the last place.
    pub const ULPS: f64 = 2.0;
    /// ln near 1, absolute.
    pub const LN_NEAR_1: f64 = 1e-7;
    /// silu, relative to its argument or to a thousandth.
    pub const SILU: f64 = 1e-6;
    /// silu's derivative, absolute.
    pub const SILU_DERIVATIVE: f64 = 2e-6;
    /// The reference's exp, relative.
    pub const REFERENCE_EXP: f64 = 1e-14;
    pub const EXP_COARSE: f64 = 2e-5;
    /// The reference's ln, absolute.
    pub const REFERENCE_LN: f64 = 1e-12;
    /// One f32 operation on values of about 1, absolute.
    pub const ONE_OPERATION: f64 = 1e-7;
}

/// What the tests need of an element type.
pub trait TestElement: Element {
    /// The operator's tolerance with products of this type.
    const OPERATOR: f64;
    fn from(x: f32) -> Self;
    fn wide(self) -> f32;
    /// Every instruction set that multiplies this type, AMX by emulation if need be.
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
        #[cfg(all(target_arch = "x86_64", target_os = "linux", feature = "amx"))]
        let emulated = crate::amx::emulated();
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux", feature = "amx")))]
        let emulated = None;
        Bf16Isa::available().chain(emulated).collect()
    }
}

/// Every instruction set of the machine. Panics if the one that `HYDRA_REQUIRE_ISA` names is not among them.
pub fn isas() -> Vec<Isa> {
    if let Ok(name) = std::env::var("HYDRA_REQUIRE_ISA") {
        let there =
            Isa::by_name(&name).is_some() || Bf16Isa::by_name(&name).is_some() || Q8Isa::by_name(&name).is_some();
        assert!(there, "HYDRA_REQUIRE_ISA={name}: this machine does not have that instruction set");
    }
    Isa::available().collect()
}

/// proptest's settings for `cases` cases, or for as many as `PROPTEST_CASES` says if these are fewer.
pub fn cases(cases: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() { config.cases.min(cases) } else { cases },
        ..config
    }
}

/// `len` reproducible values in −1 .. 1 with at most 8 significant bits, so that they are exact in bf16.
pub fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix64::new(seed);
    (0..len).map(|_| bf16::from_f64(2.0 * random.uniform() - 1.0).to_f32()).collect()
}

/// The bits of `x`, for comparisons that tell −0 from 0 and take NaN for itself.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Asserts that `got` is within `allowed` of `want`.
#[track_caller]
pub fn assert_within(what: impl FnOnce() -> String, got: f32, want: f64, allowed: f64) {
    let error = (f64::from(got) - want).abs();
    assert!(error <= allowed, "{}: expected {want} ± {allowed}, found {got}", what());
}

/// Σ a·b and Σ |a·b|.
pub fn dot(products: impl Iterator<Item = (f64, f64)>) -> (f64, f64) {
    products.map(|(a, b)| a * b).fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()))
}
