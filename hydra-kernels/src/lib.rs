//! HydraLoRA on the CPU: `no_std`, without allocation, on the caller's threads.
//!
//! A frozen linear layer with a HydraLoRA adapter computes, for row-major `x` [tokens, d_in],
//!
//! ```text
//! y = x Wᵀ + scale · Σ_e gate_e ∘ (x Aᵀ) B_eᵀ,      gate = softmax(x Rᵀ) for each token
//! ```
//!
//! and this is all it takes to call it:
//!
//! ```
//! use hydra_kernels::hydra::{AdapterRef, ForwardArgs, HydraLayer, forward, forward_scratch};
//! use hydra_kernels::{Gate, HydraShape, Isa, Routing, Weight, Workspace};
//!
//! // Two tokens, 4 → 3 features; one A of rank 1, two B, a router R.
//! let shape = HydraShape { d_in: 4, d_out: 3, rank: 1, lora_heads: 2, per_head_a: false, router: true };
//! let (w, x, stacked_a_r, b) = ([0.1; 3 * 4], [1.0; 2 * 4], [0.2; 3 * 4], [0.5; 3 * 2]);
//! let adapter = AdapterRef { shape, a: &stacked_a_r, b: &b, scale: 2.0, gate: Gate::Router(Routing::default()) };
//! let layer = HydraLayer { weight: Weight::from_f32(3, 4, &w)?, adapter: Some(adapter) };
//! let (mut y, mut adapter_state) = ([0.0; 2 * 3], [0.0; 2 * 3]);
//! let mut memory = vec![0.0; forward_scratch::<f32>(&shape, 2, false).0];
//! let (args, mut workspace) = (ForwardArgs::new(2, &x[..]), Workspace::new(&mut memory));
//! forward::<f32>(Isa::detect(), &layer, &args, &mut y[..], &mut adapter_state, &mut workspace)?;
//! # Ok::<(), hydra_kernels::Error>(())
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`hydra`] | the operator, forward and backward: on one thread, or in phases for any number of threads |
//! | [`mod@gemm`] | products from packed panels, in f32 and bf16 |
//! | [`mod@matvec`] | products for one token or a few, without packing |
//! | [`q8`] | products of activations in eight bits with block formats |
//! | [`quant`] | frozen weights in the format of their file, GGUF's blocks among them |
//! | [`gate`], [`softmax`](mod@softmax), [`dropout`](mod@dropout) | the operator's smaller parts |
//! | [`isa`] | instruction sets as values: detection, and the choice of one |
//! | [`workspace`] | memory from the caller, and how much an operation needs |
//! | [`reference`](mod@reference) | what each operation means, in plain f64 loops |
//!
//! Conventions: matrices are row-major; an instruction set ([`Isa`], or [`Bf16Isa`] for bf16 products) is a value that
//! is passed first; memory comes from the caller; a function that returns an error has written nothing.
#![no_std]

pub mod error;
pub mod gemm;
pub mod hydra;
pub mod isa;
pub mod math;
pub mod matvec;
pub mod q8;
pub mod quant;
pub mod random;
pub mod reference;
pub mod shape;
mod simd;
pub mod softmax;
pub mod workspace;

/// The README's example is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use error::Error;
pub use gemm::{
    Accumulate, Element, Float, K_ALIGN, MatRef, PANEL_ALIGN, Panels, Source, Term, Values, ValuesMut, gemm, pack,
    panels_len, to_bf16,
};
pub use hydra::dropout::{self, Dropout, dropout, dropout_accumulate, dropout_in_place, dropout_unscaled};
pub use hydra::gate::{self, Gate, Routing, activate, balance_loss_grad, mix, mix_backward};
pub use hydra::{AdapterRef, Dropouts};
pub use isa::{Bf16Isa, Isa, Q8Isa};
pub use matvec::{matvec, matvec_batch};
pub use quant::{Format, RowOrder, Weight};
pub use shape::HydraShape;
pub use workspace::{Scratch, Workspace};
