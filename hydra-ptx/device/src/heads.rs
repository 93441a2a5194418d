//! The norm of each head of the queries and keys, and its gradient. A warp has a head, a lane two neighbouring columns at
//! a time.

use crate::kernels::model::{HeadNormBackwardParams, HeadNormParams};
use crate::prelude::*;
use crate::sizes::THREADS;

/// A warp's head: `d` columns, an even number, from `first` on.
#[derive(Clone, Copy)]
struct Head {
    first: usize,
    d: u32,
}

impl Head {
    /// The head of this thread's warp, if there is one.
    #[inline(always)]
    fn of_warp(heads: u32, d: u32) -> Option<Self> {
        let head = block_x() * (THREADS / WARP) + warp();
        (head < heads).then_some(Self { first: head as usize * d as usize, d })
    }

    /// The same head in a matrix with `n_heads` heads in a row, and `pitch` elements from a row to the next.
    #[inline(always)]
    unsafe fn in_rows(self, n_heads: u32, pitch: u32) -> Self {
        assume(n_heads > 0);
        let number = block_x() * (THREADS / WARP) + warp();
        let (row, head) = ((number / n_heads) as usize, (number % n_heads) as usize);
        Self { first: row * pitch as usize + head * self.d as usize, ..self }
    }

    /// Columns 2i and 2i + 1.
    #[inline(always)]
    unsafe fn two(self, x: *const u16, i: u32) -> [f32; 2] {
        unpack2(load(x.add(self.first).cast::<u32>().add(i as usize)))
    }

    /// Writes columns 2i and 2i + 1.
    #[inline(always)]
    unsafe fn put(self, x: *mut u16, i: u32, [left, right]: [f32; 2]) {
        store(x.add(self.first).cast::<u32>().add(i as usize), pack_bf16(left, right));
    }

    /// Σ over the columns of `term` of each pair; all lanes get it.
    #[inline(always)]
    unsafe fn sum(self, term: impl Fn(u32, f32) -> f32) -> f32 {
        let (mut sum, mut i) = (0.0, lane());
        while 2 * i < self.d {
            sum = term(i, sum);
            i += WARP;
        }
        over_warp::<Sum>(sum)
    }

    /// 1/√(mean of x² + eps).
    #[inline(always)]
    unsafe fn inverse_rms(self, x: *const u16, eps: f32) -> f32 {
        let squares = self.sum(
            #[inline(always)]
            |i, sum| {
                let [left, right] = self.two(x, i);
                fma(right, right, fma(left, left, sum))
            },
        );
        1.0 / sqrt(squares / self.d as f32 + eps)
    }
}

/// Columns 2i and 2i + 1 of the weight.
#[inline(always)]
unsafe fn weights(weight: *const f32, i: u32) -> [f32; 2] {
    let at = weight.add(2 * i as usize);
    [load(at), load(at.add(1))]
}

/// y = x / √(mean of x² + eps) · weight. Grid: [heads / 8], 256 threads.
#[inline(always)]
pub unsafe fn head_norm(p: HeadNormParams) {
    let Some(head) = Head::of_warp(p.heads, p.d) else { return };
    let inverse = head.inverse_rms(p.x, p.eps);
    let mut i = lane();
    while 2 * i < p.d {
        let ([x0, x1], [w0, w1]) = (head.two(p.x, i), weights(p.weight, i));
        head.put(p.y, i, [x0 * inverse * w0, x1 * inverse * w1]);
        i += WARP;
    }
}

/// dx = r · (dy ∘ w − x · r² · mean(dy ∘ w ∘ x)), with r = 1/√(mean of x² + eps). Grid: [heads / 8], 256 threads.
#[inline(always)]
pub unsafe fn head_norm_backward(p: HeadNormBackwardParams) {
    let Some(head) = Head::of_warp(p.heads, p.d) else { return };
    let dx_head = head.in_rows(p.n_heads, p.pitch);
    let inverse = head.inverse_rms(p.x, p.eps);
    let scaled = |i: u32| {
        let ([d0, d1], [w0, w1]) = (dx_head.two(p.dx, i), weights(p.weight, i));
        [d0 * w0, d1 * w1]
    };
    let products = head.sum(
        #[inline(always)]
        |i, sum| {
            let ([d0, d1], [x0, x1]) = (scaled(i), head.two(p.x, i));
            fma(d1, x1, fma(d0, x0, sum))
        },
    );
    let along = inverse * inverse * (products / p.d as f32);
    let mut i = lane();
    while 2 * i < p.d {
        let ([d0, d1], [x0, x1]) = (scaled(i), head.two(p.x, i));
        dx_head.put(p.dx, i, [inverse * (d0 - x0 * along), inverse * (d1 - x1 * along)]);
        i += WARP;
    }
}
