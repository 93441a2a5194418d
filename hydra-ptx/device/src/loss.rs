//! The cross-entropy of the vocabulary's logits by blocks of ids, with a running softmax (online softmax, Milakov and
//! Gimelshein, arXiv 1805.02867).
//!
//! For each block of ids: logits = x Wᵀ (a matrix product), [`online_softmax`], dx += p W (a matrix product); at the
//! end [`finish_loss`]. With unnormalised p = exp(l − max), nll = max + ln Σ p − l_target and dx = scale · (Σ p w / Σ p
//! − w_target).

use crate::format::eight_of;
use crate::kernels::model::{FinishLossParams, OnlineSoftmaxParams};
use crate::math;
use crate::prelude::*;
use crate::sizes::{LOSS_STATE, THREADS};

/// A block of logits: the operand p = exp(logit − max); `state`, and what earlier blocks left in dx, are rescaled to
/// the new maximum. Grid: [rows], 256 threads.
#[inline(always)]
pub unsafe fn online_softmax(p: OnlineSoftmaxParams) {
    let (row, count) = (block_x() as usize, p.count);
    let (logits, state) = (p.logits.add(row * count as usize), p.state.add(row * LOSS_STATE));
    let (old_max, old_sum) = if p.first == 0 { (f32::NEG_INFINITY, 0.0) } else { (load(state), load(state.add(1))) };
    let (mut max, mut i) = (old_max, thread());
    while i < count {
        max = max.max(load(logits.add(i as usize)));
        i += THREADS;
    }
    let max = over_block::<Max>(max, shared());
    let pitch = padded(count);
    let weights = p.p.add(row * pitch as usize);
    let mut sum = 0.0;
    i = thread();
    while i < pitch {
        let value = if i < count { math::exp(load(logits.add(i as usize)) - max) } else { 0.0 };
        store(weights.add(i as usize), to_bf16(value));
        sum += value;
        i += THREADS;
    }
    let sum = over_block::<Sum>(sum, shared());
    let shrink = math::exp(old_max - max);
    if thread() == 0 {
        store(state, max);
        store(state.add(1), old_sum * shrink + sum);
        let target = load(p.targets.add(row)).wrapping_sub(p.first);
        if target < count {
            store(state.add(2), load(logits.add(target as usize)));
        }
    }
    if !p.dx.is_null() && p.first > 0 {
        i = thread();
        while i < p.d {
            let to = p.dx.add(row * p.d as usize + i as usize);
            store(to, load(to) * shrink);
            i += THREADS;
        }
    }
}

/// `nll`, and dx (if not null) normalised, minus the target's row of the vocabulary's matrix, times `scale`. Grid:
/// [rows], 256 threads.
#[inline(always)]
pub unsafe fn finish_loss(p: FinishLossParams) {
    let row = block_x() as usize;
    let state = p.state.add(row * LOSS_STATE);
    let sum = load(state.add(1));
    if thread() == 0 {
        store(p.nll.add(row), load(state) + math::ln(sum) - load(state.add(2)));
    }
    if p.dx.is_null() {
        return;
    }
    let (target, dx) = (load(p.targets.add(row)), p.dx.add(row * p.d as usize));
    let mut group = thread();
    while 8 * group < p.d {
        let weights = eight_of(p.format, p.lm_head, p.scales, target, group, p.pitch);
        for i in 0..8 {
            let column = 8 * group + i;
            if column < p.d {
                let to = dx.add(column as usize);
                store(to, p.scale * (load(to) / sum - weights[i as usize]));
            }
        }
        group += THREADS;
    }
}
