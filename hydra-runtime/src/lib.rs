//! A small LLaMA runtime that back-propagates into a HydraLoRA adapter alone.

pub mod adapter;
pub mod atomic;
pub mod checkpoint;
pub mod config;
mod error;
mod json;
pub mod projection;
pub mod tokenizer;

pub use error::{Error, Result};
