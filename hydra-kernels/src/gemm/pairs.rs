//! Panels of pairs of bf16, packed with AVX-512 BF16.

use super::Values;
use super::avx512::NR;
use super::avx512bf16::rounded;
use super::transpose::transpose;
use crate::isa::Avx512Bf16;
use core::arch::x86_64::*;
use half::bf16;

/// Words of two registers, the second's from 32 on: x0 n0 x1 n1 ..
const INTERLEAVED: [[u16; 32]; 2] = {
    let mut order = [[0; 32]; 2];
    let mut i = 0;
    while i < 64 {
        order[i / 32][i % 32] = (i / 2 + i % 2 * 32) as u16;
        i += 1;
    }
    order
};

/// 32 pairs (`x[j]`, `next[j]`) at `out`.
///
/// # Safety
/// AVX-512 F and BW; 128 bytes at `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn store_pairs(out: *mut u8, x: __m512i, next: __m512i) {
    for (i, order) in INTERLEAVED.iter().enumerate() {
        // SAFETY: an order is 64 bytes; the caller's room is 128.
        unsafe {
            let pairs = _mm512_permutex2var_epi16(x, _mm512_loadu_si512(order.as_ptr().cast()), next);
            _mm512_storeu_si512(out.add(64 * i).cast(), pairs);
        }
    }
}

/// 32 f32, scaled and rounded.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn scaled([low, high]: [__m512; 2], scale: __m512) -> __m512i {
    rounded(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn loaded(x: &[f32; 32]) -> [__m512; 2] {
    // SAFETY: two vectors of 16.
    unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] }
}

/// 32 bf16 as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(x: __m512i) -> [__m512; 2] {
    let wide = |half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
    [wide(_mm512_castsi512_si256(x)), wide(_mm512_extracti64x4_epi64::<1>(x))]
}

/// The first min(`n`, 32) values, which have to be there, and zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn some_of(x: &[bf16], n: usize) -> __m512i {
    let n = n.min(NR);
    assert!(n > 0 && x.len() >= n);
    // SAFETY: the mask admits what the assert found.
    unsafe { _mm512_maskz_loadu_epi16(u32::MAX >> (NR - n), x.as_ptr().cast()) }
}

/// `out[j]` = the pair (scale · `x[j]`, scale · `next[j]`), rounded, for 32 columns.
pub(super) fn pairs_across(_isa: Avx512Bf16, out: &mut [u8; 128], x: &[f32; 32], next: &[f32; 32], scale: f32) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn run(out: &mut [u8; 128], x: &[f32; 32], next: &[f32; 32], scale: f32) {
        let scale = _mm512_set1_ps(scale);
        // SAFETY: the token proves the features; `out` is 128 bytes.
        unsafe { store_pairs(out.as_mut_ptr(), scaled(loaded(x), scale), scaled(loaded(next), scale)) }
    }
    // SAFETY: the token proves the features.
    unsafe { run(out, x, next, scale) }
}

/// Where the panels of `scale` times a matrix [k, n] go.
pub(super) struct PairPanels<'a> {
    /// `[n / 32][steps][32]` pairs, zeros beyond k and n.
    pub out: &'a mut [[u8; 128]],
    pub steps: usize,
    pub k: usize,
    pub n: usize,
    pub scale: f32,
}

impl PairPanels<'_> {
    fn check(&self) {
        assert!(self.out.len() >= self.n.div_ceil(NR) * self.steps && 2 * self.steps >= self.k);
    }
}

/// Panels of a row-major matrix, rows `stride` apart.
pub(super) fn panels_across(_isa: Avx512Bf16, panels: PairPanels<'_>, data: Values<'_>, stride: usize) {
    panels.check();
    // SAFETY: the token proves the features.
    unsafe { panels_across_features(panels, data, stride) }
}

/// Columns read of a row before the next row's: eight panels' worth.
const STRETCH: usize = 8 * NR;

/// Rows that are fetched before they are read.
const AHEAD: usize = 12;

/// Fetches `len` elements from `first` on.
#[inline]
fn fetch_row(data: Values<'_>, first: usize, len: usize) {
    let (at, bytes) = match data {
        Values::F32(data) => (data.as_ptr().wrapping_add(first).cast::<i8>(), 4 * len),
        Values::Bf16(data) => (data.as_ptr().wrapping_add(first).cast::<i8>(), 2 * len),
    };
    for line in (0..bytes).step_by(64) {
        // SAFETY: every x86-64 machine prefetches; no address is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line)) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn panels_across_features(panels: PairPanels<'_>, data: Values<'_>, stride: usize) {
    let PairPanels { out, steps, k, n, scale } = panels;
    let factor = _mm512_set1_ps(scale);
    for first in (0..n).step_by(STRETCH) {
        for step in 0..steps {
            // Pieces of rows are too short for the machine's own prefetching.
            for p in [2 * step + AHEAD, 2 * step + AHEAD + 1] {
                fetch_row(data, p.wrapping_mul(stride).wrapping_add(first), STRETCH.min(n - first));
            }
            for j in (first..n.min(first + STRETCH)).step_by(NR) {
                let half = |p: usize| {
                    if p >= k {
                        return _mm512_setzero_si512();
                    }
                    match data {
                        Values::Bf16(data) => {
                            let row = some_of(&data[p * stride + j..], n - j);
                            if scale == 1.0 { row } else { scaled(widened(row), factor) }
                        }
                        Values::F32(data) => {
                            let mut row = [0.0; NR];
                            let row = match data[p * stride + j..].first_chunk() {
                                Some(whole) if n - j >= NR => whole,
                                _ => {
                                    row[..n - j].copy_from_slice(&data[p * stride + j..][..n - j]);
                                    &row
                                }
                            };
                            scaled(loaded(row), factor)
                        }
                    }
                };
                let place = &mut out[j / NR * steps + step];
                // SAFETY: a step of a panel is 128 bytes.
                unsafe { store_pairs(place.as_mut_ptr(), half(2 * step), half(2 * step + 1)) }
            }
        }
    }
}

/// Panels of a matrix by its columns, each of which is `2 · k` bytes of bf16.
pub(super) fn panels_along<'a>(_isa: Avx512Bf16, panels: PairPanels<'_>, column: impl Fn(usize) -> &'a [u8]) {
    panels.check();
    // SAFETY: the token proves the features.
    unsafe { panels_along_features(panels, column) }
}

/// Bytes of a column that are fetched before they are read.
const COLUMN_AHEAD: usize = 512;

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn panels_along_features<'a>(panels: PairPanels<'_>, column: impl Fn(usize) -> &'a [u8]) {
    let PairPanels { out, steps, k, n, scale } = panels;
    let factor = _mm512_set1_ps(scale);
    for (panel, first) in out.chunks_exact_mut(steps).zip((0..n).step_by(NR)) {
        for (part, p) in panel.chunks_mut(16).zip((0..).step_by(32)) {
            let left = k.saturating_sub(p).min(32);
            let mask = ((1u64 << left) - 1) as u32;
            for half in 0..2 {
                let rows = core::array::from_fn(|i| {
                    let j = first + 16 * half + i;
                    if j >= n || left == 0 {
                        return _mm512_setzero_si512();
                    }
                    let column = column(j);
                    assert!(column.len() == 2 * k);
                    let at = column.as_ptr().wrapping_add(2 * p);
                    // SAFETY: the mask admits `left` values from p on, which the column has; a prefetch reads nothing.
                    let values = unsafe {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(COLUMN_AHEAD).cast());
                        _mm512_maskz_loadu_epi16(mask, at.cast())
                    };
                    if scale == 1.0 { values } else { scaled(widened(values), factor) }
                });
                for (step, pairs) in part.iter_mut().zip(transpose(rows)) {
                    // SAFETY: half a step of 32 columns is 64 bytes.
                    unsafe { _mm512_storeu_si512(step.as_mut_ptr().add(64 * half).cast(), pairs) }
                }
            }
        }
    }
}

/// `panel[step][column]` = the pair (2 · step, 2 · step + 1) of a column's values, scaled and rounded: up to 16 steps of 32 columns.
///
/// `columns[j]` are 32 values along k of column j.
pub(super) fn pairs_along(
    _isa: Avx512Bf16,
    panel: &mut [[u8; 128]],
    columns: &[[f32; super::pack::COLUMN_STRIDE]; 32],
    first: usize,
    scale: f32,
) {
    assert!(first + 32 <= super::pack::COLUMN_STRIDE);
    // SAFETY: the token proves the features; the assert is the bound of each column.
    unsafe { pairs_along_features(panel, columns, first, scale) }
}

/// # Safety
/// AVX-512 F and BF16; 32 values of each column from `first` on.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs_along_features(
    panel: &mut [[u8; 128]],
    columns: &[[f32; super::pack::COLUMN_STRIDE]; 32],
    first: usize,
    scale: f32,
) {
    let scale = _mm512_set1_ps(scale);
    for half in 0..2 {
        let mut rows = [_mm512_setzero_si512(); 16];
        for (row, column) in rows.iter_mut().zip(&columns[16 * half..]) {
            // SAFETY: the caller's bound.
            *row = unsafe {
                let at = column.as_ptr().add(first);
                rounded(_mm512_mul_ps(_mm512_loadu_ps(at), scale), _mm512_mul_ps(_mm512_loadu_ps(at.add(16)), scale))
            };
        }
        for (step, words) in panel.iter_mut().zip(transpose(rows)) {
            // SAFETY: half a step of 32 columns is 64 bytes.
            unsafe { _mm512_storeu_si512(step.as_mut_ptr().add(64 * half).cast(), words) }
        }
    }
}
