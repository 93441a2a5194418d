//! Softmax of rows, its gradient, and log Σ exp.
//!
//! ```text
//! p = exp(x − max x) / Σ exp(x − max x)          dx = p ∘ (dp − Σ p ∘ dp)
//! ```
//!
//! The row's maximum is subtracted first, so large values do not overflow. A row of −∞ becomes zeros; a NaN or +∞ makes
//! its whole row NaN. Sums run in 16 fixed lanes, so every instruction set gives the same bits.

use crate::error::{Error, exact};
use crate::isa::Isa;
use crate::math;
use crate::simd::reduce::{LANES, add_products, fold, max, sum};

/// Replaces each row of `x` [rows, cols] by its softmax.
///
/// Returns an error if `x` is not a whole number of rows.
pub fn softmax_rows(isa: Isa, x: &mut [f32], cols: usize) -> Result<(), Error> {
    whole_rows("x", x.len(), cols)?;
    isa.vectorize(
        #[inline(always)]
        || x.chunks_exact_mut(cols.max(1)).for_each(softmax_row),
    );
    Ok(())
}

/// Replaces `dp` [rows, cols], the gradient of the probabilities `p` [rows, cols], by the gradient of the logits.
///
/// Returns an error if `dp` is not a whole number of rows or `p` has another length.
pub fn softmax_backward_rows(isa: Isa, dp: &mut [f32], p: &[f32], cols: usize) -> Result<(), Error> {
    whole_rows("dp", dp.len(), cols)?;
    exact("p", dp.len(), p.len())?;
    isa.vectorize(
        #[inline(always)]
        || {
            for (dp, p) in dp.chunks_exact_mut(cols.max(1)).zip(p.chunks_exact(cols.max(1))) {
                softmax_backward_row(dp, p);
            }
        },
    );
    Ok(())
}

/// log Σ exp `x`; −∞ for an empty slice or one that holds only −∞.
pub fn log_sum_exp(isa: Isa, x: &[f32]) -> f32 {
    isa.vectorize(
        #[inline(always)]
        || {
            let max = max(x);
            if max == f32::NEG_INFINITY && !x.iter().any(|x| x.is_nan()) {
                return max;
            }
            let mut sums = [0.0; LANES];
            fold(&mut sums, x, |sum, x| *sum += math::exp(x - max));
            max + math::ln(sum(sums))
        },
    )
}

fn whole_rows(operand: &'static str, len: usize, cols: usize) -> Result<(), Error> {
    if len.is_multiple_of(cols.max(1)) && (cols > 0 || len == 0) {
        Ok(())
    } else {
        Err(Error::Block { operand, block: cols, got: len })
    }
}

/// [`softmax_rows`] for one row, to be inlined into a vectorized caller.
#[inline(always)]
pub(crate) fn softmax_row(x: &mut [f32]) {
    let max = max(x);
    if max == f32::NEG_INFINITY && !x.iter().any(|x| x.is_nan()) {
        x.fill(0.0);
        return;
    }
    for x in x.iter_mut() {
        *x = math::exp(*x - max);
    }
    let mut sums = [0.0; LANES];
    fold(&mut sums, x, |sum, x| *sum += x);
    let inverse = 1.0 / sum(sums);
    for x in x.iter_mut() {
        *x *= inverse;
    }
}

/// [`softmax_backward_rows`] for one row, to be inlined into a vectorized caller.
#[inline(always)]
pub(crate) fn softmax_backward_row(dp: &mut [f32], p: &[f32]) {
    let mut sums = [0.0; LANES];
    add_products(&mut sums, dp, p);
    let dot = sum(sums);
    for (dp, p) in dp.iter_mut().zip(p) {
        *dp = p * (*dp - dot);
    }
}
