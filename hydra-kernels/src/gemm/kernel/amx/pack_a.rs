//! Rows of A packed as tiles of bf16: step by step along k, the tile of the upper 16 rows and the tile of the lower.

use super::sizes::{A_TILE, K_STEP, MR, TILE};
use crate::gemm::blocking::KBlock;
use crate::gemm::view::Values;
use crate::isa::AmxBf16;
use crate::simd::round::round;
use crate::simd::transpose::{Column, Transposed};
use core::arch::x86_64::*;
use core::mem::MaybeUninit;
use half::bf16;

/// Elements from a tile to that of the same rows at the next step.
const STEP: usize = MR * K_STEP;

/// Packs rows `i .. i + rows` of a block of A, rounded to bf16 and padded with zeros to whole steps.
///
/// Of a tile with fewer than 16 rows only those rows are written.
///
/// # Panics
/// If `tiles` has less than the block's depth times [`MR`] elements, or there are more than [`MR`] rows.
pub(super) fn pack_a(
    _isa: AmxBf16,
    tiles: &mut [MaybeUninit<bf16>],
    block: &KBlock<'_, '_, bf16>,
    i: usize,
    rows: usize,
) {
    assert!(tiles.len() >= block.depth * MR && rows <= MR);
    let tiles = tiles.as_mut_ptr().cast::<bf16>();
    let a = block.a();
    let first = block.start(i);
    match (a.data, a.row_stride) {
        (Values::F32(data), 1) => {
            let a = Transposed::new(&data[first..], a.col_stride, rows, block.len);
            // SAFETY: the token proves AVX-512 F, BW, VL and BF16; the assert is the room for `rows` rows in whole
            // steps.
            return unsafe { pack_columns(tiles, a) };
        }
        (Values::Bf16(data), 1) => {
            let a = Transposed::new(&data[first..], a.col_stride, rows, block.len);
            // SAFETY: the token proves AVX-512 F, BW, VL and BF16; the assert is the room for `rows` rows in whole
            // steps.
            return unsafe { pack_columns(tiles, a) };
        }
        _ => {}
    }
    for row in 0..rows {
        // SAFETY: row < MR by the assert, so the row's values of the first step are inside the first two tiles.
        let tiles = unsafe { tiles.add(row / TILE * A_TILE + row % TILE * K_STEP) };
        let at = first + row * a.row_stride;
        match (a.data, a.col_stride) {
            // SAFETY: the token proves AVX-512 F, BW and BF16; the assert is the room for the row in whole steps.
            (Values::F32(data), 1) => unsafe { round_row(tiles, &data[at..at + block.len]) },
            // SAFETY: the token proves AVX-512 F and BW; the assert is the room for the row in whole steps.
            (Values::Bf16(data), 1) => unsafe { copy_row(tiles, &data[at..at + block.len]) },
            (data, stride) => {
                for (step, q) in (0..block.len).step_by(K_STEP).enumerate() {
                    let mut values = [0.0; K_STEP];
                    for (p, value) in values.iter_mut().enumerate().take(block.len - q) {
                        *value = data.at(at + (q + p) * stride);
                    }
                    // SAFETY: the token proves AVX-512 F, BW and BF16; the assert is the room for the row in whole
                    // steps, of which `step` is one.
                    unsafe { round_row(tiles.add(step * STEP), &values) }
                }
            }
        }
    }
}

/// Packs one row of f32.
///
/// # Safety
/// The CPU has AVX-512 F, BW and BF16; K_STEP values can be written at `tiles` and at each further step, [`STEP`]
/// apart.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_row(tiles: *mut bf16, row: &[f32]) {
    for (step, at) in (0..row.len()).step_by(K_STEP).enumerate() {
        let left = row.len() - at;
        // SAFETY: the masks admit the `left` values from `at` on; the room at each step is this function's contract.
        unsafe {
            let from = row.as_ptr().add(at);
            let (low, high) = if left >= K_STEP {
                (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)))
            } else {
                let mask = (1u32 << left) - 1;
                let high = from.wrapping_add(16);
                (_mm512_maskz_loadu_ps(mask as u16, from), _mm512_maskz_loadu_ps((mask >> 16) as u16, high))
            };
            _mm512_storeu_si512(tiles.add(step * STEP).cast(), round(low, high));
        }
    }
}

/// Packs one row of bf16.
///
/// # Safety
/// The CPU has AVX-512 F and BW; K_STEP values can be written at `tiles` and at each further step, [`STEP`] apart.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn copy_row(tiles: *mut bf16, row: &[bf16]) {
    for (step, at) in (0..row.len()).step_by(K_STEP).enumerate() {
        let left = row.len() - at;
        let mask = if left >= K_STEP { u32::MAX } else { (1 << left) - 1 };
        // SAFETY: the mask admits the `left` values from `at` on; the room at each step is this function's contract.
        unsafe {
            let values = _mm512_maskz_loadu_epi16(mask, row.as_ptr().add(at).cast());
            _mm512_storeu_si512(tiles.add(step * STEP).cast(), values);
        }
    }
}

/// Packs the rows of a column-major A.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL and BF16; all tiles that hold one of `a`'s rows can be written at `tiles`, step by
/// step.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_columns<E: Column>(tiles: *mut bf16, a: Transposed<'_, E>) {
    for tile in 0..a.rows().div_ceil(TILE) {
        for step in 0..a.k().div_ceil(K_STEP) {
            for (row, values) in a.pairs(tile * TILE, step * K_STEP).into_iter().enumerate() {
                // SAFETY: row < 16: one row of a tile that this function's contract covers.
                unsafe { _mm512_storeu_si512(tiles.add((step * 2 + tile) * A_TILE + row * K_STEP).cast(), values) };
            }
        }
    }
}
