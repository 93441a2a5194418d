//! 12 × 32 micro-kernels for AVX-512: 24 accumulators, two vectors of B (four for bf16) and a broadcast of A, of 32 registers.
//!
//! f32 as it is; bf16 widened: a pair of neighbours along k is one 32-bit lane whose halves, moved up, are f32.

use super::Store;
use super::convert::{round, widen};
use super::drive::{CTile, Micro, a_stride};
use crate::isa::{Avx512, Isa};
use core::arch::x86_64::*;
use half::bf16;

pub(super) const MR: usize = 12;
pub(super) const NR: usize = 32;

/// Rows of a panel of f32 that are asked for ahead.
const AHEAD: usize = 8;

/// f32 panels.
#[derive(Clone, Copy)]
pub(super) struct Avx512F32(pub(super) Avx512);

impl Micro for Avx512F32 {
    type E = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx512(self.0)
    }

    #[inline(always)]
    fn of_f32(a: f32) -> f32 {
        a
    }

    #[inline(always)]
    fn of_bf16(a: bf16) -> f32 {
        widen(a)
    }

    fn tile(self, k: usize, a: &[f32], b: &[f32], c: CTile<'_>) {
        type Tile = unsafe fn(usize, *const f32, *const f32, CTile<'_>);
        const TILES: [Tile; MR] = [
            f32_tile::<1>,
            f32_tile::<2>,
            f32_tile::<3>,
            f32_tile::<4>,
            f32_tile::<5>,
            f32_tile::<6>,
            f32_tile::<7>,
            f32_tile::<8>,
            f32_tile::<9>,
            f32_tile::<10>,
            f32_tile::<11>,
            f32_tile::<12>,
        ];
        c.check::<Self>(k, a, b);
        // SAFETY: `self` proves AVX-512; `check` is the bounds contract of the tile with `c.rows` rows.
        unsafe { TILES[c.rows - 1](k, a.as_ptr(), b.as_ptr(), c) }
    }
}

/// bf16 panels, widened on the way into registers; A is widened as it is copied.
#[derive(Clone, Copy)]
pub(super) struct Avx512Widened(pub(super) Avx512);

impl Micro for Avx512Widened {
    type E = bf16;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx512(self.0)
    }

    #[inline(always)]
    fn of_f32(a: f32) -> f32 {
        widen(round(a))
    }

    #[inline(always)]
    fn of_bf16(a: bf16) -> f32 {
        widen(a)
    }

    fn tile(self, k: usize, a: &[f32], b: &[bf16], c: CTile<'_>) {
        type Tile = unsafe fn(usize, *const f32, *const bf16, CTile<'_>);
        const TILES: [Tile; MR] = [
            bf16_tile::<1>,
            bf16_tile::<2>,
            bf16_tile::<3>,
            bf16_tile::<4>,
            bf16_tile::<5>,
            bf16_tile::<6>,
            bf16_tile::<7>,
            bf16_tile::<8>,
            bf16_tile::<9>,
            bf16_tile::<10>,
            bf16_tile::<11>,
            bf16_tile::<12>,
        ];
        c.check::<Self>(k, a, b);
        // SAFETY: `self` proves AVX-512; `check` is the bounds contract of the tile with `c.rows` rows.
        unsafe { TILES[c.rows - 1](k, a.as_ptr(), b.as_ptr(), c) }
    }
}

/// # Safety
/// AVX-512; `CTile::check` with R = `c.rows`.
#[target_feature(enable = "avx512f")]
unsafe fn f32_tile<const R: usize>(k: usize, a: *const f32, b: *const f32, c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: `check`: C's rows lie inside its slice; a prefetch reads nothing in any case.
    unsafe { prefetch::<R>(&c) };
    for p in 0..k {
        // SAFETY: `check`: b has k · NR elements and a R rows of k.
        unsafe {
            // From L2, where the machine's own prefetching comes late: 6 %.
            let ahead = b.wrapping_add((p + AHEAD) * NR);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(16).cast());
            let b = [_mm512_loadu_ps(b.add(p * NR)), _mm512_loadu_ps(b.add(p * NR + 16))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*a.add(i * a_stride::<f32>() + p));
                sums[0] = _mm512_fmadd_ps(a, b[0], sums[0]);
                sums[1] = _mm512_fmadd_ps(a, b[1], sums[1]);
            }
        }
    }
    // SAFETY: the same contract.
    unsafe { store(sums, c) }
}

/// # Safety
/// AVX-512; `CTile::check` with R = `c.rows`.
#[target_feature(enable = "avx512f")]
unsafe fn bf16_tile<const R: usize>(k: usize, a: *const f32, b: *const bf16, c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    // SAFETY: `check`: C's rows lie inside its slice; a prefetch reads nothing in any case.
    unsafe { prefetch::<R>(&c) };
    for p in (0..k).step_by(2) {
        // SAFETY: `check`: b has k · NR elements and a R rows of k; k is even.
        unsafe {
            let pairs = [_mm512_loadu_si512(b.add(p * NR).cast()), _mm512_loadu_si512(b.add(p * NR + 32).cast())];
            let even = pairs.map(|b| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)));
            let odd = pairs.map(|b| _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
            for (q, b) in [even, odd].into_iter().enumerate() {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(i * a_stride::<f32>() + p + q));
                    sums[0] = _mm512_fmadd_ps(a, b[0], sums[0]);
                    sums[1] = _mm512_fmadd_ps(a, b[1], sums[1]);
                }
            }
        }
    }
    // SAFETY: the same contract.
    unsafe { store(sums, c) }
}

/// Fetches the tile of C while its sums are computed.
///
/// # Safety
/// R rows of `c` lie inside its slice.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn prefetch<const R: usize>(c: &CTile<'_>) {
    for i in 0..R {
        // SAFETY: row i's first element is inside the slice.
        let row = unsafe { c.data.as_ptr().add(i * c.stride) };
        _mm_prefetch::<_MM_HINT_T0>(row.cast());
        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(16).cast());
    }
}

/// # Safety
/// AVX-512; R rows of `c.cols` ≤ NR columns lie inside `c`'s slice.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store<const R: usize>(sums: [[__m512; 2]; R], c: CTile<'_>) {
    let columns = u32::MAX >> (NR - c.cols);
    let masks = [columns as u16, (columns >> 16) as u16];
    for (i, sums) in sums.into_iter().enumerate() {
        for (v, mut sum) in sums.into_iter().enumerate() {
            // `wrapping_add`: with few columns the second vector may begin beyond the slice, all masked out.
            let at = c.data.as_mut_ptr().wrapping_add(i * c.stride + 16 * v);
            // SAFETY: the masks admit only columns below `c.cols`.
            unsafe {
                if c.store == Store::Accumulate {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[v], at), sum);
                }
                _mm512_mask_storeu_ps(at, masks[v], sum);
            }
        }
    }
}
