//! Reductions in a fixed number of lanes, so that every instruction set sums in the same order.

/// Partial results of a reduction: one 512-bit register of f32.
pub(crate) const LANES: usize = 16;

/// The largest element of `x`; −∞ for an empty slice. NaNs are skipped.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    fold(&mut lanes, x, |max, x| *max = if x > *max { x } else { *max });
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Folds element i of `x` into lane i mod LANES with `step`.
#[inline(always)]
pub(crate) fn fold(lanes: &mut [f32; LANES], x: &[f32], step: impl Fn(&mut f32, f32)) {
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

/// Adds `a[i] · b[i]` to lane i mod LANES, for slices of one length.
#[inline(always)]
pub(crate) fn add_products<const LANES: usize>(lanes: &mut [f32; LANES], a: &[f32], b: &[f32]) {
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += a * b;
    }
}

/// The sum of the lanes, as a balanced tree.
#[inline(always)]
pub(crate) fn sum<const N: usize>(mut lanes: [f32; N]) -> f32 {
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
