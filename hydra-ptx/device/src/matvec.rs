//! A few rows of x times a frozen matrix, read in its stored form: for generation, and for the logits of a few ids.
//!
//! A warp has one row of the matrix and up to four rows of x, a bf16 operand; a lane takes groups of eight columns.
//! Sums are f32. The adapter's second product goes over more columns of the same row, in f32; its first one is
//! [`crate::lora_matvec`].

use crate::format::Format;
use crate::kernels::dense::MatvecParams;
use crate::prelude::*;
use crate::rows::{Eight, Output, dot, load_chunk, load_eight};
use crate::sizes::{MATVEC_TOKENS, THREADS};

#[inline(always)]
unsafe fn matvec<F: Format>(p: MatvecParams) {
    let row = block_x() * (THREADS / WARP) + warp();
    if row >= p.rows {
        return;
    }
    let y = Output::new(p.y, p.addend, p.bf16);
    let first = block_y() * MATVEC_TOKENS;
    let stored = if p.ids.is_null() { row } else { load(p.ids.add(row as usize)) };
    let mut acc = [0.0; MATVEC_TOKENS as usize];
    let add = |acc: &mut [f32; MATVEC_TOKENS as usize],
               weights: Eight,
               (x, pitch): (*const u16, u32),
               columns: u32,
               group: u32| {
        for t in 0..MATVEC_TOKENS {
            if first + t < p.tokens {
                let values = unpack8(load_chunk(x, pitch, first + t, columns, 8 * group));
                acc[t as usize] = dot(values, weights, acc[t as usize]);
            }
        }
    };
    let mut group = lane();
    while 8 * group < p.columns {
        add(&mut acc, F::eight(p.w, p.scales, stored, group, p.pitch), (p.x, p.x_pitch), p.columns, group);
        group += WARP;
    }
    group = lane();
    while 8 * group < p.columns2 {
        let weights = load_eight(p.w2, row, 8 * group, p.columns2);
        add(&mut acc, weights, (p.x2, p.x2_pitch), p.columns2, group);
        group += WARP;
    }
    for t in 0..MATVEC_TOKENS {
        let sum = over_warp::<Sum>(acc[t as usize]);
        if first + t < p.tokens && lane() == 0 {
            y.put((first + t) as usize * p.y_pitch as usize + row as usize, sum);
        }
    }
}

/// A kernel for each format.
macro_rules! formats {
    ($($name:ident: $format:ident;)*) => {$(
        /// y = addend + x Wᵀ + x₂ W₂ᵀ for a few tokens. Grid: [rows / 8, tokens / 4], 256 threads.
        #[inline(always)]
        pub unsafe fn $name(p: MatvecParams) {
            matvec::<crate::format::$format>(p)
        }
    )*};
}

formats! {
    matvec_bf16: Bf16;
    matvec_q8_0: Q8_0;
    matvec_q4_0: Q4_0;
    matvec_q4_1: Q4_1;
}
