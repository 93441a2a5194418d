//! `mixed` in the backward pass: an operand that blocks make from `adapter_state`, tile by tile, where they need it.

use crate::gate::Adapter;
use crate::prelude::*;
use crate::sizes::{NARROW, WIDE_THREADS, WIDE_TOKENS};
use crate::tile;
use crate::wide::NARROW_CHUNKS;

/// gate ∘ lora_down, not scaled, as the narrow operand of dB: 32 columns of it. A thread has a pair of columns in four
/// rows of a tile of tokens. What lies beyond the last token or column is any finite number: it is multiplied by zeros,
/// or its products are not stored.
pub struct MixedOperand {
    adapter: Adapter,
    /// The first token and the last.
    tokens: (u32, u32),
    /// This thread's columns.
    columns: [u32; 2],
    /// Their gate and their lora_down in `adapter_state`'s first row.
    from: [[*const f32; 2]; 2],
}

impl MixedOperand {
    /// Columns from `column` on, and tokens `tokens.0 .. tokens.1`.
    #[inline(always)]
    pub unsafe fn new(adapter: Adapter, adapter_state: *const f32, column: u32, tokens: (u32, u32)) -> Self {
        assume(adapter.rank > 0);
        let columns = [0, 1].map(|two| (column + thread() % (NARROW / 2) * 2 + two).min(adapter.mixed_width() - 1));
        let from = columns.map(|column| {
            let (gate, lora_down) = (adapter.a_rows + column / adapter.rank, adapter.lora_down_column(column));
            [gate, lora_down].map(|at| adapter_state.add(at as usize))
        });
        Self { adapter, tokens: (tokens.0, tokens.1 - 1), columns, from }
    }

    /// Row `i` of this thread's in a tile.
    #[inline(always)]
    fn row(i: usize) -> u32 {
        thread() / (NARROW / 2) + i as u32 * (WIDE_THREADS * 2 / NARROW)
    }

    /// The token in that row of tile number `tile`.
    #[inline(always)]
    fn token(&self, tile: u32, i: usize) -> u32 {
        (self.tokens.0 + tile * WIDE_TOKENS + Self::row(i)).min(self.tokens.1)
    }

    /// Loads a thread's gates and values of lora_down of a tile.
    #[inline(always)]
    pub unsafe fn load(&self, tile: u32) -> [[[f32; 2]; 2]; 4] {
        let mut loaded = [[[0.0; 2]; 2]; 4];
        for i in 0..4 {
            // Both have 32 bits, so that one instruction adds their product to an address.
            let skipped = u64::from(self.token(tile, i)) * u64::from(self.adapter.state_width() * 4);
            for two in 0..2 {
                loaded[i][two] = self.from[two].map(|column| load(column.wrapping_byte_add(skipped as usize)));
            }
        }
        loaded
    }

    /// Writes a thread's values of a tile to `to` [32, 32] in shared memory.
    #[inline(always)]
    pub unsafe fn put(&self, to: u32, tile: u32, loaded: [[[f32; 2]; 2]; 4]) {
        let pair = thread() % (NARROW / 2);
        for i in 0..4 {
            let mut values = loaded[i].map(|[gate, lora_down]| gate * lora_down);
            if self.adapter.head_dropout.threshold > 0 {
                for two in 0..2 {
                    let (column, t) = (self.columns[two], self.token(tile, i));
                    values[two] = self.adapter.head_dropout.apply(values[two], t, column);
                }
            }
            let at = tile::at::<NARROW_CHUNKS>(to, Self::row(i), pair / 4) + pair % 4 * 4;
            st_u32(at, pack_bf16(values[0], values[1]));
        }
    }
}
