//! A runtime for LLaMA, Mistral and Qwen models that trains HydraLoRA and LoRA adapters, and generates with them.
//!
//! ```no_run
//! use hydra_runtime::{adapter::Adapter, batch::Sequence, model::Model, train::Trainer};
//!
//! # fn main() -> hydra_runtime::Result<()> {
//! let model = Model::open("model.gguf")?; // or a Hugging Face folder
//! let tokenizer = model.tokenizer()?;
//! let example = Sequence::answer(&tokenizer.encode_prompt("Nine heads?\n")?, &tokenizer.encode("A hydra.")?);
//! let adapter = Adapter::init(model.config(), Default::default(), 0)?;
//! let mut trainer = Trainer::new(&model, &adapter, Default::default())?;
//! println!("loss {}", trainer.step(&[example], 2e-3)?.loss);
//! let adapter = model.attach(&trainer.adapter()?)?;
//! print!("{}", model.generate("Nine heads?\n").adapter(&adapter).max_tokens(64).text()?);
//! # Ok(())
//! # }
//! ```
//!
//! | to | call |
//! |---|---|
//! | open a model | [`model::Model::open`]; from memory, or on a device of your choice: [`model::Model::load`] |
//! | choose device, threads and precision | [`backend::Device`], [`backend::cpu::CpuOptions`] |
//! | generate | [`model::Model::generate`], [`model::Model::chat`]; step by step: [`generate::Generator`] |
//! | generate for many requests at once | [`serve::Engine`] |
//! | make, save and load an adapter | [`adapter::Adapter`]; [`model::Model::attach`] puts it on the device |
//! | train it | [`train::Trainer`]; in several processes: [`communicator::Communicator`] |
//! | get losses and logits | [`evaluate::Evaluator`] |
//! | put instructions and chats into a model's form | [`chat`] |
//! | merge an adapter into its model | [`merge::write`], [`merge::write_gguf`] |
//! | write a LoRA for llama.cpp | [`adapter::Adapter::as_lora`], [`adapter::Adapter::save_gguf`] |
//!
//! Data flows one way: checkpoint → model + adapter → forward → backward → AdamW → adapter file. Models and attached
//! adapters are handles whose clones share their memory; trainers, evaluators and generators own what they need. A token
//! id is a `u32`; matrices are row-major. Everything that can fail returns [`Error`].
//!
//! The kernels are slow in debug builds. Add `[profile.dev.package.hydra-kernels] opt-level = 3` to your workspace's
//! Cargo.toml, or they take minutes for what takes seconds.

pub mod adapter;
#[doc(hidden)] // the harness writes its own files in the same way
pub mod atomic;
pub mod backend;
pub mod batch;
pub mod chat;
pub mod checkpoint;
pub mod communicator;
pub mod config;
#[doc(hidden)] // for the harness's readers of strangers' files
pub mod door;
mod error;
pub mod evaluate;
mod files;
pub mod generate;
mod json;
pub mod merge;
pub mod model;
mod progress;
pub mod projection;
pub mod serve;
pub mod tokenizer;
pub mod train;

#[doc(hidden)] // for programs that print what files say, as errors here do
pub use error::printable;
pub use error::{Error, Result};
/// The kernels, whose instruction sets, formats and errors are part of this interface.
pub use hydra_kernels;

/// The README's example is compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
