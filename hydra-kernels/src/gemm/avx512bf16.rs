//! 12 × 32 micro-kernel for AVX-512 BF16: VDPBF16PS multiplies two neighbours along k and adds both to an f32.
//!
//! The instruction sums the pair with flush-to-zero and round-to-nearest whatever the mode.

use super::convert::round;
use super::avx512::{MR, NR, prefetch, store};
use super::drive::{CTile, Micro, a_stride};
use crate::isa::{Avx512Bf16, Isa};
use core::arch::x86_64::*;
use core::mem::transmute;
use half::bf16;

/// bf16 panels and tiles of A.
#[derive(Clone, Copy)]
pub(super) struct Avx512Pairs(pub(super) Avx512Bf16);

impl Micro for Avx512Pairs {
    type E = bf16;
    type A = bf16;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx512(self.0.avx512())
    }

    #[inline(always)]
    fn of_f32(a: f32) -> bf16 {
        round(a)
    }

    #[inline(always)]
    fn of_bf16(a: bf16) -> bf16 {
        a
    }

    fn tile(self, k: usize, a: &[bf16], b: &[bf16], c: CTile<'_>) {
        type Tile = unsafe fn(usize, *const bf16, *const bf16, CTile<'_>);
        const TILES: [Tile; MR] = [
            tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>, tile::<6>, tile::<7>, tile::<8>, tile::<9>,
            tile::<10>, tile::<11>, tile::<12>,
        ];
        c.check::<Self>(k, a, b);
        // SAFETY: `self` proves AVX-512 BF16; `check` is the bounds contract of the tile with `c.rows` rows.
        unsafe { TILES[c.rows - 1](k, a.as_ptr(), b.as_ptr(), c) }
    }
}

/// # Safety
/// AVX-512 BF16; `CTile::check` with R = `c.rows`.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile<const R: usize>(k: usize, a: *const bf16, b: *const bf16, c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: `check`: C's rows lie inside its slice; a prefetch reads nothing in any case.
    unsafe { prefetch::<R>(&c) };
    for p in (0..k).step_by(2) {
        // SAFETY: `check`: b has k · NR elements and a R rows of k, k even; 512 bits are 32 bf16, whatever they are called.
        unsafe {
            let b: [__m512bh; 2] = [
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(p * NR).cast())),
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(p * NR + 32).cast())),
            ];
            for (i, sums) in sums.iter_mut().enumerate() {
                let pair = a.add(i * a_stride::<bf16>() + p).cast::<i32>().read_unaligned();
                let a = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair));
                sums[0] = _mm512_dpbf16_ps(sums[0], a, b[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], a, b[1]);
            }
        }
    }
    // SAFETY: the same contract.
    unsafe { store(sums, c) }
}
