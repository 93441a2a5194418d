//! 6 × 16 micro-kernels for AVX2 with FMA: 12 accumulators, two vectors of B and a broadcast of A, of 16 registers.
//!
//! bf16 panels are widened in registers: each 32-bit lane holds two neighbours along k, and shifting or masking it
//! gives either of them as f32.

use super::micro::{CTile, MicroKernel, PanelPair, a_stride, one_by_one};
use crate::gemm::view::Accumulate;
use crate::isa::{Avx2, Isa};
use core::arch::x86_64::*;
use half::bf16;

const MR: usize = 6;
const NR: usize = 16;

/// f32 panels.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct Avx2F32(pub Avx2);

impl MicroKernel for Avx2F32 {
    type B = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx2(self.0)
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: [Tile<f32>; MR] =
            [f32_tile::<1>, f32_tile::<2>, f32_tile::<3>, f32_tile::<4>, f32_tile::<5>, f32_tile::<6>];
        c.check(panels);
        one_by_one(panels, c, |&PanelPair { k, a, b }, c| {
            // SAFETY: the token `self.0` proves AVX2 and FMA; `check` asserted the tile's bounds for `c.rows` rows.
            unsafe { TILES[c.rows - 1](k, a.as_ptr(), b.as_ptr(), c) }
        });
    }
}

/// bf16 panels, widened in registers; A is widened as it is packed.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct Avx2Bf16(pub Avx2);

impl MicroKernel for Avx2Bf16 {
    type B = bf16;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx2(self.0)
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: [Tile<bf16>; MR] =
            [bf16_tile::<1>, bf16_tile::<2>, bf16_tile::<3>, bf16_tile::<4>, bf16_tile::<5>, bf16_tile::<6>];
        c.check(panels);
        one_by_one(panels, c, |&PanelPair { k, a, b }, c| {
            // SAFETY: the token `self.0` proves AVX2 and FMA; `check` asserted the tile's bounds for `c.rows` rows.
            unsafe { TILES[c.rows - 1](k, a.as_ptr(), b.as_ptr(), c) }
        });
    }
}

/// A tile function for a fixed number of rows.
type Tile<E> = unsafe fn(usize, *const f32, *const E, CTile<'_>);

/// # Safety
/// The CPU has AVX2 and FMA; [`CTile::check`] has passed, and R = `c.rows`.
#[target_feature(enable = "avx2,fma")]
unsafe fn f32_tile<const R: usize>(k: usize, a: *const f32, b: *const f32, c: CTile<'_>) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for p in 0..k {
        // SAFETY: p < k; `check` found k · NR elements at b and R rows of k elements, `a_stride` apart, at a.
        unsafe {
            let b = [_mm256_loadu_ps(b.add(p * NR)), _mm256_loadu_ps(b.add(p * NR + 8))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_ps(*a.add(i * a_stride::<f32>() + p));
                sums[0] = _mm256_fmadd_ps(a, b[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(a, b[1], sums[1]);
            }
        }
    }
    store(sums, c);
}

/// # Safety
/// The CPU has AVX2 and FMA; [`CTile::check`] has passed, and R = `c.rows`.
#[target_feature(enable = "avx2,fma")]
unsafe fn bf16_tile<const R: usize>(k: usize, a: *const f32, b: *const bf16, c: CTile<'_>) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    for p in (0..k).step_by(2) {
        // SAFETY: p + 1 < k, which `check` found to be even; it found k · NR elements at b and R rows of k elements,
        // `a_stride` apart, at a.
        unsafe {
            let pairs = [_mm256_loadu_si256(b.add(p * NR).cast()), _mm256_loadu_si256(b.add(p * NR + 16).cast())];
            let even = pairs.map(|b| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)));
            let odd = pairs.map(|b| _mm256_castsi256_ps(_mm256_and_si256(b, upper)));
            for (q, b) in [even, odd].into_iter().enumerate() {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_set1_ps(*a.add(i * a_stride::<f32>() + p + q));
                    sums[0] = _mm256_fmadd_ps(a, b[0], sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, b[1], sums[1]);
                }
            }
        }
    }
    store(sums, c);
}

/// Stores a tile by way of a row on the stack, so that a tile at C's edge needs no masks.
#[inline]
#[target_feature(enable = "avx2")]
fn store<const R: usize>(sums: [[__m256; 2]; R], c: CTile<'_>) {
    for (i, sums) in sums.into_iter().enumerate() {
        let mut row = [0.0f32; NR];
        // SAFETY: `row` is the two vectors of eight that are written.
        unsafe {
            _mm256_storeu_ps(row.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(row.as_mut_ptr().add(8), sums[1]);
        }
        let out = &mut c.data[i * c.stride..][..c.cols];
        for (out, sum) in out.iter_mut().zip(row) {
            match c.accumulate {
                Accumulate::Overwrite => *out = sum,
                Accumulate::Add => *out += sum,
            }
        }
    }
}
