//! One NVIDIA GPU: `hydra_ptx`'s kernels in one stream.
//!
//! Products take bf16 operands and sum in f32. Activations are bf16, so that they serve as operands directly; residual
//! streams, their gradients, statistics and everything that is trained are f32. Frozen weights stay bf16 or in their
//! own 4- and 8-bit blocks; where many tokens are multiplied, blocks are decoded to bf16 a matrix at a time. Only
//! downloads wait for the device: a training step downloads its loss, the gradient's norm and the adapter's, and
//! otherwise only queues work. Sums have a fixed order, so a step has the same bits each time.
//!
//! What linear layers read, and bf16 weights, have room behind their rows where cuBLASLt is used ([`Driver::room`]):
//! the adapter's operands are written there, and the library computes `[x | mixed] · [W | B]ᵀ` as one product.
//!
//! [`Cuda`] decides which launches make an operation; a [`Driver`] starts them.

mod attention;
mod buffer;
mod driver;
mod gpu;
mod launcher;
mod linear;
mod linear_backward;
mod loss;
mod matrix;
mod operations;
mod plan;
mod state;

pub use buffer::{Activations, Buffer};
pub use driver::Driver;
pub use gpu::Gpu;
pub use launcher::Cuda;
pub use matrix::Matrix;

#[cfg(test)]
mod tests;
