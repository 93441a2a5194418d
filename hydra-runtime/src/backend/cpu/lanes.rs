//! Reductions over 16 lanes, which vectorise, in an order that is always the same.

use super::buffer::Element;

/// Values of f32 in the widest vector, AVX-512's.
pub(super) const LANES: usize = 16;

/// `x` = exp(x − max), and their sum in 16 lanes.
#[inline(always)]
pub(super) fn exponentials<E: Element>(x: &mut [f32], max: f32) -> f32 {
    let mut acc = [0.0; LANES];
    let (whole, rest) = x.as_chunks_mut::<LANES>();
    for x in whole {
        for (acc, x) in acc.iter_mut().zip(x) {
            *x = E::exp(*x - max);
            *acc += *x;
        }
    }
    for (acc, x) in acc.iter_mut().zip(rest) {
        *x = E::exp(*x - max);
        *acc += *x;
    }
    tree(acc, |a, b| a + b)
}

/// The larger of two numbers; `f32::max` also has to look for NaN.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// A reduction over 16 lanes that all begin with `start`, so that it vectorises; the order is fixed.
#[inline(always)]
pub(super) fn lanes(x: &[f32], start: f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [start; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for (acc, &x) in acc.iter_mut().zip(x) {
            *acc = join(*acc, x);
        }
    }
    for (acc, &x) in acc.iter_mut().zip(rest) {
        *acc = join(*acc, x);
    }
    tree(acc, join)
}

/// Σ a · b in 16 lanes.
#[inline(always)]
pub(super) fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    let mut acc = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            acc[i] += a[i].widen() * b[i].widen();
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a.widen() * b.widen()).sum();
    tree(acc, |a, b| a + b) + rest
}

/// Σ a · b · c.
#[inline(always)]
pub(super) fn dot3<A: Element, B: Element>(a: &[A], b: &[B], c: &[f32]) -> f32 {
    let mut acc = [0.0; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let (c, c_rest) = c.as_chunks::<LANES>();
    let rest: f32 = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| a.widen() * b.widen() * c).sum();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            acc[i] += a[i].widen() * b[i].widen() * c[i];
        }
    }
    tree(acc, |a, b| a + b) + rest
}

/// Σ x² in f64.
#[inline(always)]
pub(super) fn squares(x: &[f32]) -> f64 {
    let mut acc = [0.0; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for (acc, &x) in acc.iter_mut().zip(x) {
            *acc += f64::from(x) * f64::from(x);
        }
    }
    let rest: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    tree(acc, |a, b| a + b) + rest
}

/// Lanes joined in pairs, the two halves of what is left each time. Written out, or the compiler makes loops of it.
#[inline(always)]
fn tree<T: Copy>(x: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let x: [T; 8] = core::array::from_fn(
        #[inline(always)]
        |i| join(x[i], x[i + 8]),
    );
    let x: [T; 4] = core::array::from_fn(
        #[inline(always)]
        |i| join(x[i], x[i + 4]),
    );
    join(join(x[0], x[2]), join(x[1], x[3]))
}
