//! The adapter's first product and its gate for a few tokens; [`crate::lora_down`] has those for many. A block computes
//! one token and reads the adapter's f32 parameters directly: converting them first would take longer than the product.

use crate::gate::{Adapter, mix};
use crate::kernels::adapter::LoraDownMatvecParams;
use crate::mask::Mask;
use crate::prelude::*;
use crate::rows::{dot, load_chunk, load_eight};
use crate::sizes::{LORA_MATVEC_ROWS, THREADS};

impl LoraDownMatvecParams {
    #[inline(always)]
    fn adapter(&self) -> Adapter {
        let &Self { a_rows, lora_heads, rank, per_head_a, gate, labels, inverse_temperature, top_k, .. } = self;
        let head_dropout = Mask::NONE;
        Adapter { a_rows, lora_heads, rank, per_head_a, gate, labels, inverse_temperature, top_k, head_dropout }
    }
}

/// [`crate::lora_down::lora_down`] without dropout for a few tokens. Grid: [tokens], 256 threads.
#[inline(always)]
pub unsafe fn lora_down_matvec(p: LoraDownMatvecParams) {
    let (adapter, rows) = (p.adapter(), p.stacked_rows);
    let (token, warps) = (block_x(), THREADS / WARP);
    // Shared memory holds a partial sum of each row and warp.
    let partial = |row: u32, warp: u32| shared() + (row * warps + warp) * 4;
    let mut first = 0;
    while first < rows {
        let mut acc = [0.0; LORA_MATVEC_ROWS as usize];
        let mut group = thread();
        while 8 * group < p.d_in {
            let values = unpack8(load_chunk(p.x, p.x_pitch, token, p.d_in, 8 * group));
            for i in 0..LORA_MATVEC_ROWS {
                // Beyond the last row the last one is loaded again, so that the load has no branch.
                let weights = load_eight(p.a, (first + i).min(rows - 1), 8 * group, p.d_in);
                acc[i as usize] = dot(values, weights, acc[i as usize]);
            }
            group += THREADS;
        }
        for i in 0..LORA_MATVEC_ROWS {
            let sum = over_warp::<Sum>(acc[i as usize]);
            if first + i < rows && lane() == 0 {
                st_f32(partial(first + i, warp()), sum);
            }
        }
        first += LORA_MATVEC_ROWS;
    }
    barrier();
    let mut row = thread();
    while row < rows {
        let mut sum = 0.0;
        for warp in 0..warps {
            sum += ld_f32(partial(row, warp));
        }
        store(p.adapter_state.add((token * adapter.state_width() + row) as usize), sum);
        row += THREADS;
    }
    barrier();
    let row = p.adapter_state.add(token as usize * adapter.state_width() as usize);
    mix(adapter, |_| row, (p.mixed, p.mixed_pitch), p.scale, token, 1);
}
