//! y = W x for one token or a few, straight from the stored format. Memory bandwidth bounds it, so nothing is packed.
//!
//! With vectors, blocks are decoded in registers; otherwise a stretch of a row is decoded to the stack. A row's
//! result for a token has the same bits whichever rows and tokens are computed with it.

#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
mod dot;

use crate::error::{Error, exact, product};
use crate::isa::Isa;
use crate::quant::Weight;
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

/// Tokens that [`matvec_batch`] decodes a weight for at a time: with four rows, half of AVX-512's registers hold sums.
const TOKENS: usize = 4;

/// Rows that [`matvec_batch`] computes for all tokens before it goes on: they stay in L1.
const BATCH_ROWS: usize = 4;

/// `y[i]` = Σ_p W[first + i, p] · `x[p]`, with one element of `x` for each column of W.
///
/// Returns an error, and writes nothing, if `x` has another length or the rows do not exist.
pub fn matvec(isa: Isa, y: &mut [f32], weight: Weight<'_>, first: usize, x: &[f32]) -> Result<(), Error> {
    exact("x", weight.cols(), x.len())?;
    inside(weight, first, y.len())?;
    match isa {
        Isa::Portable => y.iter_mut().enumerate().for_each(|(i, y)| [*y] = portable_row(weight, first + i, [x])),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(avx2) => {
            let (groups, rest, last) = groups::<AVX2_ROWS>(y, first);
            dot::rows(avx2, groups, weight, first, [x]);
            dot::rows(avx2, rest, weight, last, [x]);
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(avx512) => {
            let (groups, rest, last) = groups::<AVX512_ROWS>(y, first);
            dot::rows(avx512, groups, weight, first, [x]);
            dot::rows(avx512, rest, weight, last, [x]);
        }
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        Isa::Neon(neon) => {
            let (groups, rest, last) = groups::<NEON_ROWS>(y, first);
            dot::rows(neon, groups, weight, first, [x]);
            dot::rows(neon, rest, weight, last, [x]);
        }
    }
    Ok(())
}

/// [`matvec`] of each of `tokens` rows of `x` [tokens, columns of W], bit for bit: `y` [tokens, rows] = the rows of
/// W xᵀ from `first` on, transposed.
///
/// Each weight is read from memory once, and decoded once for four tokens. Returns an error, and writes nothing, if the
/// lengths don't fit together or the rows do not exist.
pub fn matvec_batch(
    isa: Isa,
    y: &mut [f32],
    tokens: usize,
    weight: Weight<'_>,
    first: usize,
    x: &[f32],
) -> Result<(), Error> {
    let (cols, rows) = (weight.cols(), y.len() / tokens.max(1));
    exact("x", product(tokens, cols)?, x.len())?;
    exact("y", tokens * rows, y.len())?;
    inside(weight, first, rows)?;
    if tokens == 1 {
        return matvec(isa, y, weight, first, x);
    }
    let token = |t: usize| &x[t * cols..(t + 1) * cols];
    for row in (0..rows).step_by(BATCH_ROWS) {
        let count = BATCH_ROWS.min(rows - row);
        for t in (0..tokens).step_by(TOKENS) {
            if t + 1 == tokens {
                matvec(isa, &mut y[t * rows + row..][..count], weight, first + row, token(t))?;
                continue;
            }
            // In the place of tokens that there are not, the last one again.
            let x = core::array::from_fn(|i| token((t + i).min(tokens - 1)));
            let mut tile = [[0.0; TOKENS]; BATCH_ROWS];
            fill_tile(isa, &mut tile[..count], weight, first + row, x);
            for (y, i) in y.chunks_exact_mut(rows).skip(t).zip(0..TOKENS) {
                y[row..row + count].iter_mut().zip(&tile).for_each(|(y, sums)| *y = sums[i]);
            }
        }
    }
    Ok(())
}

/// An error unless W has rows `first .. first + rows`.
fn inside(weight: Weight<'_>, first: usize, rows: usize) -> Result<(), Error> {
    match first.checked_add(rows) {
        Some(end) if end <= weight.rows() => Ok(()),
        end => Err(Error::Range { operand: "y", limit: weight.rows(), got: end.unwrap_or(usize::MAX) }),
    }
}

/// The rows from `first` on, at most [`BATCH_ROWS`], for `TOKENS` tokens.
fn fill_tile(isa: Isa, tile: &mut [[f32; TOKENS]], weight: Weight<'_>, first: usize, x: [&[f32]; TOKENS]) {
    match isa {
        Isa::Portable => {
            tile.iter_mut().enumerate().for_each(|(i, sums)| *sums = portable_row(weight, first + i, x));
        }
        // The sums of one row take eight of the sixteen registers.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(avx2) => dot::rows(avx2, tile.as_chunks_mut::<1>().0, weight, first, x),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(avx512) if tile.len() == BATCH_ROWS => {
            dot::rows(avx512, tile.as_chunks_mut::<BATCH_ROWS>().0, weight, first, x)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(avx512) => dot::rows(avx512, tile.as_chunks_mut::<1>().0, weight, first, x),
        // The sums of one row take sixteen of the 32 registers.
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        Isa::Neon(neon) => dot::rows(neon, tile.as_chunks_mut::<1>().0, weight, first, x),
    }
}

/// Some rows' results for each of some tokens.
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
type Tile<const R: usize, const T: usize> = [[f32; T]; R];

/// `y` in groups of `R` rows, the rest one by one, and the row of W that the rest begins with.
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
fn groups<const R: usize>(y: &mut [f32], first: usize) -> (&mut [Tile<R, 1>], &mut [Tile<1, 1>], usize) {
    let (groups, rest) = y.as_chunks_mut().0.as_chunks_mut();
    let last = first + groups.len() * R;
    (groups, rest.as_chunks_mut().0, last)
}

fn portable_row<const T: usize>(weight: Weight<'_>, row: usize, x: [&[f32]; T]) -> [f32; T] {
    let mut sums = [[0.0; PARTIAL_SUMS]; T];
    for at in (0..weight.cols()).step_by(STRETCH) {
        let end = weight.cols().min(at + STRETCH);
        let mut decoded = [0.0; STRETCH];
        let decoded = &mut decoded[..end - at];
        weight.decode(row, at, decoded);
        for (sums, x) in sums.iter_mut().zip(x) {
            add_products(sums, decoded, &x[at..end]);
        }
    }
    sums.map(sum)
}
