//! The part of dx that goes through the dropout of x.

use crate::kernels::adapter::DroppedDxParams;
use crate::mask::Mask;
use crate::prelude::*;
use crate::rows::Output;
use crate::sizes::{DROPPED_TOKENS, THREADS};

/// dx [tokens, d_in] += D(d lora_down · A): the part of dx that went through dropout. Grid: [tokens / 8, d_in / 256],
/// 256 threads.
#[inline(always)]
pub unsafe fn dropped_dx(p: DroppedDxParams) {
    let mask = Mask { seed: p.seed, threshold: p.threshold, scale: p.keep_scale };
    let dx = Output::new(p.dx, p.dx, p.bf16);
    let (column, first) = (block_y() * THREADS + thread(), block_x() * DROPPED_TOKENS);
    if column >= p.d_in {
        return;
    }
    let mut acc = [0.0; DROPPED_TOKENS as usize];
    let mut j = 0;
    while j < p.a_rows {
        let weight = load(p.a.add(j as usize * p.d_in as usize + column as usize));
        for t in 0..DROPPED_TOKENS {
            if first + t < p.tokens {
                let at = (first + t) as usize * p.state_width as usize + j as usize;
                acc[t as usize] = fma(load(p.d_adapter_state.add(at)), weight, acc[t as usize]);
            }
        }
        j += 1;
    }
    for t in 0..DROPPED_TOKENS {
        if first + t < p.tokens {
            let at = (first + t) as usize * p.pitch as usize + column as usize;
            dx.put(at, mask.apply(acc[t as usize], first + t, column));
        }
    }
}
