//! LLaMA runtime with an adapter.
