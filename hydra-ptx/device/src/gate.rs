//! Between the adapter's two products: from a token's lora_down and router logits to `mixed`, and back.
//!
//! The mathematics is that of `hydra_kernels::gate`. A token's row of `adapter_state` is [lora_down | gate], its
//! gradient [d lora_down | d logits].

use crate::kernels::adapter::BalanceLossGradParams;
use crate::mask::Mask;
use crate::math;
use crate::optimizer::block_total;
use crate::prelude::*;
use crate::sizes::{GATE_LABEL, GATE_ONE, GATE_ROUTER, THREADS};

/// A token's row of `adapter_state`.
pub trait Row: Copy {
    /// A value.
    unsafe fn get(self, column: u32) -> f32;
    /// Replaces a value.
    unsafe fn put(self, column: u32, value: f32);
}

/// In the device's memory.
impl Row for *mut f32 {
    #[inline(always)]
    unsafe fn get(self, column: u32) -> f32 {
        load(self.add(column as usize))
    }

    #[inline(always)]
    unsafe fn put(self, column: u32, value: f32) {
        store(self.add(column as usize), value);
    }
}

/// The address of a row in shared memory.
#[derive(Clone, Copy)]
pub struct SharedRow(pub u32);

impl Row for SharedRow {
    #[inline(always)]
    unsafe fn get(self, column: u32) -> f32 {
        ld_f32(self.0 + 4 * column)
    }

    #[inline(always)]
    unsafe fn put(self, column: u32, value: f32) {
        st_f32(self.0 + 4 * column, value);
    }
}

/// An adapter's shape and its gate.
#[derive(Clone, Copy)]
pub struct Adapter {
    /// Rows of A.
    pub a_rows: u32,
    /// Heads: the number of B's.
    pub lora_heads: u32,
    /// Rank of a head.
    pub rank: u32,
    /// 1: head e reads columns e · rank and on of lora_down; 0: all heads read the same.
    pub per_head_a: u32,
    /// One of `sizes::GATE_*`.
    pub gate: u32,
    /// Each token's head, for `GATE_LABEL`.
    pub labels: *const u32,
    /// The router's logits, less the largest of them, are multiplied by it.
    pub inverse_temperature: f32,
    /// How many of a token's largest logits take part; `lora_heads` or more means all of them.
    pub top_k: u32,
    /// Dropout of `mixed`.
    pub head_dropout: Mask,
}

impl Adapter {
    /// For gradients, which read the gate itself and so need neither labels nor K. `shape` is `a_rows`, `lora_heads`,
    /// `rank` and `per_head_a`.
    #[inline(always)]
    pub fn of_gradient(shape: (u32, u32, u32, u32), gate: u32, inverse_temperature: f32, head_dropout: Mask) -> Self {
        let ((a_rows, lora_heads, rank, per_head_a), labels) = (shape, core::ptr::null());
        Self {
            a_rows,
            lora_heads,
            rank,
            per_head_a,
            gate,
            labels,
            inverse_temperature,
            top_k: lora_heads,
            head_dropout,
        }
    }

    /// Columns of `adapter_state`.
    #[inline(always)]
    pub fn state_width(self) -> u32 {
        self.a_rows + self.lora_heads
    }

    /// Columns of `mixed`.
    #[inline(always)]
    pub fn mixed_width(self) -> u32 {
        self.lora_heads * self.rank
    }

    /// The column of lora_down that this column of `mixed` reads.
    #[inline(always)]
    pub fn lora_down_column(self, column: u32) -> u32 {
        if self.per_head_a != 0 { column } else { column % self.rank }
    }

    /// A value of `mixed` after dropout.
    #[inline(always)]
    pub fn dropped(self, value: f32, t: u32, column: u32) -> f32 {
        if self.head_dropout.threshold > 0 { self.head_dropout.apply(value, t, column) } else { value }
    }

    /// Sets all but the `top_k` largest logits of a row to −∞. Of equal logits the first is kept. A NaN stays, and then
    /// the other logits don't matter.
    #[inline(always)]
    unsafe fn keep_largest(self, row: impl Row) {
        if self.top_k >= self.lora_heads {
            return;
        }
        let (mut left, mut e) = (0, 0);
        while e < self.lora_heads {
            left += (row.get(self.a_rows + e) > f32::NEG_INFINITY) as u32;
            e += 1;
        }
        while left > self.top_k {
            // The smallest is removed; of equal ones the last.
            let (mut least, mut at) = (f32::INFINITY, u32::MAX);
            e = 0;
            while e < self.lora_heads {
                let logit = row.get(self.a_rows + e);
                if logit > f32::NEG_INFINITY && logit <= least {
                    (least, at) = (logit, e);
                }
                e += 1;
            }
            if at < self.lora_heads {
                row.put(self.a_rows + at, f32::NEG_INFINITY);
            }
            left -= 1;
        }
    }

    /// Replaces token `t`'s logits by its gate.
    #[inline(always)]
    unsafe fn activate(self, row: impl Row, t: u32) {
        if self.gate == GATE_ROUTER {
            self.keep_largest(row);
            self.softmax(row);
            return;
        }
        let label = if self.gate == GATE_LABEL { load(self.labels.add(t as usize)) } else { u32::MAX };
        let same = if self.gate == GATE_ONE { 1.0 } else { 1.0 / self.lora_heads as f32 };
        let mut e = 0;
        while e < self.lora_heads {
            let one_hot = if e == label { 1.0 } else { 0.0 };
            row.put(self.a_rows + e, if label < self.lora_heads { one_hot } else { same });
            e += 1;
        }
    }

    /// Replaces a row of logits by their softmax at the router's temperature; a row of −∞ by zeros.
    #[inline(always)]
    unsafe fn softmax(self, row: impl Row) {
        let (mut max, mut sum, mut e) = (f32::NEG_INFINITY, 0.0, 0);
        while e < self.lora_heads {
            max = max.max(row.get(self.a_rows + e));
            e += 1;
        }
        e = 0;
        while e < self.lora_heads {
            let logit = row.get(self.a_rows + e);
            // As differences, logits don't overflow; of −∞ there is none.
            let below = if logit == f32::NEG_INFINITY { logit } else { logit - max };
            let power = math::exp(self.inverse_temperature * below);
            row.put(self.a_rows + e, power);
            sum += power;
            e += 1;
        }
        e = 0;
        while e < self.lora_heads {
            row.put(self.a_rows + e, if sum == 0.0 { 0.0 } else { row.get(self.a_rows + e) / sum });
            e += 1;
        }
    }

    /// A value of `mixed` of token `t`, which has this row.
    #[inline(always)]
    unsafe fn mixed(self, row: impl Row, t: u32, column: u32) -> f32 {
        if column >= self.mixed_width() {
            return 0.0;
        }
        let gate = row.get(self.a_rows + column / self.rank);
        self.dropped(gate * row.get(self.lora_down_column(column)), t, column)
    }
}

/// Activates the gates of tokens `first .. first + count`, which have these rows, and writes `scale` · gate ∘ lora_down
/// to the operand `mixed`. A whole block calls it, after a barrier; the rows may be read after it.
#[inline(always)]
pub unsafe fn mix<R: Row>(
    adapter: Adapter,
    row: impl Fn(u32) -> R,
    (mixed, mixed_pitch): (*mut u16, u32),
    scale: f32,
    first: u32,
    count: u32,
) {
    let mut t = thread();
    while t < count {
        adapter.activate(row(t), first + t);
        t += threads();
    }
    barrier();
    let pairs = padded(adapter.mixed_width()) / 2;
    assume(pairs > 0 && adapter.rank > 0);
    let mut i = thread();
    while i < count * pairs {
        let (t, column) = (i / pairs, i % pairs * 2);
        let value = |column: u32| scale * adapter.mixed(row(t), first + t, column);
        let at = mixed.add((first + t) as usize * mixed_pitch as usize + column as usize);
        store(at.cast::<u32>(), pack_bf16(value(column), value(column + 1)));
        i += threads();
    }
}

/// `out` [lora_heads] = scale · the share of tokens that have their largest gate (of equal ones the first) at each
/// head: what the load-balancing loss adds to every token's d gate. Grid: [lora_heads], 256 threads.
#[inline(always)]
pub unsafe fn balance_loss_grad(p: BalanceLossGradParams) {
    let (head, width) = (block_x(), (p.a_rows + p.lora_heads) as usize);
    let (mut count, mut t) = (0.0, thread());
    while t < p.tokens {
        let row = p.adapter_state.add(t as usize * width + p.a_rows as usize);
        let own = load(row.add(head as usize));
        let (mut largest, mut e) = (1.0, 0);
        while e < p.lora_heads {
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
        store(p.out.add(head as usize), p.scale * (total as f32 / p.tokens as f32));
    }
}
