//! 12 × 32 micro-kernels for AVX-512.
//!
//! bf16 panels are widened in registers: each 32-bit lane holds two neighbours along k, and shifting or masking it
//! gives either of them as f32.

use super::micro::{CTile, MicroKernel, PanelPair, a_stride, pack_rows};
use super::tile512::{MR, NR, Tiles, prefetch, store, tiles, vectors};
use crate::gemm::bf16::PackedA;
use crate::gemm::blocking::KBlock;
use crate::gemm::view::Values;
use crate::isa::{Avx512, Isa};
use crate::simd::transpose::{Column, Transposed};
use core::arch::x86_64::*;
use core::array::from_fn;
use half::bf16;

/// How many rows ahead a panel of f32 is prefetched.
const AHEAD: usize = 8;

/// f32 panels.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct Avx512F32(pub Avx512);

impl MicroKernel for Avx512F32 {
    type B = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx512(self.0)
    }

    fn pack_a(self, panel: &mut [f32], block: &KBlock<'_, '_, f32>, first_row: usize, rows: usize) {
        pack_a_f32::<Self>(self.0, panel, block, first_row, rows);
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: Tiles<Avx512F32> = tiles!(f32_tile 1 2 3 4 5 6 7 8 9 10 11 12);
        c.check(panels);
        // SAFETY: the token `self.0` proves AVX-512; `check` asserted the bounds of `c.rows` rows and `c.cols` columns.
        unsafe { TILES[vectors(&c) - 1][c.rows - 1](panels, c) }
    }
}

/// bf16 panels, widened in registers; A is widened as it is packed.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct Avx512WidenedBf16(pub Avx512);

impl MicroKernel for Avx512WidenedBf16 {
    type B = bf16;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx512(self.0)
    }

    fn pack_a(self, panel: &mut [f32], block: &KBlock<'_, '_, bf16>, first_row: usize, rows: usize) {
        pack_a_f32::<Self>(self.0, panel, block, first_row, rows);
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: Tiles<Avx512WidenedBf16> = tiles!(bf16_tile 1 2 3 4 5 6 7 8 9 10 11 12);
        c.check(panels);
        // SAFETY: the token `self.0` proves AVX-512; `check` asserted the bounds of `c.rows` rows and `c.cols` columns.
        unsafe { TILES[vectors(&c) - 1][c.rows - 1](panels, c) }
    }
}

/// # Safety
/// The CPU has AVX-512F; [`CTile::check`] has passed, R = `c.rows` and `c.cols` ≤ 16 · V.
#[target_feature(enable = "avx512f")]
unsafe fn f32_tile<const R: usize, const V: usize>(panels: &[PanelPair<'_, Avx512F32>], c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: `check` found R rows of C inside its slice.
    unsafe { prefetch::<R, V>(&c) };
    for pair in panels {
        let (a, b) = (pair.a.as_ptr(), pair.b.as_ptr());
        for p in 0..pair.k {
            // SAFETY: p < k; `check` found k · NR elements at b and R rows of k elements, `a_stride` apart, at a.
            unsafe {
                // B comes from L2, where the hardware prefetcher is late: 6 % faster.
                let ahead = b.wrapping_add((p + AHEAD) * NR);
                let mut columns = [_mm512_setzero_ps(); V];
                for (v, column) in columns.iter_mut().enumerate() {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(16 * v).cast());
                    *column = _mm512_loadu_ps(b.add(p * NR + 16 * v));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(i * a_stride::<f32>() + p));
                    for (sum, b) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(a, b, *sum);
                    }
                }
            }
        }
    }
    // SAFETY: `check` found R rows of `c.cols` columns inside C's slice, and `c.cols` ≤ 16 · V.
    unsafe { store(sums, c) }
}

/// # Safety
/// The CPU has AVX-512F; [`CTile::check`] has passed, R = `c.rows` and `c.cols` ≤ 16 · V.
#[target_feature(enable = "avx512f")]
unsafe fn bf16_tile<const R: usize, const V: usize>(panels: &[PanelPair<'_, Avx512WidenedBf16>], c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    // SAFETY: `check` found R rows of C inside its slice.
    unsafe { prefetch::<R, V>(&c) };
    for pair in panels {
        let (a, b) = (pair.a.as_ptr(), pair.b.as_ptr());
        for p in (0..pair.k).step_by(2) {
            // SAFETY: p + 1 < k, which `check` found to be even; it found k · NR elements at b and R rows of k
            // elements, `a_stride` apart, at a.
            unsafe {
                let pairs: [_; V] = from_fn(|v| _mm512_loadu_si512(b.add(p * NR + 32 * v).cast()));
                let even = pairs.map(|b| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)));
                let odd = pairs.map(|b| _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
                for (q, b) in [even, odd].into_iter().enumerate() {
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let a = _mm512_set1_ps(*a.add(i * a_stride::<f32>() + p + q));
                        for (sum, b) in sums.iter_mut().zip(b) {
                            *sum = _mm512_fmadd_ps(a, b, *sum);
                        }
                    }
                }
            }
        }
    }
    // SAFETY: `check` found R rows of `c.cols` columns inside C's slice, and `c.cols` ≤ 16 · V.
    unsafe { store(sums, c) }
}

/// [`MicroKernel::pack_a`] into f32: a column-major A is transposed sixteen rows at a time.
fn pack_a_f32<K: MicroKernel<A = f32>>(
    isa: Avx512,
    panel: &mut [f32],
    block: &KBlock<'_, '_, K::B>,
    first_row: usize,
    rows: usize,
) where
    f32: PackedA<K::B>,
{
    let a = block.a();
    let first = block.start(first_row);
    match (a.data, a.row_stride) {
        (Values::F32(data), 1) if a.col_stride != 1 => {
            pack_columns(isa, panel, Transposed::new(&data[first..], a.col_stride, rows, block.len));
            if size_of::<K::B>() < size_of::<f32>() {
                let rows = panel.chunks_mut(a_stride::<f32>()).take(rows);
                isa.vectorize(
                    #[inline(always)]
                    || {
                        rows.for_each(|row| {
                            row[..block.len].iter_mut().for_each(|a| *a = PackedA::<K::B>::from_f32(*a));
                        });
                    },
                );
            }
        }
        (Values::Bf16(data), 1) if a.col_stride != 1 => {
            pack_columns(isa, panel, Transposed::new(&data[first..], a.col_stride, rows, block.len));
        }
        _ => isa.vectorize(
            #[inline(always)]
            || pack_rows::<K>(panel, block, first_row, rows),
        ),
    }
}

/// Packs the rows of a column-major A, widened to f32, with zeros up to a multiple of 16 values.
fn pack_columns<E: Column>(_isa: Avx512, panel: &mut [f32], a: Transposed<'_, E>) {
    let (rows, k) = (a.rows(), a.k());
    assert!(rows <= 16 && (rows == 0 || panel.len() >= (rows - 1) * a_stride::<f32>() + k.next_multiple_of(16)));
    // SAFETY: the token proves AVX-512 F, BW and VL; the assert is the room that `run` asks for.
    unsafe { run(panel.as_mut_ptr(), a) }

    /// # Safety
    /// The CPU has AVX-512 F, BW and VL; `a` has at most 16 rows, and for each of them, `a_stride` apart, there is room
    /// for its values in whole vectors of 16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn run<E: Column>(panel: *mut f32, a: Transposed<'_, E>) {
        let (rows, k) = (a.rows(), a.k());
        for q in (0..k).step_by(16) {
            for (row, values) in a.floats(0, q).into_iter().enumerate().take(rows) {
                // SAFETY: row < rows and q < k, a multiple of 16: inside the row's whole vectors.
                unsafe { _mm512_storeu_si512(panel.add(row * a_stride::<f32>() + q).cast(), values) };
            }
        }
    }
}
