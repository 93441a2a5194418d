//! Between the adapter's two products: from a token's lora_down and router logits to `mixed`, and back.
//!
//! The mathematics is that of `hydra_kernels::gate`. A token's row of `adapter_state` is [lora_down | gate], its
//! gradient [d lora_down | d logits].

use crate::kernels::adapter::{BalanceLossGradParams, LoraUpBackwardParams};
use crate::mask::Mask;
use crate::math;
use crate::optimizer::block_total;
use crate::prelude::*;
use crate::sizes::{GATE_LABEL, GATE_ONE, GATE_ROUTER, THREADS};

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
    /// The router's logits are multiplied by it.
    pub inverse_temperature: f32,
    /// How many of a token's largest logits take part; `lora_heads` or more means all of them.
    pub top_k: u32,
    /// Dropout of `mixed`.
    pub head_dropout: Mask,
}

impl Adapter {
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
    unsafe fn keep_largest(self, row: *mut f32) {
        if self.top_k >= self.lora_heads {
            return;
        }
        let (mut left, mut e) = (0, 0);
        while e < self.lora_heads {
            left += (load(row.add(e as usize)) > f32::NEG_INFINITY) as u32;
            e += 1;
        }
        while left > self.top_k {
            // The smallest is removed; of equal ones the last.
            let (mut least, mut at) = (f32::INFINITY, u32::MAX);
            e = 0;
            while e < self.lora_heads {
                let logit = load(row.add(e as usize));
                if logit > f32::NEG_INFINITY && logit <= least {
                    (least, at) = (logit, e);
                }
                e += 1;
            }
            if at < self.lora_heads {
                store(row.add(at as usize), f32::NEG_INFINITY);
            }
            left -= 1;
        }
    }

    /// Replaces token `t`'s logits by its gate.
    #[inline(always)]
    unsafe fn activate(self, adapter_state: *mut f32, t: u32) {
        let row = adapter_state.add(t as usize * self.state_width() as usize + self.a_rows as usize);
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
            store(row.add(e as usize), if label < self.lora_heads { one_hot } else { same });
            e += 1;
        }
    }

    /// Replaces a row of logits by their softmax at the router's temperature.
    #[inline(always)]
    unsafe fn softmax(self, row: *mut f32) {
        let logit = |e: u32| self.inverse_temperature * load(row.add(e as usize));
        let (mut max, mut sum, mut e) = (f32::NEG_INFINITY, 0.0, 0);
        while e < self.lora_heads {
            max = max.max(logit(e));
            e += 1;
        }
        e = 0;
        while e < self.lora_heads {
            sum += math::exp(logit(e) - max);
            e += 1;
        }
        e = 0;
        while e < self.lora_heads {
            store(row.add(e as usize), math::exp(logit(e) - max) / sum);
            e += 1;
        }
    }
}

/// Activates the gates of tokens `first .. end` and writes `scale` · gate ∘ lora_down to the operand `mixed`. A whole
/// block calls it, which sees its own stores to `adapter_state`.
#[inline(always)]
pub unsafe fn mix(adapter: Adapter, adapter_state: *mut f32, mixed: *mut u16, scale: f32, first: u32, end: u32) {
    let mut t = first + thread();
    while t < end {
        adapter.activate(adapter_state, t);
        t += threads();
    }
    barrier();
    let pitch = padded(adapter.mixed_width());
    assume(pitch > 0 && adapter.rank > 0);
    let mut i = thread();
    while i < (end - first) * pitch {
        let (t, column) = ((first + i / pitch) as usize, i % pitch);
        let mut value = 0.0;
        if column < adapter.mixed_width() {
            let row = adapter_state.add(t * adapter.state_width() as usize);
            let gate = load(row.add((adapter.a_rows + column / adapter.rank) as usize));
            value = adapter.dropped(gate * load(row.add(adapter.lora_down_column(column) as usize)), t as u32, column);
        }
        store(mixed.add(t * pitch as usize + column as usize), to_bf16(scale * value));
        i += threads();
    }
}

/// A token's rows in the gate's gradient, and which of the eight threads that share them this one is.
struct Token {
    adapter: Adapter,
    /// The token's number.
    t: u32,
    part: u32,
    adapter_state: *const f32,
    d_adapter_state: *mut f32,
    mixed: *mut u16,
    d_mixed: *const f32,
    balance_loss_grad: *const f32,
}

impl Token {
    /// The column of head `e`'s gate.
    #[inline(always)]
    fn gate(&self, e: u32) -> usize {
        (self.adapter.a_rows + e) as usize
    }

    /// The operand `mixed` again, for dB.
    #[inline(always)]
    unsafe fn mixed(&self) {
        let (adapter, state) = (self.adapter, self.adapter_state);
        let mut column = self.part;
        while column < padded(adapter.mixed_width()) {
            let mut value = 0.0;
            if column < adapter.mixed_width() {
                let gate = load(state.add(self.gate(column / adapter.rank)));
                value = gate * load(state.add(adapter.lora_down_column(column) as usize));
                value = adapter.dropped(value, self.t, column);
            }
            store(self.mixed.add(column as usize), to_bf16(value));
            column += 8;
        }
    }

    /// d lora_down.
    #[inline(always)]
    unsafe fn d_lora_down(&self) {
        let (adapter, state, rank) = (self.adapter, self.adapter_state, self.adapter.rank);
        let mut j = self.part;
        while j < adapter.a_rows {
            let mut sum = 0.0;
            if adapter.per_head_a != 0 {
                sum = load(state.add(self.gate(j / rank))) * load(self.d_mixed.add(j as usize));
            } else {
                let mut e = 0;
                while e < adapter.lora_heads {
                    sum += load(state.add(self.gate(e))) * load(self.d_mixed.add((e * rank + j) as usize));
                    e += 1;
                }
            }
            store(self.d_adapter_state.add(j as usize), sum);
            j += 8;
        }
    }

    /// d gate, in place of d logits.
    #[inline(always)]
    unsafe fn d_gate(&self) {
        let (adapter, state, rank) = (self.adapter, self.adapter_state, self.adapter.rank);
        let mut e = self.part;
        while e < adapter.lora_heads {
            let balance = self.balance_loss_grad;
            let mut dot = if balance.is_null() { 0.0 } else { load(balance.add(e as usize)) };
            let mut j = 0;
            while j < rank && adapter.gate == GATE_ROUTER {
                let column = e * rank + j;
                let lora_down = load(state.add(adapter.lora_down_column(column) as usize));
                dot += load(self.d_mixed.add(column as usize)) * lora_down;
                j += 1;
            }
            store(self.d_adapter_state.add(self.gate(e)), dot);
            e += 8;
        }
    }

    /// d logits = gate ∘ (d gate − Σ gate ∘ d gate) / temperature, in place of d gate.
    #[inline(always)]
    unsafe fn d_logits(&self) {
        let (adapter, state) = (self.adapter, self.adapter_state);
        let (mut dot, mut e) = (0.0, 0);
        while e < adapter.lora_heads {
            dot += load(state.add(self.gate(e))) * load(self.d_adapter_state.add(self.gate(e)));
            e += 1;
        }
        e = 0;
        while e < adapter.lora_heads {
            let at = self.d_adapter_state.add(self.gate(e));
            let gate = load(state.add(self.gate(e)));
            store(at, adapter.inverse_temperature * (gate * (load(at) - dot)));
            e += 1;
        }
    }
}

/// From `d_mixed` (already scaled, and after dropout) and `adapter_state` of tokens `first .. first + count`, at most
/// 32 of them: `d_adapter_state`, and the operand `mixed`. Eight threads have a token.
#[inline(always)]
pub unsafe fn mix_backward(adapter: Adapter, p: &LoraUpBackwardParams, first: u32, count: u32) {
    let (t, part) = (thread() / 8, thread() % 8);
    let width = adapter.state_width() as usize;
    assume(adapter.rank > 0);
    let at = (first + t) as usize;
    let token = Token {
        adapter,
        t: first + t,
        part,
        adapter_state: p.adapter_state.add(at * width),
        d_adapter_state: p.d_adapter_state.add(at * width),
        mixed: p.mixed.add(at * padded(adapter.mixed_width()) as usize),
        d_mixed: p.d_mixed.add(at * adapter.mixed_width() as usize),
        balance_loss_grad: p.balance_loss_grad,
    };
    if t < count {
        token.mixed();
        token.d_lora_down();
        token.d_gate();
    }
    barrier();
    if t < count && part == 0 && adapter.gate == GATE_ROUTER {
        token.d_logits();
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
