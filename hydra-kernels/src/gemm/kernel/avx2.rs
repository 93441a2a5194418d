//! 12 × 16 micro-kernels for AVX2 with FMA, as two tiles of 6 × 16: 12 accumulators, two vectors of B and a broadcast of A, of
//! 16 registers. The second tile reads B from L1.
//!
//! bf16 panels are widened in registers: each 32-bit lane holds two neighbours along k, and shifting or masking it
//! gives either of them as f32.

use super::micro::{CTile, MicroKernel, PanelPair, a_stride, one_by_one};
use crate::gemm::view::Accumulate;
use crate::isa::{Avx2, Isa};
use core::arch::x86_64::*;
use half::bf16;

const MR: usize = 12;
const NR: usize = 16;

/// KC in bytes: a panel of B and six rows of A are 25 KiB of a 32 KiB L1.
const KC_BYTES: usize = 1152;

/// Rows whose sums are in registers.
const TILE_ROWS: usize = 6;

/// How many rows ahead a panel of B is prefetched.
const AHEAD: usize = 8;

/// Rows of B in one round of a tile's loop.
const UNROLL: usize = 4;

/// f32 panels.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct Avx2F32(pub Avx2);

impl MicroKernel for Avx2F32 {
    type B = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 1;
    const KC_BYTES: usize = KC_BYTES;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx2(self.0)
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: [Tile<f32>; TILE_ROWS] =
            [f32_tile::<1>, f32_tile::<2>, f32_tile::<3>, f32_tile::<4>, f32_tile::<5>, f32_tile::<6>];
        // SAFETY: the token `self.0` proves AVX2 and FMA; each tile is for one row more than the one before.
        unsafe { multiply(panels, c, TILES) }
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
    const KC_BYTES: usize = KC_BYTES;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx2(self.0)
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: [Tile<bf16>; TILE_ROWS] =
            [bf16_tile::<1>, bf16_tile::<2>, bf16_tile::<3>, bf16_tile::<4>, bf16_tile::<5>, bf16_tile::<6>];
        // SAFETY: the token `self.0` proves AVX2 and FMA; each tile is for one row more than the one before.
        unsafe { multiply(panels, c, TILES) }
    }
}

/// A tile function for a fixed number of rows.
type Tile<E> = unsafe fn(usize, *const f32, *const E, CTile<'_>);

/// [`MicroKernel::multiply`] by tiles of at most [`TILE_ROWS`] rows.
///
/// # Safety
/// The CPU has AVX2 and FMA; `tiles[rows - 1]` is for `rows` rows.
#[inline(always)]
unsafe fn multiply<K: MicroKernel<A = f32>>(panels: &[PanelPair<'_, K>], c: CTile<'_>, tiles: [Tile<K::B>; TILE_ROWS]) {
    c.check(panels);
    one_by_one(panels, c, |&PanelPair { k, a, b }, c| {
        let CTile { data, stride, rows, cols, accumulate } = c;
        for first in (0..rows).step_by(TILE_ROWS) {
            let (data, rows) = (&mut data[first * stride..], TILE_ROWS.min(rows - first));
            let c = CTile { data, stride, rows, cols, accumulate };
            // SAFETY: this function's contract; `check` asserted the bounds for all rows.
            unsafe { tiles[rows - 1](k, a.as_ptr().add(first * a_stride::<f32>()), b.as_ptr(), c) }
        }
    });
}

/// Prefetches a tile of C while its sums are computed.
///
/// # Safety
/// R rows of `c` lie inside its slice.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn prefetch<const R: usize>(c: &CTile<'_>) {
    for i in 0..R {
        // SAFETY: i < R, so the first element of row i is inside the slice by this function's contract.
        let row = unsafe { c.data.as_ptr().add(i * c.stride) };
        _mm_prefetch::<_MM_HINT_T0>(row.cast());
        // A row that begins inside a cache line ends in the next one.
        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(NR - 1).cast());
    }
}

/// # Safety
/// The CPU has AVX2 and FMA; [`CTile::check`] has passed, and R = `c.rows`.
#[target_feature(enable = "avx2,fma")]
unsafe fn f32_tile<const R: usize>(k: usize, a: *const f32, b: *const f32, c: CTile<'_>) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    // SAFETY: `check` found R rows of C inside its slice.
    unsafe { prefetch::<R>(&c) };
    let mut step = |p: usize| {
        // SAFETY: p < k; `check` found k · NR elements at b and R rows of k elements, `a_stride` apart, at a.
        unsafe {
            // B comes from L2, where the hardware prefetcher is late.
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add((p + AHEAD) * NR).cast());
            let b = [_mm256_loadu_ps(b.add(p * NR)), _mm256_loadu_ps(b.add(p * NR + 8))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_ps(*a.add(i * a_stride::<f32>() + p));
                sums[0] = _mm256_fmadd_ps(a, b[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(a, b[1], sums[1]);
            }
        }
    };
    let whole = k / UNROLL * UNROLL;
    for p in (0..whole).step_by(UNROLL) {
        (p..p + UNROLL).for_each(&mut step);
    }
    (whole..k).for_each(step);
    // SAFETY: `check` found R rows of `c.cols` columns inside C's slice, and `c.cols` ≤ NR.
    unsafe { store(sums, c) }
}

/// # Safety
/// The CPU has AVX2 and FMA; [`CTile::check`] has passed, and R = `c.rows`.
#[target_feature(enable = "avx2,fma")]
unsafe fn bf16_tile<const R: usize>(k: usize, a: *const f32, b: *const bf16, c: CTile<'_>) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    // SAFETY: `check` found R rows of C inside its slice.
    unsafe { prefetch::<R>(&c) };
    for p in (0..k).step_by(2) {
        // SAFETY: p + 1 < k, which `check` found to be even; it found k · NR elements at b and R rows of k elements,
        // `a_stride` apart, at a.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add((p + 2 * AHEAD) * NR).cast());
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
    // SAFETY: `check` found R rows of `c.cols` columns inside C's slice, and `c.cols` ≤ NR.
    unsafe { store(sums, c) }
}

/// Stores or adds the sums of a tile.
///
/// # Safety
/// The CPU has AVX2; R rows of `c.cols` ≤ NR columns lie inside `c`'s slice.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<const R: usize>(sums: [[__m256; 2]; R], c: CTile<'_>) {
    if c.cols < NR {
        return store_part(sums, c);
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (v, mut sum) in sums.into_iter().enumerate() {
            // SAFETY: i < R, and both vectors' columns are below `c.cols`: inside the slice by this function's contract.
            unsafe {
                let at = c.data.as_mut_ptr().add(i * c.stride + 8 * v);
                if c.accumulate == Accumulate::Add {
                    sum = _mm256_add_ps(_mm256_loadu_ps(at), sum);
                }
                _mm256_storeu_ps(at, sum);
            }
        }
    }
}

/// [`store`] for a tile at C's edge, by way of a row on the stack.
#[cold]
#[target_feature(enable = "avx2")]
fn store_part<const R: usize>(sums: [[__m256; 2]; R], c: CTile<'_>) {
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
