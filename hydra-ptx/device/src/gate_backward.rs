//! The gate's gradient for many tokens, [d lora_down | d logits] in its three forms, from the parts of `d_mixed`; and
//! the end of dB.
//!
//! 16 threads share a token. Its rows are in shared memory, unless they are too wide.

use crate::gate::{Adapter, Row, SharedRow};
use crate::kernels::adapter::GateBackwardParams;
use crate::mask::Mask;
use crate::prelude::*;
use crate::sizes::{GATE_ROUTER, GATE_SHARE, GATE_TOKENS, THREADS, gate_backward_row, gate_backward_shared};
use crate::wide::{Total, total_of_two};

impl GateBackwardParams {
    #[inline(always)]
    fn adapter(&self) -> Adapter {
        let &Self { a_rows, lora_heads, rank, per_head_a, gate, inverse_temperature, .. } = self;
        let head_dropout = Mask { seed: self.head_seed, threshold: self.head_threshold, scale: self.head_keep_scale };
        Adapter::of_gradient((a_rows, lora_heads, rank, per_head_a), gate, inverse_temperature, head_dropout)
    }
}

/// A token's rows, and which of the threads that share it this one is.
struct Token<'a, R> {
    p: &'a GateBackwardParams,
    adapter: Adapter,
    t: u32,
    part: u32,
    adapter_state: R,
    d_adapter_state: R,
    d_mixed: R,
}

impl<R: Row> Token<'_, R> {
    /// Calls `body` for this thread's part of so many columns; for none, if the token lies beyond the last one.
    #[inline(always)]
    unsafe fn each(&self, columns: u32, mut body: impl FnMut(u32)) {
        let mut column = self.part;
        while self.t < self.p.tokens && column < columns {
            body(column);
            column += GATE_SHARE;
        }
    }

    /// Adds the parts of d_mixed, with `mixed`'s dropout.
    #[inline(always)]
    unsafe fn total(&self) {
        let (p, pitch) = (self.p, padded(self.adapter.mixed_width()));
        self.each(pitch / 2, |i| {
            let from = p.d_mixed.add(self.t as usize * pitch as usize + 2 * i as usize);
            let sums = total_of_two(from, p.tokens * pitch, p.d_mixed_count);
            for j in 0..2 {
                let column = 2 * i + j;
                self.d_mixed.put(column, self.adapter.dropped(p.scale * sums[j as usize], self.t, column));
            }
        });
    }

    /// The column of head `e`'s gate.
    #[inline(always)]
    fn gate(&self, e: u32) -> u32 {
        self.adapter.a_rows + e
    }

    /// d lora_down.
    #[inline(always)]
    unsafe fn d_lora_down(&self) {
        let (adapter, rank) = (self.adapter, self.adapter.rank);
        self.each(adapter.a_rows, |j| {
            let mut sum = 0.0;
            if adapter.per_head_a != 0 {
                sum = self.adapter_state.get(self.gate(j / rank)) * self.d_mixed.get(j);
            } else {
                let mut e = 0;
                while e < adapter.lora_heads {
                    sum += self.adapter_state.get(self.gate(e)) * self.d_mixed.get(e * rank + j);
                    e += 1;
                }
            }
            self.d_adapter_state.put(j, sum);
        });
    }

    /// d logits = gate ∘ (d gate − Σ gate ∘ d gate) / temperature; of other gates than the router's, d gate.
    #[inline(always)]
    unsafe fn d_logits(&self) {
        let (adapter, rank, routed) = (self.adapter, self.adapter.rank, self.adapter.gate == GATE_ROUTER);
        let mut sum = 0.0;
        self.each(adapter.lora_heads, |e| {
            let balance = self.p.balance_loss_grad;
            let mut d_gate = if balance.is_null() { 0.0 } else { load(balance.add(e as usize)) };
            let mut j = 0;
            while j < rank && routed {
                let column = e * rank + j;
                let lora_down = self.adapter_state.get(if adapter.per_head_a != 0 { column } else { j });
                d_gate += self.d_mixed.get(column) * lora_down;
                j += 1;
            }
            sum += self.adapter_state.get(self.gate(e)) * d_gate;
            self.d_adapter_state.put(self.gate(e), d_gate);
        });
        // Over the 16 threads.
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 4);
        sum = over_quad::<Sum>(sum);
        if routed {
            self.each(adapter.lora_heads, |e| {
                let (gate, d_gate) = (self.adapter_state.get(self.gate(e)), self.d_adapter_state.get(self.gate(e)));
                self.d_adapter_state.put(self.gate(e), adapter.inverse_temperature * (gate * (d_gate - sum)));
            });
        }
    }

    /// Writes the gradient's three forms.
    #[inline(always)]
    unsafe fn write(&self) {
        let (p, width, pitch) = (self.p, self.adapter.state_width(), padded(self.p.stacked_rows));
        self.each(width.max(pitch), |column| {
            let place = |pitch: u32| self.t as usize * pitch as usize + column as usize;
            let mut value = 0.0;
            if column < width {
                value = self.d_adapter_state.get(column);
                store(p.d_adapter_state.add(place(width)), value);
            }
            if column < pitch {
                let value = if column < p.stacked_rows { to_bf16(value) } else { 0 };
                store(p.d_adapter_state_bf16.add(place(p.d_adapter_state_pitch)), value);
                if !p.d_router_bf16.is_null() {
                    let value = if column < p.a_rows { 0 } else { value };
                    store(p.d_router_bf16.add(place(p.d_router_pitch)), value);
                }
            }
        });
    }

    /// All of it, once `adapter_state` and `d_mixed` are in their rows.
    #[inline(always)]
    unsafe fn run(&self) {
        barrier();
        self.d_lora_down();
        self.d_logits();
        barrier();
        self.write();
    }
}

/// Grid: [tokens / 16 + d_out · columns of `mixed` / 2 / 256], 256 threads.
#[inline(always)]
pub unsafe fn gate_backward(p: GateBackwardParams) {
    let adapter = p.adapter();
    let gate_blocks = p.tokens.div_ceil(GATE_TOKENS);
    if block_x() >= gate_blocks {
        let i = (block_x() - gate_blocks) * THREADS + thread();
        let db = Total { out: p.db, rows: p.d_out, columns: adapter.mixed_width(), scale: p.scale };
        db.add(p.db_parts, p.db_count, i);
        return;
    }
    assume(adapter.rank > 0);
    let (row, part) = (thread() / GATE_SHARE, thread() % GATE_SHARE);
    let (t, width) = (block_x() * GATE_TOKENS + row, adapter.state_width());
    let place = |width: u32| t as usize * width as usize;
    let adapter_state = p.adapter_state.wrapping_add(place(width));
    if gate_backward_shared(width, adapter.mixed_width()) == 0 {
        let d_adapter_state = p.d_adapter_state.wrapping_add(place(width));
        let d_mixed = p.d_mixed.wrapping_add(place(padded(adapter.mixed_width())));
        let token =
            Token { p: &p, adapter, t, part, adapter_state: adapter_state.cast_mut(), d_adapter_state, d_mixed };
        token.total();
        token.run();
        return;
    }
    let columns =
        |skipped: u32| SharedRow(shared() + (row * gate_backward_row(width, adapter.mixed_width()) + skipped) * 4);
    let (state, d_adapter_state, d_mixed) = (columns(0), columns(width), columns(2 * width));
    let token = Token { p: &p, adapter, t, part, adapter_state: state, d_adapter_state, d_mixed };
    // On its way while the parts are added.
    let first = if t < p.tokens && part < width { load(adapter_state.add(part as usize)) } else { 0.0 };
    token.total();
    token.each(width, |column| {
        state.put(column, if column == part { first } else { load(adapter_state.add(column as usize)) });
    });
    token.run();
}
