//! The runtime's files: checkpoints in both containers, tokenizers, adapters, and what is said about bad ones.

#[path = "files/adapter.rs"]
mod adapter;
#[path = "files/adapter_of_others.rs"]
mod adapter_of_others;
#[path = "files/architectures.rs"]
mod architectures;
#[path = "files/builder.rs"]
mod builder;
#[path = "files/chat.rs"]
mod chat;
#[path = "files/checkpoint.rs"]
mod checkpoint;
#[path = "files/gguf_out.rs"]
mod gguf_out;
#[path = "files/hostile.rs"]
mod hostile;
#[path = "files/merge.rs"]
mod merge;
#[path = "files/peft.rs"]
mod peft;
#[path = "files/real.rs"]
mod real;
#[path = "files/tokenizer.rs"]
mod tokenizer;
#[path = "files/tokenizer_limits.rs"]
mod tokenizer_limits;
