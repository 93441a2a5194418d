//! Hydra for C, C++ and every language that can call C: `include/hydra.h` declares what is here.
//!
//! | file | functions |
//! |---|---|
//! | `version.rs` | versions |
//! | `error.rs` | status codes, `hydra_last_error`, and the door through which every call goes: no panic passes it |
//! | `handle.rs` | models, adapters, generators and trainers as numbers that are checked at every use |
//! | `arguments.rs` | C's pointers and lengths as Rust's slices and texts |
//! | `model.rs` | `hydra_model_*`, `hydra_tokenize`, `hydra_detokenize` |
//! | `adapter.rs` | `hydra_adapter_*` |
//! | `generate.rs` | `hydra_generator_*`, `hydra_generate`, `hydra_chat` |
//! | `train.rs` | `hydra_trainer_*`, `hydra_evaluate` |
//! | `operator/` | `hydra_forward`, `hydra_backward`: the operator on the caller's memory and threads |
//!
//! Rules that all functions share, and that their documentation doesn't repeat:
//!
//! - A pointer argument is null or points to as many values as its length says, for the time of the call. Null is allowed
//!   where the documentation says so, and with length 0; elsewhere it is an error.
//! - A function that returns an error has changed nothing that it was to write.
//! - An error's text stays in the thread: `hydra_last_error`.
#![allow(non_camel_case_types, reason = "types have their names in C")]
#![allow(clippy::missing_safety_doc, reason = "what pointers have to be is said above, once")]

mod adapter;
mod arguments;
mod error;
mod generate;
mod handle;
mod model;
mod operator;
mod train;
mod version;

pub use adapter::*;
pub use error::{hydra_last_error, hydra_status};
pub use generate::*;
pub use model::*;
pub use operator::*;
pub use train::*;
pub use version::*;
