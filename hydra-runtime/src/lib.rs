//! A small LLaMA runtime that back-propagates into a HydraLoRA adapter alone.
//!
//! Data flows one way: [`checkpoint`] → [`model`] (frozen weights) + [`adapter`] → a forward pass fills [`activations`] → the
//! backward pass reads them and fills gradients → AdamW edits the adapter → adapter file. Devices are behind
//! [`backend::Backend`]. `examples/embed.rs` shows the whole way.

pub mod activations;
mod adapted;
pub mod adapter;
pub mod atomic;
pub mod backend;
pub mod batch;
pub mod checkpoint;
pub mod config;
mod error;
pub mod evaluate;
pub mod generate;
mod json;
pub mod merge;
pub mod model;
pub mod projection;
pub mod tokenizer;
pub mod train;

pub use error::{Error, Result};
