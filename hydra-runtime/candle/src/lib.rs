//! HydraLoRA layers for [candle](https://docs.rs/candle-core): [`HydraLinear`] is a frozen linear layer with an
//! adapter, whose forward and backward pass are Hydra's kernels.
//!
//! ```no_run
//! use candle_core::{DType, Device, Module, Tensor};
//! use hydra_candle::{FrozenWeight, HydraLinear};
//! use hydra_runtime::adapter::Adapter;
//! use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
//! use hydra_runtime::projection::Projection;
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let adapter = Adapter::open("run")?; // what `hydra finetune` wrote
//! let cpu = Arc::new(Cpu::new(CpuOptions::default())?);
//! let weight = FrozenWeight::try_from(Tensor::zeros((48, 64), DType::F32, &Device::Cpu)?)?;
//! let layer = HydraLinear::from_adapter(cpu, weight, &adapter, 0, Projection::Q)?;
//!
//! let x = Tensor::ones((2, 10, 64), DType::F32, &Device::Cpu)?;
//! let y = layer.forward(&x)?;
//! let gradients = y.sqr()?.sum_all()?.backward()?;
//! for parameter in layer.vars() {
//!     println!("{:?}", gradients.get(&parameter).map(Tensor::shape)); // pass `vars` to your optimiser
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The base weight is a candle tensor (f32, bf16 or f16) or a block-quantised one from a GGUF file; it is read where it
//! lies. x and y are f32 or bf16, on the CPU. The adapter's parameters are f32. Products run in the precision of the
//! [`Cpu`](hydra_runtime::backend::cpu::Cpu), on its threads, and give the same bits for any number of them.

mod linear;
mod operator;
mod weight;

pub use linear::HydraLinear;
pub use weight::FrozenWeight;

/// Any error of Hydra's as candle's.
fn wrap(error: impl std::fmt::Display + Send + Sync + 'static) -> candle_core::Error {
    candle_core::Error::wrap(error)
}
