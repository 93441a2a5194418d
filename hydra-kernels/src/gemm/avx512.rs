//! 12 × 32 micro-kernels for AVX-512: 24 accumulators, two vectors of B (four for bf16) and a broadcast of A, of 32 registers.
//!
//! f32 as it is; bf16 widened: a pair of neighbours along k is one 32-bit lane whose halves, moved up, are f32.

use super::convert::Held;
use super::parts::Part;
use super::tiled::{CTile, Micro, Piece, a_stride, load};
use super::transpose::{Column, Transposed};
use super::{Accumulate, Values};
use crate::isa::{Avx512, Isa};
use core::arch::x86_64::*;
use core::array::from_fn;
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

    fn load(self, tile: &mut [f32], part: &Part<'_, '_, f32>, first_row: usize, rows: usize) {
        load_floats::<Self>(self.0, tile, part, first_row, rows);
    }

    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>) {
        const TILES: Tiles<Avx512F32> = tiles!(f32_tile 1 2 3 4 5 6 7 8 9 10 11 12);
        c.check(pieces);
        // SAFETY: `self` proves AVX-512; `check` is the bounds contract of the tile with `c.rows` rows and `c.cols` columns.
        unsafe { TILES[vectors(&c) - 1][c.rows - 1](pieces, c) }
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

    fn load(self, tile: &mut [f32], part: &Part<'_, '_, bf16>, first_row: usize, rows: usize) {
        load_floats::<Self>(self.0, tile, part, first_row, rows);
    }

    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>) {
        const TILES: Tiles<Avx512Widened> = tiles!(bf16_tile 1 2 3 4 5 6 7 8 9 10 11 12);
        c.check(pieces);
        // SAFETY: `self` proves AVX-512; `check` is the bounds contract of the tile with `c.rows` rows and `c.cols` columns.
        unsafe { TILES[vectors(&c) - 1][c.rows - 1](pieces, c) }
    }
}

/// # Safety
/// AVX-512; `CTile::check` with R = `c.rows` and at most 16 · V columns.
#[target_feature(enable = "avx512f")]
unsafe fn f32_tile<const R: usize, const V: usize>(pieces: &[Piece<'_, Avx512F32>], c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: `check`: C's rows lie inside its slice; a prefetch reads nothing in any case.
    unsafe { prefetch::<R, V>(&c) };
    for piece in pieces {
        let (a, b) = (piece.a.as_ptr(), piece.b.as_ptr());
        for p in 0..piece.k {
            // SAFETY: `check`: b has k · NR elements and a R rows of k.
            unsafe {
                // From L2, where the machine's own prefetching comes late: 6 %.
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
    // SAFETY: the same contract.
    unsafe { store(sums, c) }
}

/// # Safety
/// AVX-512; `CTile::check` with R = `c.rows` and at most 16 · V columns.
#[target_feature(enable = "avx512f")]
unsafe fn bf16_tile<const R: usize, const V: usize>(pieces: &[Piece<'_, Avx512Widened>], c: CTile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    // SAFETY: `check`: C's rows lie inside its slice; a prefetch reads nothing in any case.
    unsafe { prefetch::<R, V>(&c) };
    for piece in pieces {
        let (a, b) = (piece.a.as_ptr(), piece.b.as_ptr());
        for p in (0..piece.k).step_by(2) {
            // SAFETY: `check`: b has k · NR elements and a R rows of k; k is even.
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
    // SAFETY: the same contract.
    unsafe { store(sums, c) }
}

/// [`Micro::load`]: a transpose by sixteen rows at a time.
fn load_floats<K: Micro<A = f32>>(
    isa: Avx512,
    tile: &mut [f32],
    part: &Part<'_, '_, K::E>,
    first_row: usize,
    rows: usize,
) where
    f32: Held<K::E>,
{
    let a = part.a();
    let first = part.start(first_row);
    match (a.data, a.row_stride) {
        (Values::F32(data), 1) if a.col_stride != 1 => {
            floats_of_columns(isa, tile, &data[first..], a.col_stride, rows, part.len);
            if size_of::<K::E>() < size_of::<f32>() {
                let rows = tile.chunks_mut(a_stride::<f32>()).take(rows);
                isa.vectorize(
                    #[inline(always)]
                    || rows.for_each(|row| row[..part.len].iter_mut().for_each(|a| *a = Held::<K::E>::of_f32(*a))),
                );
            }
        }
        (Values::Bf16(data), 1) if a.col_stride != 1 => {
            floats_of_columns(isa, tile, &data[first..], a.col_stride, rows, part.len);
        }
        _ => isa.vectorize(
            #[inline(always)]
            || load::<K>(tile, part, first_row, rows),
        ),
    }
}

/// Rows of a transpose, `data[q · stride + row]`, as rows of a tile.
fn floats_of_columns<E: Column>(_isa: Avx512, tile: &mut [f32], data: &[E], stride: usize, rows: usize, k: usize) {
    let turned = Transposed::new(data, stride, rows, k);
    assert!(rows <= 16 && (rows == 0 || tile.len() >= (rows - 1) * a_stride::<f32>() + k.next_multiple_of(16)));
    // SAFETY: the token proves the features; the assert is the room.
    unsafe { run(tile.as_mut_ptr(), turned, rows, k) }

    /// # Safety
    /// AVX-512 F, BW and VL; room for `k` values, in steps of 16, of each row.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn run<E: Column>(tile: *mut f32, turned: Transposed<'_, E>, rows: usize, k: usize) {
        for q in (0..k).step_by(16) {
            // SAFETY: the caller's contract.
            unsafe {
                for (row, values) in turned.floats(0, q).into_iter().enumerate().take(rows) {
                    _mm512_storeu_si512(tile.add(row * a_stride::<f32>() + q).cast(), values);
                }
            }
        }
    }
}

/// Vectors of a tile's columns: of few, only the first of two is computed.
pub(super) fn vectors(c: &CTile<'_>) -> usize {
    c.cols.div_ceil(16)
}

/// `tiles[vectors - 1][rows - 1]`.
pub(super) type Tiles<K> = [[unsafe fn(&[Piece<'_, K>], CTile<'_>); MR]; 2];

macro_rules! tiles {
    ($tile:ident $($rows:literal)*) => {
        [[$($tile::<$rows, 1>),*], [$($tile::<$rows, 2>),*]]
    };
}
pub(super) use tiles;

/// Fetches the tile of C while its sums are computed.
///
/// # Safety
/// R rows of `c` lie inside its slice.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn prefetch<const R: usize, const V: usize>(c: &CTile<'_>) {
    for i in 0..R {
        // SAFETY: row i's first element is inside the slice.
        let row = unsafe { c.data.as_ptr().add(i * c.stride) };
        for v in 0..V {
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(16 * v).cast());
        }
    }
}

/// # Safety
/// AVX-512; R rows of `c.cols` ≤ 16 · V columns lie inside `c`'s slice.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store<const R: usize, const V: usize>(sums: [[__m512; V]; R], c: CTile<'_>) {
    let columns = u32::MAX >> (NR - c.cols);
    let masks = [columns as u16, (columns >> 16) as u16];
    for (i, sums) in sums.into_iter().enumerate() {
        for (v, mut sum) in sums.into_iter().enumerate() {
            // `wrapping_add`: with few columns the second vector may begin beyond the slice, all masked out.
            let at = c.data.as_mut_ptr().wrapping_add(i * c.stride + 16 * v);
            // SAFETY: the masks admit only columns below `c.cols`.
            unsafe {
                if c.store == Accumulate::Add {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[v], at), sum);
                }
                _mm512_mask_storeu_ps(at, masks[v], sum);
            }
        }
    }
}
