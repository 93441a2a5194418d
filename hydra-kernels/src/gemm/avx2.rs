//! 6 × 16 micro-kernels for AVX2 with FMA: 12 accumulators, two vectors of B and a broadcast of A, of 16 registers.
//!
//! f32 as it is; bf16 widened: a pair of neighbours along k is one 32-bit lane whose halves, moved up, are f32.

use super::Accumulate;
use super::tiled::{CTile, Micro, Piece, a_stride, one_by_one};
use crate::isa::{Avx2, Isa};
use core::arch::x86_64::*;
use half::bf16;

const MR: usize = 6;
const NR: usize = 16;

/// f32 panels.
#[derive(Clone, Copy)]
pub(super) struct Avx2F32(pub(super) Avx2);

impl Micro for Avx2F32 {
    type E = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx2(self.0)
    }

    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>) {
        const TILES: [Tile<f32>; MR] =
            [f32_tile::<1>, f32_tile::<2>, f32_tile::<3>, f32_tile::<4>, f32_tile::<5>, f32_tile::<6>];
        c.check(pieces);
        one_by_one(pieces, c, |&Piece { k, a, b }, c| {
            // SAFETY: `self` proves AVX2 and FMA; `check` is the bounds contract of the tile with `c.rows` rows.
            unsafe { TILES[c.rows - 1](k, a.as_ptr(), b.as_ptr(), c) }
        });
    }
}

/// bf16 panels, widened on the way into registers; A is widened as it is copied.
#[derive(Clone, Copy)]
pub(super) struct Avx2Widened(pub(super) Avx2);

impl Micro for Avx2Widened {
    type E = bf16;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx2(self.0)
    }

    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>) {
        const TILES: [Tile<bf16>; MR] =
            [bf16_tile::<1>, bf16_tile::<2>, bf16_tile::<3>, bf16_tile::<4>, bf16_tile::<5>, bf16_tile::<6>];
        c.check(pieces);
        one_by_one(pieces, c, |&Piece { k, a, b }, c| {
            // SAFETY: `self` proves AVX2 and FMA; `check` is the bounds contract of the tile with `c.rows` rows.
            unsafe { TILES[c.rows - 1](k, a.as_ptr(), b.as_ptr(), c) }
        });
    }
}

/// A tile of so many rows.
type Tile<E> = unsafe fn(usize, *const f32, *const E, CTile<'_>);

/// # Safety
/// AVX2 and FMA; `CTile::check` with R = `c.rows`.
#[target_feature(enable = "avx2,fma")]
unsafe fn f32_tile<const R: usize>(k: usize, a: *const f32, b: *const f32, c: CTile<'_>) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for p in 0..k {
        // SAFETY: `check`: b has k · NR elements and a R rows of k.
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
/// AVX2 and FMA; `CTile::check` with R = `c.rows`.
#[target_feature(enable = "avx2,fma")]
unsafe fn bf16_tile<const R: usize>(k: usize, a: *const f32, b: *const bf16, c: CTile<'_>) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    for p in (0..k).step_by(2) {
        // SAFETY: `check`: b has k · NR elements and a R rows of k; k is even.
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

/// Through a row on the stack, so that a tile at the edge needs no masks.
#[inline]
#[target_feature(enable = "avx2")]
fn store<const R: usize>(sums: [[__m256; 2]; R], c: CTile<'_>) {
    for (i, sums) in sums.into_iter().enumerate() {
        let mut row = [0.0f32; NR];
        // SAFETY: a row has room for two vectors of eight.
        unsafe {
            _mm256_storeu_ps(row.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(row.as_mut_ptr().add(8), sums[1]);
        }
        let out = &mut c.data[i * c.stride..][..c.cols];
        for (out, sum) in out.iter_mut().zip(row) {
            match c.store {
                Accumulate::Overwrite => *out = sum,
                Accumulate::Add => *out += sum,
            }
        }
    }
}
