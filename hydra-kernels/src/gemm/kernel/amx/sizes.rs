//! Sizes of AMX's tiles, panels and blocks.

use crate::gemm::blocking::{KBlocking, PanelShape};

/// Rows of a micro-panel of A: two tiles.
pub(super) const MR: usize = 32;

/// Columns of a panel of B: two tiles.
pub(super) const NR: usize = 32;

/// Values along k in a tile of A or B.
pub(super) const K_STEP: usize = 32;

/// Rows of a tile, and columns of a tile of sums.
pub(super) const TILE: usize = 16;

/// Elements of a tile of A.
pub(super) const A_TILE: usize = TILE * K_STEP;

/// A micro-panel of A (36 KiB) then stays in L1 while panels of B pass, and sums are loaded and stored once in 18
/// steps. 384 and 768 were measured slower.
const KC: usize = 576;

/// The most rows of a second term that joins the last block of the first.
const JOINED: usize = 128;

/// The most values of a row in a micro-panel of A.
pub(super) const K_MAX: usize = KC + JOINED;

/// How k is cut.
pub(super) const BLOCKING: KBlocking = KBlocking { k_step: K_STEP, kc: KC, joined: JOINED };

/// The shape of B's panels.
pub(in crate::gemm) const PANEL_SHAPE: PanelShape = PanelShape { nr: NR, k_step: K_STEP };
