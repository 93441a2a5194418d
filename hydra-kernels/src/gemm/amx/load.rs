//! A's rows as tiles of bf16: 16 rows of 32 values along k, step by step the upper rows' tile and the lower rows'.

use super::super::Values;
use super::super::avx512bf16::{rounded, transpose};
use super::{A_TILE, K_STEP, MR, Part, TILE};
use crate::isa::AmxBf16;
use core::arch::x86_64::*;
use half::bf16;

/// Rows `i .. i + rows` of a part of A at `strip`.
///
/// # Safety
/// AVX-512 F, BW and BF16; room for the part's tiles at `strip`; at most [`MR`] rows.
pub(super) unsafe fn part(_isa: AmxBf16, strip: *mut bf16, part: &Part<'_, '_>, i: usize, rows: usize) {
    let a = part.term.a;
    let first = i * a.row_stride + part.first * a.col_stride;
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
/// AVX-512 F, BW and BF16; room for all tiles at `strip`; at most [`MR`] rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn columns<E: Pairs>(strip: *mut bf16, data: &[E], stride: usize, rows: usize, k: usize) {
    assert!(k == 0 || data.len() >= (k - 1) * stride + rows);
    for tile in 0..rows.div_ceil(TILE) {
        let mask = ((1u32 << (rows - tile * TILE).min(TILE)) - 1) as u16;
        for step in 0..k.div_ceil(K_STEP) {
            let mut pairs = [_mm512_setzero_si512(); TILE];
            for (p, pair) in pairs.iter_mut().enumerate() {
                let column =
                    |q: usize| (data.as_ptr().wrapping_add(q * stride + tile * TILE), if q < k { mask } else { 0 });
                let q = step * K_STEP + 2 * p;
                // SAFETY: the masks admit only columns below `k` and rows below `rows`, inside by the assert.
                *pair = unsafe { E::pairs(column(q), column(q + 1)) };
            }
            for (row, values) in transpose(pairs).into_iter().enumerate() {
                // SAFETY: the caller's room.
                unsafe { _mm512_storeu_si512(strip.add((step * 2 + tile) * A_TILE + row * K_STEP).cast(), values) }
            }
        }
    }
}

/// Neighbouring columns of a transpose as pairs of bf16.
trait Pairs: Copy {
    /// Lane i is the pair (`even[i]`, `odd[i]`), zeros where a mask says so.
    ///
    /// # Safety
    /// AVX-512 F, BW and BF16; what the masks admit can be read.
    unsafe fn pairs(even: (*const Self, u16), odd: (*const Self, u16)) -> __m512i;
}

impl Pairs for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn pairs(even: (*const f32, u16), odd: (*const f32, u16)) -> __m512i {
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut lane = 0;
            while lane < 32 {
                order[lane] = (lane / 2 + lane % 2 * 16) as u16;
                lane += 1;
            }
            order
        };
        // SAFETY: the caller's contract; the order is 64 bytes.
        unsafe {
            let (even, odd) = (_mm512_maskz_loadu_ps(even.1, even.0), _mm512_maskz_loadu_ps(odd.1, odd.0));
            _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), rounded(even, odd))
        }
    }
}

impl Pairs for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn pairs(even: (*const bf16, u16), odd: (*const bf16, u16)) -> __m512i {
        // SAFETY: the caller's contract; the token of AVX-512 includes VL.
        unsafe {
            let even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even.1, even.0.cast()));
            let odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd.1, odd.0.cast()));
            _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
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
