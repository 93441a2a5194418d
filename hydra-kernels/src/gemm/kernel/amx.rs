//! 32 × 32 micro-kernel for AMX, with loops of its own.
//!
//! TDPBF16PS multiplies a tile of A (16 rows, 32 values along k) by a tile of B (16 pairs along k, 16 columns). Of the
//! eight tile registers four are sums, two hold A and two hold B, so that each loaded tile is used twice. The tile
//! configuration says how many rows and columns a tile has, so C's edges need no masks.
//!
//! A micro-panel of A is read in place, or rounded and copied once, and passes over all panels of a group of B in one
//! `asm!` block (`tiles`), because the compiler keeps nothing in tile registers between blocks. Two terms, a frozen
//! product and its adapter's, are summed in the same registers where their micro-panels fit together.
//!
//! **Cache.** The micro-panel of A stays in L1 while B's panels come from L2. TILELOADDT1 marks B's tiles as not read
//! again soon; with TILELOADD each panel of B evicted A, and a product took a quarter longer. Accesses to memory
//! further away are spread over the time of a micro-panel: at each panel of B, two rows of the next micro-panel of A
//! are prefetched; and a panel's sums are rounded and stored two rows at a time between the steps of the next panel or,
//! where they stay f32, their destination is prefetched. Together this saves another third where A and C come from
//! memory.

mod a_panel;
mod args;
mod driver;
mod pack_a;
mod sizes;
mod tiles;

pub(in crate::gemm) use driver::{multiply, multiply_into_bf16};
pub(in crate::gemm) use sizes::PANEL_SHAPE;
