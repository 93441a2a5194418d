//! 12 × 32 micro-kernel for AVX-512 BF16: VDPBF16PS multiplies two neighbours along k and adds both to an f32.
//!
//! The instruction sums the pair with flush-to-zero and round-to-nearest whatever the mode.

use super::Values;
use super::avx512::{MR, NR, Tiles, prefetch, store, tiles, vectors};
use super::parts::Part;
use super::tiled::{CTile, Micro, Piece, a_stride, load};
use super::transpose::{Column, Transposed};
use crate::isa::{Avx512Bf16, Isa};
use core::arch::x86_64::*;
use core::array::from_fn;
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

    fn load(self, tile: &mut [bf16], part: &Part<'_, '_, bf16>, first_row: usize, rows: usize) {
        let a = part.a();
        let first = part.start(first_row);
        match (a.data, a.row_stride, a.col_stride) {
            (Values::F32(data), stride, 1) => {
                for (row, out) in tile.chunks_mut(a_stride::<bf16>()).enumerate().take(rows) {
                    narrow(self.0, &mut out[..part.len], &data[first + row * stride..][..part.len]);
                    out[part.len..part.depth].fill(bf16::ZERO);
                }
            }
            (Values::F32(data), 1, stride) => pairs_of_columns(self.0, tile, &data[first..], stride, rows, part.len),
            (Values::Bf16(data), 1, stride) if stride != 1 => {
                pairs_of_columns(self.0, tile, &data[first..], stride, rows, part.len);
            }
            _ => self.isa().vectorize(
                #[inline(always)]
                || load::<Self>(tile, part, first_row, rows),
            ),
        }
    }

    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>) {
        const TILES: Tiles<Avx512Pairs> = tiles!(tile 1 2 3 4 5 6 7 8 9 10 11 12);
        c.check(pieces);
        // SAFETY: `self` proves AVX-512 BF16; `check` is the bounds contract of the tile with `c.rows` rows and `c.cols` columns.
        unsafe { TILES[vectors(&c) - 1][c.rows - 1](pieces, c) }
    }

    fn round(self, c: &mut [bf16], stride: usize, sums: &[f32], cols: usize) {
        let rows = sums.len() / NR;
        assert!(rows > 0 && cols <= NR && c.len() >= (rows - 1) * stride + cols);
        // SAFETY: the token proves the features; the assert is the bounds.
        unsafe { round_tile(c.as_mut_ptr(), stride, sums.as_ptr(), rows, cols) }
    }
}

/// # Safety
/// AVX-512 BF16; `CTile::check` with R = `c.rows` and at most 16 · V columns.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile<const R: usize, const V: usize>(pieces: &[Piece<'_, Avx512Pairs>], c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: `check`: C's rows lie inside its slice; a prefetch reads nothing in any case.
    unsafe { prefetch::<R, V>(&c) };
    for piece in pieces {
        let (a, b) = (piece.a.as_ptr(), piece.b.as_ptr());
        for p in (0..piece.k).step_by(2) {
            // SAFETY: `check`: b has k · NR elements and a R rows of k, k even; 512 bits are 32 bf16, whatever they are called.
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
    // SAFETY: the same contract.
    unsafe { store(sums, c) }
}

/// # Safety
/// AVX-512 F, BW and BF16; `rows` rows of `cols` values at `out`, of NR at `sums`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_tile(out: *mut bf16, stride: usize, sums: *const f32, rows: usize, cols: usize) {
    for row in 0..rows {
        // SAFETY: the caller's contract.
        unsafe { store_rounded(out.add(row * stride), sums.add(row * NR), cols) }
    }
}

/// Rows of a transpose, `data[q · stride + row]`, as rows of a tile.
fn pairs_of_columns<E: Column>(_isa: Avx512Bf16, tile: &mut [bf16], data: &[E], stride: usize, rows: usize, k: usize) {
    let turned = Transposed::new(data, stride, rows, k);
    assert!(rows <= 16 && (rows == 0 || tile.len() >= (rows - 1) * a_stride::<bf16>() + k.next_multiple_of(32)));
    // SAFETY: the token proves the features; the assert is the room.
    unsafe { run(tile.as_mut_ptr(), turned, rows, k) }

    /// # Safety
    /// AVX-512 F, BW, VL and BF16; room for `k` values, in steps of 32, of each row.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn run<E: Column>(tile: *mut bf16, turned: Transposed<'_, E>, rows: usize, k: usize) {
        for q in (0..k).step_by(32) {
            // SAFETY: the caller's contract.
            unsafe {
                for (row, values) in turned.pairs(0, q).into_iter().enumerate().take(rows) {
                    _mm512_storeu_si512(tile.add(row * a_stride::<bf16>() + q).cast(), values);
                }
            }
        }
    }
}

/// `out` = `x` rounded, both of one length.
pub(super) fn narrow(_isa: Avx512Bf16, out: &mut [bf16], x: &[f32]) {
    assert_eq!(out.len(), x.len());
    // SAFETY: the token proves the features; the lengths are equal.
    unsafe { narrow_features(out, x) }
}

/// # Safety
/// AVX-512 F, BW and BF16; `out` is as long as `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn narrow_features(out: &mut [bf16], x: &[f32]) {
    for at in (0..x.len()).step_by(32) {
        // SAFETY: `left` values from `at` on are inside both slices.
        unsafe { store_rounded(out.as_mut_ptr().add(at), x.as_ptr().add(at), x.len() - at) }
    }
}

/// Up to 32 values.
///
/// # Safety
/// AVX-512 F, BW and BF16; min(`left`, 32) values at both places.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn store_rounded(out: *mut bf16, x: *const f32, left: usize) {
    // SAFETY: the masks admit only what the caller vouches for.
    unsafe {
        if left >= 32 {
            _mm512_storeu_si512(out.cast(), rounded(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16))));
        } else {
            let mask = (1u32 << left) - 1;
            let low = _mm512_maskz_loadu_ps(mask as u16, x);
            let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, x.wrapping_add(16));
            _mm512_mask_storeu_epi16(out.cast(), mask, rounded(low, high));
        }
    }
}

/// 32 values rounded, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: 512 bits are 32 bf16, whatever they are called.
    unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}
