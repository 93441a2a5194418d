//! HydraLoRA's arithmetic on the CPU: `no_std`, no allocation, single-threaded and pure.
//!
//! A frozen linear layer with a HydraLoRA adapter computes, for row-major `x` [tokens, d_in],
//!
//! ```text
//! y = x Wᵀ + scale · Σ_e gate_e ∘ (x Aᵀ) B_eᵀ,      gate = softmax(x Rᵀ) per token
//! ```
//!
//! [`hydra`] is that operator, forward and backward. It is composed of pieces that a threaded engine may compose
//! differently: [`mod@gemm`] (packed panels, tiles, frozen weights in their own format through [`quant`]), [`gate`],
//! [`softmax`](mod@softmax) and [`dropout`](mod@dropout). [`reference`](mod@reference) says in plain f64 what each of
//! them means.
//!
//! Conventions: matrices are row-major f32; an instruction set is a value ([`Isa`]) passed first; memory comes
//! from the caller ([`workspace`]); a function that returns an error has written nothing.
#![no_std]

pub mod error;
pub mod gemm;
pub mod hydra;
pub mod isa;
pub mod math;
pub mod matvec;
pub mod quant;
pub mod random;
pub mod reference;
pub mod shape;
mod simd;
pub mod softmax;
pub mod workspace;

pub use error::Error;
pub use gemm::{
    Accumulate, Element, Float, MatRef, PANEL_ALIGN, Panels, Source, Term, Values, ValuesMut, gemm, pack, panels_len,
    to_bf16,
};
pub use hydra::dropout::{self, Dropout, dropout, dropout_accumulate, dropout_in_place, dropout_unscaled};
pub use hydra::gate::{self, Gate, Routing, activate, balance_loss_grad, mix, mix_backward};
pub use hydra::{AdapterRef, Dropouts};
pub use isa::{Bf16Isa, Isa};
pub use matvec::matvec;
pub use quant::{Format, RowOrder, Weight};
pub use shape::HydraShape;
pub use workspace::{Scratch, Workspace};
