//! The head's cross-entropy by blocks of the vocabulary, with a running softmax: the recurrence of `backend/cpu/loss.rs`.
//!
//! The launches: for each block of ids, logits = x Wᵀ (a matrix product), [`soften`], dx += p W (a matrix product); at the end
//! [`finish_loss`]. With unnormalised p = exp(l − max), nll = max + ln Σ p − l_target and dx = scale · (Σ p w / Σ p − w_target).

use crate::format::eight_of;
use crate::math;
use crate::prelude::*;
use crate::sizes::THREADS;

/// Floats of a row's state: largest logit, sum, the target's logit.
pub const STATE: usize = 3;

kernels! {
    /// A row of `count` logits, of ids `first ..`: p [rows, padded count] = exp(logit − max) as bf16; `state` [rows, 3] and, if not
    /// null, what earlier blocks left in dx [rows, d] are rescaled to the new maximum. Grid: [rows], 256 threads.
    fn soften(
        p: *mut u16,
        state: *mut f32,
        dx: *mut f32,
        logits: *const f32,
        count: u32,
        targets: *const u32,
        first: u32,
        d: u32,
    ) {
        let row = block_x() as usize;
        let (logits, state) = (logits.add(row * count as usize), state.add(row * STATE));
        let (old_max, old_sum) = if first == 0 { (f32::NEG_INFINITY, 0.0) } else { (load(state), load(state.add(1))) };
        let (mut max, mut i) = (old_max, thread());
        while i < count {
            max = max.max(load(logits.add(i as usize)));
            i += THREADS;
        }
        let max = over_block::<Max>(max, shared());
        let pitch = padded(count);
        let p = p.add(row * pitch as usize);
        let mut sum = 0.0;
        i = thread();
        while i < pitch {
            let value = if i < count { math::exp(load(logits.add(i as usize)) - max) } else { 0.0 };
            store(p.add(i as usize), to_bf16(value));
            sum += value;
            i += THREADS;
        }
        let sum = over_block::<Sum>(sum, shared());
        let shrink = math::exp(old_max - max);
        if thread() == 0 {
            store(state, max);
            store(state.add(1), old_sum * shrink + sum);
            let target = load(targets.add(row)).wrapping_sub(first);
            if target < count {
                store(state.add(2), load(logits.add(target as usize)));
            }
        }
        if !dx.is_null() && first > 0 {
            i = thread();
            while i < d {
                let to = dx.add(row * d as usize + i as usize);
                store(to, load(to) * shrink);
                i += THREADS;
            }
        }
    }

    /// `nll[row]`, and dx (if not null) normalised, less the target's row of the head, times `scale`. Grid: [rows], 256 threads.
    fn finish_loss(
        nll: *mut f32,
        dx: *mut f32,
        state: *const f32,
        head: *const u8,
        scales: *const u8,
        format: u32,
        pitch: u32,
        targets: *const u32,
        d: u32,
        scale: f32,
    ) {
        let row = block_x() as usize;
        let state = state.add(row * STATE);
        let sum = load(state.add(1));
        if thread() == 0 {
            store(nll.add(row), load(state) + math::ln(sum) - load(state.add(2)));
        }
        if dx.is_null() {
            return;
        }
        let (target, dx) = (load(targets.add(row)), dx.add(row * d as usize));
        let mut group = thread();
        while 8 * group < d {
            let wanted = eight_of(format, head, scales, target, group, pitch);
            for i in 0..8 {
                let column = 8 * group + i;
                if column < d {
                    let to = dx.add(column as usize);
                    store(to, scale * (load(to) / sum - wanted[i as usize]));
                }
            }
            group += THREADS;
        }
    }
}
