//! Vectors behind proof tokens: what micro-kernels, softmax, quant and matvec share.
//!
//! A value that holds an ISA token (see [`crate::isa`]) proves that its instructions exist. Everything here is inlined
//! into a function that enables them, by [`crate::isa::Isa::vectorize`] or by `#[target_feature]`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
pub(crate) mod bytes;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
pub(crate) mod lanes;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod neon;
pub(crate) mod reduce;
#[cfg(target_arch = "x86_64")]
pub(crate) mod round;
#[cfg(target_arch = "x86_64")]
pub(crate) mod transpose;
