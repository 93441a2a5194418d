//! A fine-tuning run: its options, what it starts from, the training loop, and what is kept in its folder.

pub mod choices;
pub mod config;
pub mod folder;
pub mod log;
pub mod manifest;
pub mod prepare;
pub mod schedule;
pub mod spec;
pub mod start;
pub mod train;
