//! Bindings to the CUDA driver API whose functions are found at run time. See the README for their origin.

#![allow(warnings, clippy::all, rustdoc::all)]

#[rustfmt::skip] // as bindgen wrote it
mod cuda;
pub mod driver;

pub use cuda::*;
pub use driver::cuGetErrorString;
