//! Frozen weights in the format of their file: f32, f16, bf16, and GGUF's block formats.
//!
//! Each block format decodes in groups of [`GROUP`] = 32 columns, `w = d·q − m` with a scale `d` and a minimum `m` for
//! each group (or half a group), so [`Weight::decode_row`] may start at any multiple of 32. (In IQ4_NL and IQ4_XS, q is the
//! number that a code stands for.) Decoding is exact: each element is the f32 that ggml's dequantization gives, except for
//! the sign of a zero.

pub(crate) mod codes;
mod format;
pub(crate) mod scalar;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
pub(crate) mod simd;
mod weight;

pub(crate) use format::by_block_format;
pub use format::{Format, GROUP, RowOrder};
pub use weight::Weight;
