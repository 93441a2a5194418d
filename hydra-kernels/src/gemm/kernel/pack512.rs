//! Panels of bf16 pairs, packed with AVX-512 BF16. In a panel, step s holds (B[2s, j], B[2s + 1, j]) for 32 columns j.

use super::tile512::NR;
use crate::gemm::panels::ROWS_AHEAD;
use crate::gemm::view::Values;
use crate::isa::Avx512Bf16;
use crate::simd::round::round;
use crate::simd::transpose::transpose;
use core::arch::x86_64::*;
use half::bf16;

/// One step of a panel: 32 pairs.
type Step = [u8; 4 * NR];

/// Columns of a row that are read before those of the next: eight panels' worth.
const STRETCH: usize = 8 * NR;

/// How many bytes ahead a column-stored matrix is prefetched.
const BYTES_AHEAD: usize = 512;

/// Panels to be filled with `scale` · B [k, n].
pub(in crate::gemm) struct PairPanels<'a> {
    /// `[n / 32][steps]`, zero beyond k and n.
    out: &'a mut [Step],
    steps: usize,
    pub k: usize,
    n: usize,
    scale: f32,
}

impl<'a> PairPanels<'a> {
    /// Panels in `out`, which are padded to a multiple of `k_step` rows.
    ///
    /// # Panics
    /// If `out` is too short.
    pub fn new(out: &'a mut [u8], k_step: usize, [k, n]: [usize; 2], scale: f32) -> Self {
        let steps = k.next_multiple_of(k_step) / 2;
        let (out, _) = out.as_chunks_mut();
        assert!(out.len() >= n.div_ceil(NR) * steps && 2 * steps >= k);
        PairPanels { out, steps, k, n, scale }
    }
}

/// Packs a row-stored matrix, whose rows are `stride` apart.
pub(in crate::gemm) fn pack_row_stored(_isa: Avx512Bf16, panels: PairPanels<'_>, data: Values<'_>, stride: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn run(panels: PairPanels<'_>, data: Values<'_>, stride: usize) {
        let PairPanels { out, steps, k, n, scale } = panels;
        for first in (0..n).step_by(STRETCH) {
            for step in 0..steps {
                // The pieces of rows are too short for the hardware prefetcher.
                for p in [2 * step + ROWS_AHEAD, 2 * step + ROWS_AHEAD + 1] {
                    data.prefetch(p.wrapping_mul(stride).wrapping_add(first), STRETCH.min(n - first));
                }
                for j in (first..n.min(first + STRETCH)).step_by(NR) {
                    let row = |p: usize| {
                        if p >= k {
                            return _mm512_setzero_si512();
                        }
                        match data {
                            Values::Bf16(data) => scaled_bf16(&data[p * stride + j..], n - j, scale),
                            Values::F32(data) => scaled_f32(&data[p * stride + j..], n - j, scale),
                        }
                    };
                    store_pairs(&mut out[j / NR * steps + step], row(2 * step), row(2 * step + 1));
                }
            }
        }
    }
    // SAFETY: the token proves AVX-512 F, BW and BF16.
    unsafe { run(panels, data, stride) }
}

/// Packs a column-stored matrix: `column(j)` is the 2 · k bytes of column j.
pub(in crate::gemm) fn pack_column_stored<'a>(
    _isa: Avx512Bf16,
    panels: PairPanels<'_>,
    column: impl Fn(usize) -> &'a [u8],
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn run<'a>(panels: PairPanels<'_>, column: impl Fn(usize) -> &'a [u8]) {
        let PairPanels { out, steps, k, n, scale } = panels;
        let factor = _mm512_set1_ps(scale);
        for (panel, first) in out.chunks_exact_mut(steps).zip((0..n).step_by(NR)) {
            for (part, p) in panel.chunks_mut(16).zip((0..).step_by(32)) {
                let left = k.saturating_sub(p).min(32);
                let mask = ((1u64 << left) - 1) as u32;
                for half in 0..2 {
                    let columns = core::array::from_fn(|i| {
                        let j = first + 16 * half + i;
                        if j >= n || left == 0 {
                            return _mm512_setzero_si512();
                        }
                        let column = column(j);
                        assert!(column.len() == 2 * k);
                        let at = column.as_ptr().wrapping_add(2 * p);
                        // SAFETY: the mask admits `left` ≤ k − p values from p on, of the k that the assert found. A
                        // prefetch of any address is allowed and reads nothing.
                        let values = unsafe {
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(BYTES_AHEAD).cast());
                            _mm512_maskz_loadu_epi16(mask, at.cast())
                        };
                        if scale == 1.0 { values } else { scaled(widened(values), factor) }
                    });
                    store_columns(part, half, columns);
                }
            }
        }
    }
    // SAFETY: the token proves AVX-512 F, BW and BF16.
    unsafe { run(panels, column) }
}

/// One step of a panel from a row and the next: `out[j]` = the pair (scale · `row[j]`, scale · `next[j]`), rounded.
pub(in crate::gemm) fn pack_pair_of_rows(
    _isa: Avx512Bf16,
    out: &mut Step,
    row: &[f32; NR],
    next: &[f32; NR],
    scale: f32,
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn run(out: &mut Step, row: &[f32; NR], next: &[f32; NR], scale: f32) {
        let scale = _mm512_set1_ps(scale);
        store_pairs(out, scaled(loaded(row), scale), scaled(loaded(next), scale));
    }
    // SAFETY: the token proves AVX-512 F, BW and BF16.
    unsafe { run(out, row, next, scale) }
}

/// Up to 16 steps of a panel from 32 values of each column, `columns[j][first ..]`, scaled and rounded.
///
/// # Panics
/// If a column ends before `first + 32`.
pub(in crate::gemm) fn pack_columns<const LEN: usize>(
    _isa: Avx512Bf16,
    panel: &mut [Step],
    columns: &[[f32; LEN]; NR],
    first: usize,
    scale: f32,
) {
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn run<const LEN: usize>(panel: &mut [Step], columns: &[[f32; LEN]; NR], first: usize, scale: f32) {
        let scale = _mm512_set1_ps(scale);
        for half in 0..2 {
            let mut rounded = [_mm512_setzero_si512(); 16];
            for (rounded, column) in rounded.iter_mut().zip(&columns[16 * half..]) {
                // SAFETY: the assert below: 32 values from `first` on are inside the column.
                let values = unsafe {
                    let at = column.as_ptr().add(first);
                    [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))]
                };
                *rounded = scaled(values, scale);
            }
            store_columns(panel, half, rounded);
        }
    }
    assert!(first + 32 <= LEN);
    // SAFETY: the token proves AVX-512 F and BF16.
    unsafe { run(panel, columns, first, scale) }
}

/// Stores half of the columns of up to 16 steps; each register holds 16 pairs along k of one column.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_columns(panel: &mut [Step], half: usize, columns: [__m512i; 16]) {
    for (step, pairs) in panel.iter_mut().zip(transpose(columns)) {
        // SAFETY: `half` is 0 or 1, and a step is 128 bytes.
        unsafe { _mm512_storeu_si512(step.as_mut_ptr().add(64 * half).cast(), pairs) }
    }
}

/// Stores the pairs (`row[j]`, `next[j]`) of 32 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store_pairs(out: &mut Step, row: __m512i, next: __m512i) {
    /// Indices into two registers of 32 words, those of the second from 32 on: row[0], next[0], row[1], next[1], ..
    const INTERLEAVED: [[u16; 32]; 2] = {
        let mut order = [[0; 32]; 2];
        let mut i = 0;
        while i < 64 {
            order[i / 32][i % 32] = (i / 2 + i % 2 * 32) as u16;
            i += 1;
        }
        order
    };
    for (i, order) in INTERLEAVED.iter().enumerate() {
        // SAFETY: an order is the 64 bytes that are loaded; i is 0 or 1, and a step is 128 bytes.
        unsafe {
            let pairs = _mm512_permutex2var_epi16(row, _mm512_loadu_si512(order.as_ptr().cast()), next);
            _mm512_storeu_si512(out.as_mut_ptr().add(64 * i).cast(), pairs);
        }
    }
}

/// The first min(`n`, 32) values of `row`, scaled and rounded, then zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn scaled_bf16(row: &[bf16], n: usize, scale: f32) -> __m512i {
    let n = n.min(NR);
    assert!(n > 0 && row.len() >= n);
    // SAFETY: the mask admits the n values that the assert found.
    let row = unsafe { _mm512_maskz_loadu_epi16(u32::MAX >> (NR - n), row.as_ptr().cast()) };
    if scale == 1.0 { row } else { scaled(widened(row), _mm512_set1_ps(scale)) }
}

/// The first min(`n`, 32) values of `row`, scaled and rounded, then zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn scaled_f32(row: &[f32], n: usize, scale: f32) -> __m512i {
    let mut padded = [0.0; NR];
    let row = match row.first_chunk() {
        Some(whole) if n >= NR => whole,
        _ => {
            padded[..n].copy_from_slice(&row[..n]);
            &padded
        }
    };
    scaled(loaded(row), _mm512_set1_ps(scale))
}

/// 32 f32, scaled and rounded.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn scaled([low, high]: [__m512; 2], scale: __m512) -> __m512i {
    round(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn loaded(x: &[f32; NR]) -> [__m512; 2] {
    // SAFETY: the array is the two vectors of 16 that are loaded.
    unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] }
}

/// 32 bf16 as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(x: __m512i) -> [__m512; 2] {
    let wide = |half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
    [wide(_mm512_castsi512_si256(x)), wide(_mm512_extracti64x4_epi64::<1>(x))]
}
