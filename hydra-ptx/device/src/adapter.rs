//! The adapter for many tokens: x [A; R]ᵀ and the gate, dy B and the gate's gradient, and the weight gradients.
//!
//! [A; R] is split into two parts of bf16, s = h + l, and the product is x h + x l (relative error 2⁻¹⁷), because the
//! router is sensitive to rounding.

use crate::gate::{Adapter, mix, mix_backward};
use crate::kernels::adapter::{
    DroppedDxParams, LoraDownParams, LoraUpBackwardParams, SplitParams, WeightGradParams, WeightGradTotalParams,
};
use crate::mask::Mask;
use crate::prelude::*;
use crate::product::Operand;
use crate::rows::{Output, load_eight};
use crate::sizes::{DROPPED_TOKENS, SKINNY, SKINNY_DEPTH, THREADS};
use crate::skinny::{Side, SkinnyProduct, each};

/// `out` [rows, 2 half] = h | l in bf16, where x [rows, width] = h + l to 2⁻¹⁷; half is the width, rounded up to a
/// multiple of 128, and filled up with zeros. Grid: [rows · half / 8 / 256], 256 threads.
#[inline(always)]
pub unsafe fn split(p: SplitParams) {
    let half = p.width.next_multiple_of(SKINNY_DEPTH);
    let chunks = half / 8;
    assume(chunks > 0);
    let i = block_x() * THREADS + thread();
    let (row, column) = (i / chunks, i % chunks * 8);
    if row >= p.rows {
        return;
    }
    let values = load_eight(p.x, row, column, p.width);
    let (high, mut rest) = (pack8(values), [0.0; 8]);
    for i in 0..8 {
        rest[i] = values[i] - from_bf16((high[i / 2] >> (i % 2 * 16)) as u16);
    }
    let to = p.out.add(row as usize * 2 * half as usize + column as usize);
    store(to.cast(), U4(high));
    store(to.add(half as usize).cast(), U4(pack8(rest)));
}

impl LoraDownParams {
    #[inline(always)]
    fn adapter(&self) -> Adapter {
        let &Self { a_rows, lora_heads, rank, per_head_a, gate, labels, inverse_temperature, top_k, .. } = self;
        let head_dropout = Mask { seed: self.head_seed, threshold: self.head_threshold, scale: self.head_keep_scale };
        Adapter { a_rows, lora_heads, rank, per_head_a, gate, labels, inverse_temperature, top_k, head_dropout }
    }
}

/// `adapter_state` = [D(x) Aᵀ | gate(x Rᵀ)] and the operand `mixed` = scale · H(gate ∘ lora_down), where D and H are
/// dropout of x and of the heads. [A; R] is as [`split`] writes it. Grid: [tokens / 32], 256 threads.
#[inline(always)]
pub unsafe fn lora_down(p: LoraDownParams) {
    let (adapter, rows) = (p.adapter(), p.stacked_rows);
    let mask = Mask { seed: p.seed, threshold: p.threshold, scale: p.keep_scale };
    let first = block_x() * SKINNY;
    let count = (p.tokens - first).min(SKINNY);
    let mut row0 = 0;
    while row0 < rows {
        let a = Operand::new(p.a, rows, 2 * p.d_in.next_multiple_of(SKINNY_DEPTH));
        let (x, s) = (Side::<true>(Operand::new(p.x, p.tokens, p.d_in)), Side::<true>(a));
        let product = SkinnyProduct::new((x, s), (first, row0), (0, p.d_in), true, mask);
        let acc = product.run(|j| row0 + j < p.a_rows);
        each(acc, count, rows - row0, |t, j, value| {
            let at = (first + t) as usize * adapter.state_width() as usize + (row0 + j) as usize;
            store(p.adapter_state.add(at), value);
        });
        row0 += SKINNY;
    }
    barrier();
    mix(adapter, p.adapter_state, p.mixed, p.scale, first, first + count);
}

impl LoraUpBackwardParams {
    #[inline(always)]
    fn adapter(&self) -> Adapter {
        let &Self { a_rows, lora_heads, rank, per_head_a, gate, inverse_temperature, .. } = self;
        let head_dropout = Mask { seed: self.head_seed, threshold: self.head_threshold, scale: self.head_keep_scale };
        // The gradient reads the gate itself, and so needs neither labels nor K.
        let (labels, top_k) = (core::ptr::null(), lora_heads);
        Adapter { a_rows, lora_heads, rank, per_head_a, gate, labels, inverse_temperature, top_k, head_dropout }
    }
}

/// The gradient of what follows [`lora_down`]'s product: `d_mixed` = scale · H(dy B), and from it [d lora_down | d
/// logits] in its three forms. Grid: [tokens / 32], 256 threads.
#[inline(always)]
pub unsafe fn lora_up_backward(p: LoraUpBackwardParams) {
    let (adapter, rows) = (p.adapter(), p.stacked_rows);
    let first = block_x() * SKINNY;
    let count = (p.tokens - first).min(SKINNY);
    let width = adapter.mixed_width();
    let mut column0 = 0;
    while column0 < width {
        let x = Side::<true>(Operand::new(p.dy, p.tokens, p.d_out));
        let s = Side::<false>(Operand::new(p.b, p.d_out, width));
        let product = SkinnyProduct::new((x, s), (first, column0), (0, p.d_out), false, Mask::NONE);
        let acc = product.run(|_| false);
        each(acc, count, width - column0, |t, j, value| {
            let to = p.d_mixed.add((first + t) as usize * width as usize + (column0 + j) as usize);
            store(to, adapter.dropped(p.scale * value, first + t, column0 + j));
        });
        column0 += SKINNY;
    }
    barrier();
    mix_backward(adapter, &p, first, count);
    barrier();
    let pitch = padded(rows);
    assume(pitch > 0);
    let mut i = thread();
    while i < count * pitch {
        let (t, column) = ((first + i / pitch) as usize, i % pitch);
        let from = p.d_adapter_state.add(t * adapter.state_width() as usize + column as usize);
        let value = if column < rows { to_bf16(load(from)) } else { 0 };
        let at = t * pitch as usize + column as usize;
        store(p.d_adapter_state_bf16.add(at), value);
        if !p.d_router_bf16.is_null() {
            store(p.d_router_bf16.add(at), if column < p.a_rows { 0 } else { value });
        }
        i += THREADS;
    }
}

/// A weight gradient; with more than one part, its sums go to `parts`, for [`weight_grad_total`]. Grid: [columns / 32,
/// rows / 32 · parts], 256 threads.
#[inline(always)]
pub unsafe fn weight_grad(p: WeightGradParams) {
    let mask = Mask { seed: p.seed, threshold: p.threshold, scale: p.keep_scale };
    let tiles = p.rows.div_ceil(SKINNY);
    assume(tiles > 0);
    let (part, c0, j0) = (block_y() / tiles, block_x() * SKINNY, block_y() % tiles * SKINNY);
    let k = (part * p.part_tokens, p.tokens.min(part * p.part_tokens + p.part_tokens));
    let x = Side::<false>(Operand::new(p.wide, p.tokens, p.columns));
    let s = Side::<false>(Operand::new(p.narrow, p.tokens, p.rows));
    let acc = SkinnyProduct::new((x, s), (c0, j0), k, false, mask).run(|j| j0 + j < p.a_rows);
    each(acc, p.columns - c0, p.rows - j0, |c, j, value| {
        let (c, j) = ((c0 + c) as usize, (j0 + j) as usize);
        if p.part_tokens < p.tokens {
            store(p.parts.add((part as usize * p.columns as usize + c) * p.rows as usize + j), value);
        } else {
            let to = p.out.add(c * p.c_stride as usize + j * p.j_stride as usize);
            store(to, load(to) + p.scale * value);
        }
    });
}

/// Adds the parts of a weight gradient. Grid: [columns · rows / 256], 256 threads.
#[inline(always)]
pub unsafe fn weight_grad_total(p: WeightGradTotalParams) {
    assume(p.rows > 0);
    let i = block_x() * THREADS + thread();
    let (c, j) = (i / p.rows, i % p.rows);
    if c >= p.columns {
        return;
    }
    let (mut sum, mut part) = (0.0, 0);
    while part < p.count {
        let at = (part as usize * p.columns as usize + c as usize) * p.rows as usize + j as usize;
        sum += load(p.parts.add(at));
        part += 1;
    }
    let to = p.out.add(c as usize * p.c_stride as usize + j as usize * p.j_stride as usize);
    store(to, load(to) + p.scale * sum);
}

/// dx [tokens, d_in] += D(d lora_down · A): the part of dx that went through dropout. Grid: [d_in / 256, tokens / 8],
/// 256 threads.
#[inline(always)]
pub unsafe fn dropped_dx(p: DroppedDxParams) {
    let mask = Mask { seed: p.seed, threshold: p.threshold, scale: p.keep_scale };
    let dx = Output::new(p.dx, p.dx, p.bf16);
    let (column, first) = (block_x() * THREADS + thread(), block_y() * DROPPED_TOKENS);
    if column >= p.d_in {
        return;
    }
    let mut acc = [0.0; DROPPED_TOKENS as usize];
    let mut j = 0;
    while j < p.a_rows {
        let weight = load(p.a.add(j as usize * p.d_in as usize + column as usize));
        for t in 0..DROPPED_TOKENS {
            if first + t < p.tokens {
                let at = (first + t) as usize * p.state_width as usize + j as usize;
                acc[t as usize] = fma(load(p.d_adapter_state.add(at)), weight, acc[t as usize]);
            }
        }
        j += 1;
    }
    for t in 0..DROPPED_TOKENS {
        if first + t < p.tokens {
            let at = (first + t) as usize * p.d_in as usize + column as usize;
            dx.put(at, mask.apply(acc[t as usize], first + t, column));
        }
    }
}
