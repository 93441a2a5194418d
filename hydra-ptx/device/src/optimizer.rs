//! AdamW, and sums of squares in a fixed order.

use crate::kernels::model::{AdamWParams, SquaresParams, SquaresTotalParams};
use crate::prelude::*;
use crate::sizes::{SQUARES_PER_BLOCK, THREADS};

/// The sum over a block of 256 threads, returned to thread 0. It halves the number of values in each step, so the order
/// is fixed.
#[inline(always)]
pub unsafe fn block_total(sum: f64) -> f64 {
    st_f64(shared() + 8 * thread(), sum);
    let mut half = THREADS / 2;
    while half > 0 {
        barrier();
        if thread() < half {
            let own = shared() + 8 * thread();
            st_f64(own, ld_f64(own) + ld_f64(own + 8 * half));
        }
        half /= 2;
    }
    ld_f64(shared() + 8 * thread())
}

/// parts[block] = Σ x² over the block's 16 Ki values. Grid: [len / 16 Ki], 256 threads.
#[inline(always)]
pub unsafe fn squares(p: SquaresParams) {
    let first = block_x() as u64 * SQUARES_PER_BLOCK as u64;
    let end = (first + SQUARES_PER_BLOCK as u64).min(p.len);
    let (mut sum, mut i) = (0.0, first + thread() as u64);
    while i < end {
        let value = f64::from(load(p.x.add(i as usize)));
        sum += value * value;
        i += THREADS as u64;
    }
    let total = block_total(sum);
    if thread() == 0 {
        store(p.parts.add(block_x() as usize), total);
    }
}

/// out = Σ parts. One block of 256 threads.
#[inline(always)]
pub unsafe fn squares_total(p: SquaresTotalParams) {
    let (mut sum, mut i) = (0.0, thread());
    while i < p.count {
        sum += load(p.parts.add(i as usize));
        i += THREADS;
    }
    let total = block_total(sum);
    if thread() == 0 {
        store(p.out, total);
    }
}

/// One step of AdamW. Grid: [len / 256], 256 threads.
#[inline(always)]
pub unsafe fn adamw(p: AdamWParams) {
    let i = block_x() as u64 * THREADS as u64 + thread() as u64;
    if i >= p.len {
        return;
    }
    let i = i as usize;
    let g = load(p.grads.add(i)) * p.grad_scale;
    let first = p.beta1 * load(p.m.add(i)) + (1.0 - p.beta1) * g;
    let second = p.beta2 * load(p.v.add(i)) + (1.0 - p.beta2) * g * g;
    store(p.m.add(i), first);
    store(p.v.add(i), second);
    store(p.params.add(i), load(p.params.add(i)) * p.keep - p.step * first / (sqrt(second) / p.root + p.eps));
}
