//! `hydra chat`: a conversation in a terminal, or over a pipe, with the model and its adapters.

mod command;
mod input;
mod router;
mod session;

pub use command::{Command, HELP};
pub use input::{Input, Line};
pub use session::{Session, Settings};
