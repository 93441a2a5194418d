//! Micro-kernels, one file for each instruction set. They know views and blocking, and nothing above them.
//!
//! All `unsafe` code of [`crate::gemm`] is here: micro-kernels, and the AVX-512 code that packs A and B for them.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512bf16;
pub(super) mod micro;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
pub(super) mod neon;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
pub(super) mod neonbf16;
#[cfg(target_arch = "x86_64")]
pub(super) mod pack512;
pub(super) mod portable;
#[cfg(target_arch = "x86_64")]
mod tile512;
