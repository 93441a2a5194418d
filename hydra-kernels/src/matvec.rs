//! y = W x for one token, straight from the stored format. Memory bandwidth bounds it, so nothing is packed.
//!
//! With vectors, blocks are decoded in registers; otherwise a stretch of a row is decoded to the stack. A row's
//! result has the same bits whichever rows are computed with it.

#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
mod dot;

use crate::error::{Error, exact};
use crate::isa::Isa;
use crate::quant::Weight;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
use crate::simd::lanes::Lanes;
use crate::simd::reduce::{add_products, sum};

/// Partial sums of a portable row, independent of one another: as many as two 512-bit FMA units keep in flight.
const PARTIAL_SUMS: usize = 64;

/// Columns that a portable row decodes at a time: one super-block.
const STRETCH: usize = 256;

/// Rows computed together with AVX-512: enough sums to cover the latency of an FMA.
#[cfg(target_arch = "x86_64")]
const AVX512_ROWS: usize = 4;

/// Rows computed together with AVX2: their sums take eight of the sixteen registers.
#[cfg(target_arch = "x86_64")]
const AVX2_ROWS: usize = 4;

/// Rows computed together with NEON: their sums take sixteen of the 32 registers.
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
const NEON_ROWS: usize = 4;

/// `y[i]` = Σ_p W[first + i, p] · `x[p]`, with one element of `x` for each column of W.
///
/// Returns an error, and writes nothing, if `x` has another length or the rows do not exist.
pub fn matvec(isa: Isa, y: &mut [f32], weight: Weight<'_>, first: usize, x: &[f32]) -> Result<(), Error> {
    exact("x", weight.cols(), x.len())?;
    match first.checked_add(y.len()) {
        Some(end) if end <= weight.rows() => {}
        end => {
            let got = end.unwrap_or(usize::MAX);
            return Err(Error::Range { operand: "y", limit: weight.rows(), got });
        }
    }
    match isa {
        Isa::Portable => y.iter_mut().enumerate().for_each(|(i, y)| *y = portable_row(weight, first + i, x)),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(avx2) => {
            let (groups, rest, last) = groups::<AVX2_ROWS>(y, first);
            avx2.vectorize(
                #[inline(always)]
                || rows(avx2, groups, weight, first, x),
            );
            avx2.vectorize(
                #[inline(always)]
                || rows(avx2, rest, weight, last, x),
            );
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(avx512) => {
            let (groups, rest, last) = groups::<AVX512_ROWS>(y, first);
            avx512.vectorize(
                #[inline(always)]
                || rows(avx512, groups, weight, first, x),
            );
            avx512.vectorize(
                #[inline(always)]
                || rows(avx512, rest, weight, last, x),
            );
        }
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        Isa::Neon(neon) => {
            let (groups, rest, last) = groups::<NEON_ROWS>(y, first);
            neon.vectorize(
                #[inline(always)]
                || rows(neon, groups, weight, first, x),
            );
            neon.vectorize(
                #[inline(always)]
                || rows(neon, rest, weight, last, x),
            );
        }
    }
    Ok(())
}

/// `y` in groups of `R` rows, the rest one by one, and the row of W that the rest begins with.
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
fn groups<const R: usize>(y: &mut [f32], first: usize) -> (&mut [[f32; R]], &mut [[f32; 1]], usize) {
    let (groups, rest) = y.as_chunks_mut();
    let last = first + groups.len() * R;
    (groups, rest.as_chunks_mut().0, last)
}

/// Rows from `first` on, `R` at a time: they share the loads of x, and their sums are independent.
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
#[inline(always)]
fn rows<L: Lanes, const R: usize>(l: L, y: &mut [[f32; R]], weight: Weight<'_>, first: usize, x: &[f32]) {
    for (y, first) in y.iter_mut().zip((first..).step_by(R)) {
        let mut rows = [&[] as &[u8]; R];
        for (i, bytes) in rows.iter_mut().enumerate() {
            *bytes = weight.stored(first + i);
        }
        *y = dot::dots(l, weight.format(), rows, x);
    }
}

fn portable_row(weight: Weight<'_>, row: usize, x: &[f32]) -> f32 {
    let mut sums = [0.0; PARTIAL_SUMS];
    for (x, at) in x.chunks(STRETCH).zip((0..).step_by(STRETCH)) {
        let mut decoded = [0.0; STRETCH];
        let decoded = &mut decoded[..x.len()];
        weight.decode(row, at, decoded);
        add_products(&mut sums, decoded, x);
    }
    sum(sums)
}
