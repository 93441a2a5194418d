//! A few rows of x times a weight, straight from its stored form: generation, and the logits of a few ids.
//!
//! A warp has one row of the weight and up to four rows of x, a bf16 operand; a lane takes groups of eight columns. Sums are f32.
//! The adapter's second product is a few more columns of the weight's row, in f32 (its first one: [`crate::few`]).

use crate::format::Format;
use crate::prelude::*;
use crate::rows::{Eight, Output, dot, load_chunk, load_eight};
use crate::sizes::{FEW_TOKENS, THREADS};

/// This warp's row of a second matrix, [rows, columns] in f32, times operands.
#[derive(Clone, Copy)]
struct Second {
    x: *const u16,
    columns: u32,
    w: *const f32,
}

#[inline(always)]
unsafe fn matvec<F: Format>(
    y: Output,
    y_pitch: u32,
    tokens: u32,
    x: *const u16,
    columns: u32,
    w: *const u8,
    scales: *const u8,
    pitch: u32,
    rows: u32,
    ids: *const u32,
    second: Second,
) {
    let row = block_x() * (THREADS / WARP) + warp();
    if row >= rows {
        return;
    }
    let first = block_y() * FEW_TOKENS;
    let stored = if ids.is_null() { row } else { load(ids.add(row as usize)) };
    let mut acc = [0.0; FEW_TOKENS as usize];
    let add = |acc: &mut [f32; FEW_TOKENS as usize], weights: Eight, x: *const u16, columns: u32, group: u32| {
        for t in 0..FEW_TOKENS {
            if first + t < tokens {
                let values = unpack8(load_chunk(x, padded(columns), first + t, tokens, 8 * group));
                acc[t as usize] = dot(values, weights, acc[t as usize]);
            }
        }
    };
    let mut group = lane();
    while 8 * group < columns {
        add(&mut acc, F::eight(w, scales, stored, group, pitch), x, columns, group);
        group += WARP;
    }
    group = lane();
    while 8 * group < second.columns {
        let weights = load_eight(second.w, row, 8 * group, second.columns);
        add(&mut acc, weights, second.x, second.columns, group);
        group += WARP;
    }
    for t in 0..FEW_TOKENS {
        let sum = over_warp::<Sum>(acc[t as usize]);
        if first + t < tokens && lane() == 0 {
            y.put((first + t) as usize * y_pitch as usize + row as usize, sum);
        }
    }
}

/// One kernel for each format: a table, not code.
macro_rules! formats {
    ($($name:ident: $format:ident;)*) => {
        kernels! {$(
            /// y [tokens, rows] = before + x [tokens, padded columns] · Wᵀ + x₂ [tokens, padded columns₂] · W₂ᵀ; with `ids`, W's
            /// rows are those ids. W₂ is [rows, columns₂]. Grid: [rows / 8, tokens / 4], 256 threads.
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
                x2: *const u16,
                columns2: u32,
                w2: *const f32,
            ) {
                let (y, second) = (Output::new(y, before, bf16), Second { x: x2, columns: columns2, w: w2 });
                matvec::<crate::format::$format>(
                    y, y_pitch, tokens, x, columns, w, scales, pitch, rows, ids, second,
                )
            }
        )*}
    };
}

formats! {
    matvec_bf16: Bf16;
    matvec_q8_0: Q8_0;
    matvec_q4_0: Q4_0;
    matvec_q4_1: Q4_1;
}
