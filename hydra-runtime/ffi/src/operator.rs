//! The operator on the caller's memory and threads: `hydra_kernels::hydra`'s columns, for C.
//!
//! ggml calls a custom operator's function on each of its threads with `ith` and `nth`, without a barrier in between. So a
//! call here does all that thread `ith` has to do: it has its own columns of y, or of dx, and of the gradients, and it
//! computes the adapter's narrow products with x or dy for itself. Nothing is allocated but an error's text.

#[macro_use]
mod kinds;
mod backward;
mod forward;
mod layer;
mod memory;
mod thread;

pub use backward::{hydra_backward, hydra_backward_args, hydra_backward_scratch};
pub use forward::{hydra_forward, hydra_forward_args, hydra_forward_scratch};
pub use kinds::hydra_type;
pub use layer::hydra_layer;
pub use thread::hydra_thread;
