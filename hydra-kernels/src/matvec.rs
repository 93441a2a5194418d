//! y = W x for one token, straight from the stored format: bound by memory, so no panel is packed.

use crate::error::{Error, exact};
use crate::isa::Isa;
use crate::quant::Weight;

/// Independent partial sums: enough to keep two 512-bit FMA pipes busy, and the same on every instruction set.
const LANES: usize = 64;

/// Columns decoded at a time: a super-block.
const STRETCH: usize = 256;

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
    isa.vectorize(
        #[inline(always)]
        || {
            for (i, y) in y.iter_mut().enumerate() {
                *y = row(weight, first + i, x);
            }
        },
    );
    Ok(())
}

#[inline(always)]
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
