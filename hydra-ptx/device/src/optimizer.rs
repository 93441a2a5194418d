//! AdamW, and sums of squares in a fixed order.

use crate::prelude::*;
use crate::sizes::{SQUARES_PER_BLOCK, THREADS};

/// The sum over a block of 256 threads, for thread 0; by halves, always in the same order.
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

kernels! {
    /// parts[block] = Σ x² over the block's 16 Ki values. Grid: [len / 16 Ki], 256 threads.
    fn squares(parts: *mut f64, x: *const f32, len: u64) {
        let first = block_x() as u64 * SQUARES_PER_BLOCK as u64;
        let end = (first + SQUARES_PER_BLOCK as u64).min(len);
        let (mut sum, mut i) = (0.0, first + thread() as u64);
        while i < end {
            let value = f64::from(load(x.add(i as usize)));
            sum += value * value;
            i += THREADS as u64;
        }
        let total = block_total(sum);
        if thread() == 0 {
            store(parts.add(block_x() as usize), total);
        }
    }

    /// out = Σ parts. One block of 256 threads.
    fn squares_total(out: *mut f64, parts: *const f64, count: u32) {
        let (mut sum, mut i) = (0.0, thread());
        while i < count {
            sum += load(parts.add(i as usize));
            i += THREADS;
        }
        let total = block_total(sum);
        if thread() == 0 {
            store(out, total);
        }
    }

    /// One step of AdamW: `step` = lr / (1 − β₁ᵗ), `root` = √(1 − β₂ᵗ), `keep` = 1 − lr · weight decay. Grid: [len / 256], 256
    /// threads.
    fn adamw(
        params: *mut f32,
        m: *mut f32,
        v: *mut f32,
        grads: *const f32,
        len: u64,
        beta1: f32,
        beta2: f32,
        eps: f32,
        keep: f32,
        step: f32,
        root: f32,
        grad_scale: f32,
    ) {
        let i = block_x() as u64 * THREADS as u64 + thread() as u64;
        if i >= len {
            return;
        }
        let i = i as usize;
        let g = load(grads.add(i)) * grad_scale;
        let first = beta1 * load(m.add(i)) + (1.0 - beta1) * g;
        let second = beta2 * load(v.add(i)) + (1.0 - beta2) * g * g;
        store(m.add(i), first);
        store(v.add(i), second);
        store(params.add(i), load(params.add(i)) * keep - step * first / (sqrt(second) / root + eps));
    }
}
