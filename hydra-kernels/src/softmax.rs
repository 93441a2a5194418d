//! Softmax of rows, its gradient, and log Σ exp.
//!
//! ```text
//! p = exp(x − max x) / Σ exp(x − max x)          dx = p ∘ (dp − Σ p ∘ dp)
//! ```
//!
//! Large values are safe (nothing above exp 0 is taken). A row of −∞ becomes zeros; a NaN or +∞ makes its row NaN.
//! Sums run in 16 fixed lanes, so that every instruction set gives the same bits.

use crate::error::{Error, exact};
use crate::isa::Isa;
use crate::math;

/// Partial sums of a reduction: one 512-bit register.
const LANES: usize = 16;

/// Softmax of each row of `x` [rows, cols], in place.
pub fn softmax_rows(isa: Isa, x: &mut [f32], cols: usize) -> Result<(), Error> {
    whole_rows("x", x.len(), cols)?;
    isa.vectorize(
        #[inline(always)]
        || x.chunks_exact_mut(cols.max(1)).for_each(softmax_row),
    );
    Ok(())
}

/// `dp` [rows, cols] becomes dx, given the probabilities `p` [rows, cols].
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

/// log Σ exp `x`; −∞ for an empty row or one of −∞.
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
            max + math::ln(sum_lanes(sums))
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
    let inverse = 1.0 / sum_lanes(sums);
    for x in x.iter_mut() {
        *x *= inverse;
    }
}

#[inline(always)]
pub(crate) fn softmax_backward_row(dp: &mut [f32], p: &[f32]) {
    let mut sums = [0.0; LANES];
    let (dp_lanes, dp_rest) = dp.as_chunks::<LANES>();
    let (p_lanes, p_rest) = p.as_chunks::<LANES>();
    for (dp, p) in dp_lanes.iter().zip(p_lanes) {
        for ((sum, dp), p) in sums.iter_mut().zip(dp).zip(p) {
            *sum += dp * p;
        }
    }
    for ((sum, dp), p) in sums.iter_mut().zip(dp_rest).zip(p_rest) {
        *sum += dp * p;
    }
    let dot = sum_lanes(sums);
    for (dp, p) in dp.iter_mut().zip(p) {
        *dp = p * (*dp - dot);
    }
}

#[inline(always)]
fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    fold(&mut lanes, x, |max, x| *max = if x > *max { x } else { *max });
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Element i of `x` goes to lane i mod LANES.
#[inline(always)]
fn fold(lanes: &mut [f32; LANES], x: &[f32], step: impl Fn(&mut f32, f32)) {
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            step(lane, *x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        step(lane, *x);
    }
}

/// Σ of the lanes as a balanced tree.
#[inline(always)]
pub(crate) fn sum_lanes<const N: usize>(mut lanes: [f32; N]) -> f32 {
    const { assert!(N.is_power_of_two()) };
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}
