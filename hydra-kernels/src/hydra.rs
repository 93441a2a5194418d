//! The operator: a frozen linear layer with a HydraLoRA adapter, forward and backward.
//!
//! With x [tokens, d_in], W [d_out, d_in], the stacked \[A; R\] [a_rows + N, d_in], B [d_out, N·r], the scale s = alpha
//! / r, and D and H the dropout masks on A's input and on the mixed heads:
//!
//! ```text
//! lora_down = D(x) Aᵀ       gate = softmax(x Rᵀ)       mixed = H(gate ∘ lora_down)
//! y = residual + x Wᵀ + s · mixed Bᵀ
//!
//! dmixed = H(s · dy B)                               dB += s · dyᵀ mixed
//! [d_lora_down | dlogits] from dmixed                dA += d_lora_downᵀ D(x)          dR += dlogitsᵀ x
//!                                                    dx = or += dy W + D(d_lora_down A) + dlogits R
//! ```
//!
//! LoRA, LoRA-Split and HydraLoRA are settings of [`HydraShape`](crate::HydraShape) and [`Gate`]; without an adapter
//! the operator is the product with W. The products run in `E`: f32, or bf16 operands with sums in f32. x, dy, y and dx
//! may be f32 or bf16. Between the passes only `adapter_state` = \[lora_down | gate\] is kept, [tokens, a_rows + N], or
//! nothing ([`recompute`]).
//!
//! # On one thread
//!
//! Call [`forward`] and [`backward`]:
//!
//! ```
//! use hydra_kernels::hydra::{backward, backward_scratch, forward, forward_scratch};
//! use hydra_kernels::hydra::{AdapterGradients, AdapterRef, BackwardArgs, ForwardArgs, Gradients, HydraLayer};
//! use hydra_kernels::{Accumulate, Gate, HydraShape, Isa, Routing, Weight, Workspace};
//!
//! // Two tokens, 4 → 3 columns; one A of rank 1, two B, a router. The memory is known at compile time.
//! const SHAPE: HydraShape =
//!     HydraShape { d_in: 4, d_out: 3, rank: 1, lora_heads: 2, per_head_a: false, router: true };
//! const SCRATCH: usize = forward_scratch::<f32>(&SHAPE, 2, false).or(backward_scratch::<f32>(&SHAPE, 2, false)).0;
//! let (isa, mut memory) = (Isa::detect(), [0.0; SCRATCH]);
//! let mut workspace = Workspace::new(&mut memory);
//!
//! let gate = Gate::Router(Routing::default());
//! let (a, b) = ([0.2; 3 * 4], [0.5; 3 * 2]); // [A; R] has 1 + 2 rows, B a column for each head
//! let adapter = AdapterRef { shape: SHAPE, a: &a, b: &b, scale: 2.0, gate };
//! let layer = HydraLayer { weight: Weight::from_f32(3, 4, &[0.1; 12])?, adapter: Some(adapter) };
//!
//! let (x, mut y, mut adapter_state) = ([1.0; 2 * 4], [0.0; 2 * 3], [0.0; 2 * 3]);
//! let args = ForwardArgs::new(2, &x[..]);
//! forward::<f32>(isa, &layer, &args, &mut y[..], &mut adapter_state, &mut workspace)?;
//! assert!((y[0] - (0.4 + 2.0 * 0.8 * 0.5)).abs() < 1e-6);
//!
//! let (dy, mut dx, mut da, mut db) = ([1.0; 2 * 3], [0.0; 2 * 4], [0.0; 3 * 4], [0.0; 3 * 2]);
//! let gradients = Gradients {
//!     dx: Some(((&mut dx[..]).into(), Accumulate::Overwrite)),
//!     adapter: Some(AdapterGradients { da: &mut da, db: &mut db }),
//! };
//! let args = BackwardArgs::new(2, &dy[..], &x[..]);
//! backward::<f32>(isa, &layer, &args, Some(&adapter_state), gradients, &mut workspace)?;
//! assert!((db[0] - 2.0 * 2.0 * 0.5 * 0.8).abs() < 1e-6);
//! # Ok::<(), hydra_kernels::Error>(())
//! ```
//!
//! # On many threads
//!
//! [`Forward`], [`Backward`] and, for a handful of tokens, [`Few`] hold checked arguments and have a method for each
//! phase. A phase takes a range of rows or of columns and the caller's memory for it. It starts no thread and keeps
//! nothing, so that ranges may be taken in any order and at the same time: the bits of the results don't depend on it.
//! The documentation of these types lists the phases in order.
//!
//! Where threads can't wait for each other inside the operation, each calls [`forward_columns`] and
//! [`backward_columns`] for the [`ThreadColumns`] that are its own.

mod backward;
mod columns;
pub mod dropout;
mod few;
mod forward;
pub mod gate;
mod gradients;
mod layer;
mod operand;
mod product;
mod single;

pub use backward::{Backward, dropped_dx_rows_scratch, dx_rows_scratch};
pub use columns::{
    ColumnGradients, ThreadColumns, backward_columns, backward_columns_scratch, forward_columns,
    forward_columns_scratch,
};
pub use few::{
    FEW_TOKENS, Few, batch_scratch as few_batch_scratch, output_scratch as few_output_scratch, serves as few_serves,
};
pub use forward::{Forward, adapter_rows_scratch, output_rows_scratch};
pub use gate::Gate;
pub use gradients::{GRADIENT_COLUMNS, db_columns_scratch, stacked_columns_scratch};
pub use layer::{AdapterRef, BackwardArgs, Dropouts, ForwardArgs, HydraLayer, StackedPart};
pub use operand::{MAX_ROW_STEPS, MIN_BLOCK, Operand, PANEL_VALUES, column_block, row_step};
pub use product::{Block, PackedBlock};
pub use single::{
    AdapterGradients, Gradients, backward, backward_scratch, forward, forward_scratch, recompute, recompute_scratch,
};
