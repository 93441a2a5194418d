//! A's rows as tiles of bf16: 16 rows of 32 values along k, step by step the upper rows' tile and the lower rows'.

use super::super::Values;
use super::super::avx512bf16::rounded;
use super::super::transpose::{Column, Transposed};
use super::{A_TILE, K_STEP, MR, TILE};
use crate::gemm::parts::Part;
use crate::isa::AmxBf16;
use core::arch::x86_64::*;
use half::bf16;

/// Rows `i .. i + rows` of a part of A at `strip`.
///
/// # Safety
/// AVX-512 F, BW and BF16; room for the part's tiles at `strip`; at most [`MR`] rows.
pub(super) unsafe fn part(_isa: AmxBf16, strip: *mut bf16, part: &Part<'_, '_, bf16>, i: usize, rows: usize) {
    let a = part.a();
    let first = part.start(i);
    match (a.data, a.row_stride) {
        // SAFETY: the caller's contract.
        (Values::F32(data), 1) => return unsafe { columns(strip, &data[first..], a.col_stride, rows, part.len) },
        // SAFETY: the same.
        (Values::Bf16(data), 1) => return unsafe { columns(strip, &data[first..], a.col_stride, rows, part.len) },
        _ => {}
    }
    for row in 0..rows {
        // SAFETY: inside the room for 32 rows.
        let strip = unsafe { strip.add(row / TILE * A_TILE + row % TILE * K_STEP) };
        let at = first + row * a.row_stride;
        match (a.data, a.col_stride) {
            // SAFETY: the caller's contract.
            (Values::F32(data), 1) => unsafe { round_row(strip, &data[at..at + part.len]) },
            // SAFETY: the same.
            (Values::Bf16(data), 1) => unsafe { copy_row(strip, &data[at..at + part.len]) },
            (data, stride) => {
                for (step, q) in (0..part.len).step_by(K_STEP).enumerate() {
                    let mut values = [0.0; K_STEP];
                    for (p, value) in values.iter_mut().enumerate().take(part.len - q) {
                        *value = data.at(at + (q + p) * stride);
                    }
                    // SAFETY: the same.
                    unsafe { round_row(strip.add(step * MR * K_STEP), &values) }
                }
            }
        }
    }
}

/// A row's values, K_STEP to a tile, zeros up to a whole step; tiles of the same rows lie MR · K_STEP values apart.
///
/// # Safety
/// AVX-512 F, BW and BF16; room for that at `strip`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_row(strip: *mut bf16, row: &[f32]) {
    for (step, at) in (0..row.len()).step_by(K_STEP).enumerate() {
        let left = row.len() - at;
        // SAFETY: the masks admit only the row's values; the room is the caller's.
        unsafe {
            let from = row.as_ptr().add(at);
            let (low, high) = if left >= K_STEP {
                (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)))
            } else {
                let mask = (1u32 << left) - 1;
                let high = from.wrapping_add(16);
                (_mm512_maskz_loadu_ps(mask as u16, from), _mm512_maskz_loadu_ps((mask >> 16) as u16, high))
            };
            _mm512_storeu_si512(strip.add(step * MR * K_STEP).cast(), rounded(low, high));
        }
    }
}

/// [`round_row`] for all rows of a transpose: `data[q · stride + row]`, `q` below `k`.
///
/// # Safety
/// AVX-512 F, BW, VL and BF16; room for all tiles at `strip`; at most [`MR`] rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn columns<E: Column>(strip: *mut bf16, data: &[E], stride: usize, rows: usize, k: usize) {
    let turned = Transposed::new(data, stride, rows, k);
    for tile in 0..rows.div_ceil(TILE) {
        for step in 0..k.div_ceil(K_STEP) {
            // SAFETY: the caller's features and room.
            unsafe {
                for (row, values) in turned.pairs(tile * TILE, step * K_STEP).into_iter().enumerate() {
                    _mm512_storeu_si512(strip.add((step * 2 + tile) * A_TILE + row * K_STEP).cast(), values);
                }
            }
        }
    }
}

/// [`round_row`] for a row that is bf16 already.
///
/// # Safety
/// AVX-512 F and BW; room as for [`round_row`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn copy_row(strip: *mut bf16, row: &[bf16]) {
    for (step, at) in (0..row.len()).step_by(K_STEP).enumerate() {
        let left = row.len() - at;
        let mask = if left >= K_STEP { u32::MAX } else { (1 << left) - 1 };
        // SAFETY: the mask admits only the row's values; the room is the caller's.
        unsafe {
            let values = _mm512_maskz_loadu_epi16(mask, row.as_ptr().add(at).cast());
            _mm512_storeu_si512(strip.add(step * MR * K_STEP).cast(), values);
        }
    }
}
