//! A small LLaMA runtime that back-propagates into a HydraLoRA adapter alone.
//!
//! Data flows one way: [`checkpoint`] → [`model`] (frozen weights) + [`adapter`] → a forward pass fills activations → the
//! backward pass reads them and fills gradients → AdamW edits the adapter → adapter file. Devices are behind
//! [`backend::Backend`]. `examples/embed.rs` shows the whole way:
//!
//! | to | take |
//! |---|---|
//! | open a Hugging Face folder or a GGUF file | [`checkpoint::Checkpoint`], [`model::Model`] |
//! | turn text to ids and back | [`checkpoint::Checkpoint::tokenizer`] |
//! | get logits, or losses | [`evaluate::Evaluator`] |
//! | write text | [`generate::Generator`], [`generate::Sampler`] |
//! | make an adapter, save, load it | [`adapter::Adapter`] |
//! | train it | [`train::Trainer`]: whole steps of AdamW, or gradients for an optimiser of one's own |
//! | fold it into the weights | [`merge::write`] |
//! | choose threads, precision and instruction set | [`backend::cpu::CpuOptions`] |
//!
//! ```no_run
//! use hydra_runtime::adapter::{Adapter, AdapterConfig};
//! use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Isa};
//! use hydra_runtime::batch::Sequence;
//! use hydra_runtime::{checkpoint::Checkpoint, evaluate::Evaluator, model::Model};
//!
//! # fn main() -> hydra_runtime::Result<()> {
//! let checkpoint = Checkpoint::open("model.gguf")?;
//! let tokenizer = checkpoint.tokenizer()?;
//! // Two threads, and nothing wider than AVX2.
//! let cpu = CpuOptions { threads: Some(2), isa: Isa::by_name("avx2"), ..CpuOptions::default() };
//! let model = Model::load(Cpu::new(cpu)?, &checkpoint)?;
//! let adapter = Adapter::init(model.config(), AdapterConfig::default(), 0)?;
//! let example = Sequence::answer(&tokenizer.encode("one two ")?, &tokenizer.encode("three")?);
//! let loss = Evaluator::new(&model, Some(&adapter), 64)?.losses(&[example])?[0];
//! println!("{} nats", loss.nll / loss.targets as f64);
//! # Ok(())
//! # }
//! ```
//!
//! A token id is a `u32`; matrices are row-major f32. All that fails fails with [`Error`]; a panic that isn't documented is a
//! mistake of this crate.

pub mod adapter;
#[doc(hidden)] // the harness writes its own files in the same way
pub mod atomic;
pub mod backend;
pub mod batch;
pub mod chat;
pub mod checkpoint;
pub mod config;
mod error;
pub mod evaluate;
mod files;
pub mod generate;
mod json;
pub mod merge;
pub mod model;
mod progress;
pub mod projection;
pub mod tokenizer;
pub mod train;

#[doc(hidden)] // for programs that print what files say, as errors here do
pub use error::printable;
pub use error::{Error, Result};
/// The kernels, whose instruction sets, formats and errors are part of this interface.
pub use hydra_kernels;
