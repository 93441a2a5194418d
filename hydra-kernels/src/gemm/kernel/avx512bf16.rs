//! 12 × 32 micro-kernel for AVX-512 BF16: VDPBF16PS multiplies two neighbours along k and adds both products to an f32.
//!
//! The instruction takes subnormals for zeros and rounds to nearest, whatever MXCSR says.

use super::micro::{CTile, MicroKernel, PanelPair, a_stride, pack_rows};
use super::tile512::{MR, NR, Tiles, prefetch, store, tiles, vectors};
use crate::gemm::blocking::KBlock;
use crate::gemm::view::Values;
use crate::isa::{Avx512Bf16, Isa};
use crate::simd::round::{round_slice, store_rounded};
use crate::simd::transpose::{Column, Transposed};
use core::arch::x86_64::*;
use core::array::from_fn;
use core::mem::transmute;
use half::bf16;

/// bf16 panels of A and of B.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct Avx512Bf16Kernel(pub Avx512Bf16);

impl MicroKernel for Avx512Bf16Kernel {
    type B = bf16;
    type A = bf16;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Avx512(self.0.avx512())
    }

    fn pack_a(self, panel: &mut [bf16], block: &KBlock<'_, '_, bf16>, first_row: usize, rows: usize) {
        let a = block.a();
        let first = block.start(first_row);
        match (a.data, a.row_stride, a.col_stride) {
            (Values::F32(data), stride, 1) => {
                for (row, out) in panel.chunks_mut(a_stride::<bf16>()).enumerate().take(rows) {
                    round_slice(self.0, &mut out[..block.len], &data[first + row * stride..][..block.len]);
                    out[block.len..block.depth].fill(bf16::ZERO);
                }
            }
            (Values::F32(data), 1, stride) => {
                pack_columns(self.0, panel, Transposed::new(&data[first..], stride, rows, block.len));
            }
            (Values::Bf16(data), 1, stride) if stride != 1 => {
                pack_columns(self.0, panel, Transposed::new(&data[first..], stride, rows, block.len));
            }
            _ => self.isa().vectorize(
                #[inline(always)]
                || pack_rows::<Self>(panel, block, first_row, rows),
            ),
        }
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: Tiles<Avx512Bf16Kernel> = tiles!(tile 1 2 3 4 5 6 7 8 9 10 11 12);
        c.check(panels);
        // SAFETY: the token `self.0` proves AVX-512 BF16; `check` asserted the bounds of `c.rows` rows and `c.cols`
        // columns.
        unsafe { TILES[vectors(&c) - 1][c.rows - 1](panels, c) }
    }

    fn round(self, c: &mut [bf16], stride: usize, sums: &[f32], cols: usize) {
        let rows = sums.len() / NR;
        assert!(rows > 0 && cols <= NR && c.len() >= (rows - 1) * stride + cols);
        // SAFETY: the token `self.0` proves AVX-512 F, BW and BF16; the assert is the bounds that `round_tile` asks
        // for.
        unsafe { round_tile(c.as_mut_ptr(), stride, sums.as_ptr(), rows, cols) }
    }
}

/// # Safety
/// The CPU has AVX-512 BF16; [`CTile::check`] has passed, R = `c.rows` and `c.cols` ≤ 16 · V.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile<const R: usize, const V: usize>(panels: &[PanelPair<'_, Avx512Bf16Kernel>], c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: `check` found R rows of C inside its slice.
    unsafe { prefetch::<R, V>(&c) };
    for pair in panels {
        let (a, b) = (pair.a.as_ptr(), pair.b.as_ptr());
        for p in (0..pair.k).step_by(2) {
            // SAFETY: p + 1 < k, which `check` found to be even; it found k · NR elements at b and R rows of k
            // elements, `a_stride` apart, at a. `__m512i` and `__m512bh` are both 512 bits without invalid values.
            unsafe {
                let b: [__m512bh; V] =
                    from_fn(|v| transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(p * NR + 32 * v).cast())));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let pair = a.add(i * a_stride::<bf16>() + p).cast::<i32>().read_unaligned();
                    let a = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = _mm512_dpbf16_ps(*sum, a, b);
                    }
                }
            }
        }
    }
    // SAFETY: `check` found R rows of `c.cols` columns inside C's slice, and `c.cols` ≤ 16 · V.
    unsafe { store(sums, c) }
}

/// Rounds a tile's sums.
///
/// # Safety
/// The CPU has AVX-512 F, BW and BF16; `rows` rows of `cols` ≤ NR values can be written at `out`, `stride` apart, and
/// read at `sums`, NR apart.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_tile(out: *mut bf16, stride: usize, sums: *const f32, rows: usize, cols: usize) {
    for row in 0..rows {
        // SAFETY: row < rows: `cols` values by this function's contract.
        unsafe { store_rounded(out.add(row * stride), sums.add(row * NR), cols) }
    }
}

/// Packs the rows of a column-major A, rounded to bf16, with zeros up to a multiple of 32 values.
fn pack_columns<E: Column>(_isa: Avx512Bf16, panel: &mut [bf16], a: Transposed<'_, E>) {
    let (rows, k) = (a.rows(), a.k());
    assert!(rows <= 16 && (rows == 0 || panel.len() >= (rows - 1) * a_stride::<bf16>() + k.next_multiple_of(32)));
    // SAFETY: the token proves AVX-512 F, BW, VL and BF16; the assert is the room that `run` asks for.
    unsafe { run(panel.as_mut_ptr(), a) }

    /// # Safety
    /// The CPU has AVX-512 F, BW, VL and BF16; `a` has at most 16 rows, and for each of them, `a_stride` apart, there
    /// is room for its values in whole vectors of 32.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn run<E: Column>(panel: *mut bf16, a: Transposed<'_, E>) {
        let (rows, k) = (a.rows(), a.k());
        for q in (0..k).step_by(32) {
            for (row, values) in a.pairs(0, q).into_iter().enumerate().take(rows) {
                // SAFETY: row < rows and q < k, a multiple of 32: inside the row's whole vectors.
                unsafe { _mm512_storeu_si512(panel.add(row * a_stride::<bf16>() + q).cast(), values) };
            }
        }
    }
}
