//! y = W x for one token, straight from the stored format: bound by memory, so no panel is packed.
//!
//! With AVX2 or AVX-512 the blocks are turned into weights in registers; otherwise a stretch of a row is decoded to the
//! stack. Either way a row's result has the same bits whatever rows are computed with it.

#[cfg(target_arch = "x86_64")]
pub(crate) mod blocks;
#[cfg(target_arch = "x86_64")]
mod bytes;
#[cfg(target_arch = "x86_64")]
mod lanes;

use crate::error::{Error, exact};
use crate::isa::Isa;
use crate::quant::Weight;

/// Independent partial sums: enough to keep two 512-bit FMA pipes busy, and the same on every instruction set.
const LANES: usize = 64;

/// Columns decoded at a time: a super-block.
const STRETCH: usize = 256;

/// Rows together on AVX-512: as many sums as cover the latency of an FMA.
#[cfg(target_arch = "x86_64")]
const AVX512_ROWS: usize = 4;

/// On AVX2: four sums of two registers leave eight of sixteen for the rest.
#[cfg(target_arch = "x86_64")]
const AVX2_ROWS: usize = 4;

/// `y[i]` = Σ_p W[first + i, p] · `x[p]`, with `x` [W's columns].
///
/// Writes nothing if it returns an error.
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
        Isa::Portable => y.iter_mut().enumerate().for_each(|(i, y)| *y = row(weight, first + i, x)),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(avx2) => avx2.vectorize(
            #[inline(always)]
            || from_blocks::<_, AVX2_ROWS>(avx2, y, weight, first, x),
        ),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(avx512) => avx512.vectorize(
            #[inline(always)]
            || from_blocks::<_, AVX512_ROWS>(avx512, y, weight, first, x),
        ),
    }
    Ok(())
}

/// Rows `first ..`, `R` at a time: they share the loads of x, and their sums are independent.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn from_blocks<L: lanes::Lanes, const R: usize>(l: L, y: &mut [f32], weight: Weight<'_>, first: usize, x: &[f32]) {
    let format = weight.format();
    let (groups, rest) = y.as_chunks_mut::<R>();
    let mut row = first;
    for y in groups {
        let mut rows = [&[] as &[u8]; R];
        for (i, bytes) in rows.iter_mut().enumerate() {
            *bytes = weight.stored(row + i);
        }
        *y = blocks::dots(l, format, rows, x);
        row += R;
    }
    for y in rest {
        [*y] = blocks::dots(l, format, [weight.stored(row)], x);
        row += 1;
    }
}

fn row(weight: Weight<'_>, row: usize, x: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    for (x, at) in x.chunks(STRETCH).zip((0..).step_by(STRETCH)) {
        let mut decoded = [0.0; STRETCH];
        weight.decode(row, at, &mut decoded[..x.len()]);
        let (w_lanes, _) = decoded.as_chunks::<LANES>();
        let (x_lanes, x_rest) = x.as_chunks::<LANES>();
        for (w, x) in w_lanes.iter().zip(x_lanes) {
            for ((sum, w), x) in sums.iter_mut().zip(w).zip(x) {
                *sum += w * x;
            }
        }
        let w_rest = &decoded[x.len() - x_rest.len()..];
        for ((sum, w), x) in sums.iter_mut().zip(w_rest).zip(x_rest) {
            *sum += w * x;
        }
    }
    crate::softmax::sum_lanes(sums)
}
