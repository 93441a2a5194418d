//! A few rows of x times a weight, straight from its stored form: generation, and the logits of a few ids.
//!
//! A warp has one row of the weight and up to four rows of x, a bf16 operand; a lane takes groups of eight columns. Sums are f32.

use crate::format::{Bf16, F32, Format, Q4_0, Q4_1, Q8_0};
use crate::prelude::*;
use crate::rows::{Output, load_chunk};
use crate::sizes::{FEW_TOKENS, THREADS};

#[inline(always)]
unsafe fn matvec<F: Format>(
    y: *mut u8,
    before: *const u8,
    bf16: u32,
    y_pitch: u32,
    tokens: u32,
    x: *const u16,
    columns: u32,
    w: *const u8,
    scales: *const u8,
    pitch: u32,
    rows: u32,
    ids: *const u32,
) {
    let row = block_x() * (THREADS / WARP) + warp();
    if row >= rows {
        return;
    }
    let first = block_y() * FEW_TOKENS;
    let stored = if ids.is_null() { row } else { load(ids.add(row as usize)) };
    let mut acc = [0.0; FEW_TOKENS as usize];
    let mut group = lane();
    while 8 * group < columns {
        let weights = F::eight(w, scales, stored, group, pitch, columns);
        for t in 0..FEW_TOKENS {
            if first + t < tokens {
                let values = unpack8(load_chunk(x, padded(columns), first + t, tokens, 8 * group));
                for i in 0..8 {
                    acc[t as usize] = fma(values[i], weights[i], acc[t as usize]);
                }
            }
        }
        group += WARP;
    }
    let y = Output::new(y, before, bf16);
    for t in 0..FEW_TOKENS {
        let sum = over_warp::<Sum>(acc[t as usize]);
        if first + t < tokens && lane() == 0 {
            y.put((first + t) as usize * y_pitch as usize + row as usize, sum);
        }
    }
}

/// One kernel for each format: a table, not code.
macro_rules! formats {
    ($($name:ident: $format:ty;)*) => {
        kernels! {$(
            /// y [tokens, rows] = before + x [tokens, padded columns] · Wᵀ; with `ids`, W's rows are those ids. Grid:
            /// [rows / 8, tokens / 4], 256 threads.
            fn $name(
                y: *mut u8,
                before: *const u8,
                bf16: u32,
                y_pitch: u32,
                tokens: u32,
                x: *const u16,
                columns: u32,
                w: *const u8,
                scales: *const u8,
                pitch: u32,
                rows: u32,
                ids: *const u32,
            ) {
                matvec::<$format>(y, before, bf16, y_pitch, tokens, x, columns, w, scales, pitch, rows, ids)
            }
        )*}
    };
}

formats! {
    matvec_f32: F32;
    matvec_bf16: Bf16;
    matvec_q8_0: Q8_0;
    matvec_q4_0: Q4_0;
    matvec_q4_1: Q4_1;
}
