//! The arguments of the micro-kernel's `asm!` blocks, and the tile configuration.

use super::sizes::{K_STEP, TILE};
use crate::gemm::view::Accumulate;
use core::ptr::{null, null_mut};
use half::bf16;

/// The operand of LDTILECFG for palette 1: the rows and the bytes of a row of each of the eight tiles.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// For `rows` × `cols` sums, at most 32 each: tiles 0 to 3 are the sums (upper left, upper right, lower left, lower
    /// right), 4 and 5 the upper and lower rows of A, and 6 and 7 the left and right columns of B.
    fn new(rows: usize, cols: usize) -> Self {
        let upper = [rows.min(TILE), rows.saturating_sub(TILE)];
        let left = [cols.min(TILE), cols.saturating_sub(TILE)];
        let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut set = |tile: usize, rows: usize, bytes: usize| {
            // An unused tile keeps zeros for both.
            if rows > 0 && bytes > 0 {
                config.rows[tile] = rows as u8;
                config.row_bytes[tile] = bytes as u16;
            }
        };
        for i in 0..2 {
            set(2 * i, upper[i], 4 * left[0]);
            set(2 * i + 1, upper[i], 4 * left[1]);
            set(4 + i, upper[i], 2 * K_STEP);
            set(6 + i, K_STEP / 2, 4 * left[i]);
        }
        config
    }
}

/// The arguments of the `asm!` blocks, which step through them.
#[repr(C)]
pub(super) struct Args {
    pub config: TileConfig,
    /// The first panel's sums.
    pub c: *mut f32,
    /// Between two rows of sums.
    pub c_row_bytes: usize,
    /// From a panel's sums to the next one's, and from there to those of the panel after it, in turn.
    pub c_panel_bytes: [isize; 2],
    pub panels: usize,
    /// Whether sums start from C.
    pub accumulate: usize,
    /// The tiles of A for each block of k: the upper rows' and the lower rows'.
    pub a: [[*const bf16; 2]; 2],
    /// Between two rows of a tile of A.
    pub a_row_bytes: [usize; 2],
    /// Between two tiles of A along k.
    pub a_step_bytes: [usize; 2],
    /// The next micro-panel's rows, to be prefetched two at each panel. Never read.
    pub ahead: *const u8,
    pub ahead_row_bytes: usize,
    /// The first panel of B for each block of k.
    pub b: [*const bf16; 2],
    /// Steps of 32 along k in each block; the second may be 0.
    pub steps: [usize; 2],
    /// Between two panels of B.
    pub b_panel_bytes: [usize; 2],
    /// Where the pending sums go as bf16: at first one panel before the first.
    pub rounded: *mut bf16,
    /// Between two rows of the rounded sums; 0 if sums are not rounded.
    pub rounded_row_bytes: usize,
    /// Rows to be rounded.
    pub rows: usize,
    /// The sums of the last panel, which are to be rounded, and their end. Both null at first.
    pub pending: *const f32,
    pub pending_end: *const f32,
}

impl Args {
    /// Arguments for `rows` rows of A and `panels` panels of `width` columns, each at most 32, without operands: sums
    /// are not rounded, and both blocks of k have no steps. `tiles` is any address.
    pub(super) fn new(rows: usize, width: usize, panels: usize, accumulate: Accumulate, tiles: *const bf16) -> Self {
        Args {
            config: TileConfig::new(rows, width),
            c: null_mut(),
            c_row_bytes: 0,
            c_panel_bytes: [0; 2],
            panels,
            accumulate: usize::from(accumulate == Accumulate::Add),
            a: [[tiles; 2]; 2],
            a_row_bytes: [0; 2],
            a_step_bytes: [0; 2],
            ahead: tiles.cast(),
            ahead_row_bytes: 0,
            b: [tiles; 2],
            steps: [0; 2],
            b_panel_bytes: [0; 2],
            rounded: null_mut(),
            rounded_row_bytes: 0,
            rows,
            pending: null(),
            pending_end: null(),
        }
    }
}
