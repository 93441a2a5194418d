//! Vectors behind proof tokens: what micro-kernels, softmax, quant and matvec share.
//!
//! A value that holds an ISA token (see [`crate::isa`]) proves that its instructions exist. Everything here is inlined
//! into a function that enables them, by [`crate::isa::Isa::vectorize`] or by `#[target_feature]`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod bytes;
#[cfg(target_arch = "x86_64")]
pub(crate) mod lanes;
pub(crate) mod reduce;
#[cfg(target_arch = "x86_64")]
pub(crate) mod round;
#[cfg(target_arch = "x86_64")]
pub(crate) mod transpose;
