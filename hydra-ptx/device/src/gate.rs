//! Between the adapter's two products: from a token's down-projection and router logits to the mixed heads, and back.
//!
//! The mathematics is `hydra_kernels::gate`'s. A token's state `hidden` is [down | gate], its gradient [ddown | dlogits].

use crate::mask::Mask;
use crate::math;
use crate::optimizer::block_total;
use crate::prelude::*;
use crate::sizes::{GATE_LABEL, GATE_ONE, GATE_ROUTER, THREADS};

/// An adapter's sizes and its gate.
#[derive(Clone, Copy)]
pub struct Heads {
    /// Rows of A.
    pub a_rows: u32,
    /// Heads.
    pub heads: u32,
    /// Rank of a head.
    pub rank: u32,
    /// 1: head e reads down[e rank ..]; 0: all read down[..].
    pub per_head: u32,
    /// One of `sizes::GATE_*`.
    pub gate: u32,
    /// Each token's label, for `GATE_LABEL`.
    pub labels: *const u32,
    /// The router's logits are multiplied by it.
    pub sharpness: f32,
    /// So many of a token's largest logits take part; as many as there are heads, or more, is all.
    pub top_k: u32,
    /// Dropout on the mixed heads.
    pub mask: Mask,
}

impl Heads {
    /// Columns of hidden.
    #[inline(always)]
    pub fn hidden(self) -> u32 {
        self.a_rows + self.heads
    }

    /// Columns of mixed.
    #[inline(always)]
    pub fn mixed(self) -> u32 {
        self.heads * self.rank
    }

    /// Where `mixed`'s column reads hidden's down.
    #[inline(always)]
    pub fn down(self, column: u32) -> u32 {
        if self.per_head != 0 { column } else { column % self.rank }
    }

    /// A mixed head's value after dropout.
    #[inline(always)]
    pub fn dropped(self, value: f32, t: u32, column: u32) -> f32 {
        if self.mask.threshold > 0 { self.mask.apply(value, t, column) } else { value }
    }

    /// All but the `top_k` largest logits of a row become −∞; of equals the first are kept. With a NaN nothing has to be right but
    /// that it stays.
    #[inline(always)]
    unsafe fn keep_largest(self, row: *mut f32) {
        if self.top_k >= self.heads {
            return;
        }
        let (mut left, mut e) = (0, 0);
        while e < self.heads {
            left += (load(row.add(e as usize)) > f32::NEG_INFINITY) as u32;
            e += 1;
        }
        while left > self.top_k {
            // The least goes, of equals the last.
            let (mut least, mut at) = (f32::INFINITY, u32::MAX);
            e = 0;
            while e < self.heads {
                let logit = load(row.add(e as usize));
                if logit > f32::NEG_INFINITY && logit <= least {
                    (least, at) = (logit, e);
                }
                e += 1;
            }
            if at < self.heads {
                store(row.add(at as usize), f32::NEG_INFINITY);
            }
            left -= 1;
        }
    }

    /// Writes token `t`'s gate over its logits.
    #[inline(always)]
    unsafe fn activate(self, hidden: *mut f32, t: u32) {
        let row = hidden.add(t as usize * self.hidden() as usize + self.a_rows as usize);
        if self.gate == GATE_ROUTER {
            self.keep_largest(row);
            let logit = |e: u32| self.sharpness * load(row.add(e as usize));
            let (mut max, mut sum, mut e) = (f32::NEG_INFINITY, 0.0, 0);
            while e < self.heads {
                max = max.max(logit(e));
                e += 1;
            }
            e = 0;
            while e < self.heads {
                sum += math::exp(logit(e) - max);
                e += 1;
            }
            e = 0;
            while e < self.heads {
                store(row.add(e as usize), math::exp(logit(e) - max) / sum);
                e += 1;
            }
            return;
        }
        let label = if self.gate == GATE_LABEL { load(self.labels.add(t as usize)) } else { u32::MAX };
        let same = if self.gate == GATE_ONE { 1.0 } else { 1.0 / self.heads as f32 };
        let mut e = 0;
        while e < self.heads {
            let one_hot = if e == label { 1.0 } else { 0.0 };
            store(row.add(e as usize), if label < self.heads { one_hot } else { same });
            e += 1;
        }
    }
}

/// Activates the gates of tokens `first .. end` and writes `scale` times their mixed heads to `mixed`, bf16 and padded. By a whole
/// block, which sees its own stores to `hidden`.
#[inline(always)]
pub unsafe fn mix_tokens(heads: Heads, hidden: *mut f32, mixed: *mut u16, scale: f32, first: u32, end: u32) {
    let mut t = first + thread();
    while t < end {
        heads.activate(hidden, t);
        t += threads();
    }
    barrier();
    let pitch = padded(heads.mixed());
    assume(pitch > 0 && heads.rank > 0);
    let mut i = thread();
    while i < (end - first) * pitch {
        let (t, column) = ((first + i / pitch) as usize, i % pitch);
        let mut value = 0.0;
        if column < heads.mixed() {
            let row = hidden.add(t * heads.hidden() as usize);
            let gate = load(row.add((heads.a_rows + column / heads.rank) as usize));
            value = heads.dropped(gate * load(row.add(heads.down(column) as usize)), t as u32, column);
        }
        store(mixed.add(t * pitch as usize + column as usize), to_bf16(scale * value));
        i += threads();
    }
}

/// From `dmixed` (already scaled, and after dropout) and `hidden` of tokens `first .. first + count`, at most 32 of them: `dhidden`,
/// and `mixed` again for dB, bf16 and padded.
/// `push` [heads] is what the load-balance term adds to dgate, or null.
#[inline(always)]
pub unsafe fn unmix_tokens(
    heads: Heads,
    dhidden: *mut f32,
    mixed: *mut u16,
    dmixed: *const f32,
    hidden: *const f32,
    push: *const f32,
    first: u32,
    count: u32,
) {
    let (t, part) = (thread() / 8, thread() % 8);
    let (width, rank) = (heads.hidden() as usize, heads.rank);
    assume(rank > 0);
    let at = (first + t) as usize;
    let (dhidden, hidden) = (dhidden.add(at * width), hidden.add(at * width));
    let pitch = padded(heads.mixed());
    let (mixed, dmixed) = (mixed.add(at * pitch as usize), dmixed.add(at * heads.mixed() as usize));
    let gate_at = |e: u32| (heads.a_rows + e) as usize;
    if t < count {
        let mut column = part;
        while column < pitch {
            let mut value = 0.0;
            if column < heads.mixed() {
                value = load(hidden.add(gate_at(column / rank))) * load(hidden.add(heads.down(column) as usize));
                value = heads.dropped(value, at as u32, column);
            }
            store(mixed.add(column as usize), to_bf16(value));
            column += 8;
        }
        let mut j = part;
        while j < heads.a_rows {
            let mut sum = 0.0;
            if heads.per_head != 0 {
                sum = load(hidden.add(gate_at(j / rank))) * load(dmixed.add(j as usize));
            } else {
                let mut e = 0;
                while e < heads.heads {
                    sum += load(hidden.add(gate_at(e))) * load(dmixed.add((e * rank + j) as usize));
                    e += 1;
                }
            }
            store(dhidden.add(j as usize), sum);
            j += 8;
        }
        let mut e = part;
        while e < heads.heads {
            let mut dot = if push.is_null() { 0.0 } else { load(push.add(e as usize)) };
            let mut j = 0;
            while j < rank && heads.gate == GATE_ROUTER {
                let column = e * rank + j;
                dot += load(dmixed.add(column as usize)) * load(hidden.add(heads.down(column) as usize));
                j += 1;
            }
            store(dhidden.add(gate_at(e)), dot);
            e += 8;
        }
    }
    barrier();
    if t < count && part == 0 && heads.gate == GATE_ROUTER {
        let (mut dot, mut e) = (0.0, 0);
        while e < heads.heads {
            dot += load(hidden.add(gate_at(e))) * load(dhidden.add(gate_at(e)));
            e += 1;
        }
        e = 0;
        while e < heads.heads {
            let at = dhidden.add(gate_at(e));
            store(at, heads.sharpness * (load(hidden.add(gate_at(e))) * (load(at) - dot)));
            e += 1;
        }
    }
}

kernels! {
    /// `push` [heads] = scale · the share of tokens whose largest gate, of equals the first, is that of each head: what the
    /// load-balance term adds to every token's dgate. Grid: [heads], 256 threads.
    fn gate_push(push: *mut f32, hidden: *const f32, tokens: u32, a_rows: u32, heads: u32, scale: f32) {
        let (head, width) = (block_x(), (a_rows + heads) as usize);
        let (mut count, mut t) = (0.0, thread());
        while t < tokens {
            let row = hidden.add(t as usize * width + a_rows as usize);
            let own = load(row.add(head as usize));
            let (mut largest, mut e) = (1.0, 0);
            while e < heads {
                let other = load(row.add(e as usize));
                if other > own || (other == own && e < head) {
                    largest = 0.0;
                }
                e += 1;
            }
            count += largest;
            t += THREADS;
        }
        // Whole numbers: exact in any order.
        let total = block_total(count);
        if thread() == 0 {
            store(push.add(head as usize), scale * (total as f32 / tokens as f32));
        }
    }
}
