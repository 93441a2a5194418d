//! The adapter, its products forward, and dropout's part of dx. Its other gradients are in `adapter_backward`.

use super::*;
use crate::kernels::adapter::*;

/// An adapter's shape, its gate and its dropout.
#[derive(Clone, Copy, Debug)]
pub struct Adapter {
    /// Rows of A.
    pub a_rows: u32,
    /// Rows of [A; R].
    pub stacked_rows: u32,
    /// Heads: the number of B's.
    pub lora_heads: u32,
    /// Rank of a head.
    pub rank: u32,
    /// Whether each head has an A of its own.
    pub per_head_a: bool,
    /// One of `sizes::GATE_*`.
    pub gate: u32,
    /// Each token's head, for `GATE_LABEL`.
    pub labels: Ptr,
    /// The router's logits, less the largest of them, are multiplied by it.
    pub inverse_temperature: f32,
    /// How many of a token's largest logits take part; `lora_heads` or more means all of them.
    pub top_k: u32,
    /// α / rank.
    pub scale: f32,
    /// Dropout of x before A.
    pub dropout: Mask,
    /// Dropout of `mixed`.
    pub head_dropout: Mask,
}

impl Adapter {
    /// Columns of `adapter_state`.
    pub fn state_width(&self) -> u32 {
        self.a_rows + self.lora_heads
    }

    /// Columns of `mixed`.
    pub fn mixed_width(&self) -> u32 {
        self.lora_heads * self.rank
    }
}

/// Dropout, as `hydra_kernels::dropout` defines it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mask {
    /// Which mask.
    pub seed: u64,
    /// p · 2¹⁶; 0 drops nothing.
    pub threshold: u32,
    /// 1 / (1 − p).
    pub scale: f32,
}

impl Mask {
    /// Whether it drops anything.
    pub fn drops(&self) -> bool {
        self.threshold > 0
    }
}

/// Whether [`lora_down`] can read [A; R] [_, d_in] as it is; otherwise it reads what [`pad`] makes of it.
pub fn is_padded(a: Ptr, d_in: u32) -> bool {
    a.0.is_multiple_of(16) && d_in == padded(d_in)
}

/// The number of values that [`pad`] writes.
pub fn pad_len(rows: u32, width: u32) -> usize {
    rows as usize * padded(width) as usize
}

/// `out` = x [rows, width], f32, with each row padded to a multiple of 8 values.
pub fn pad(out: Ptr, x: Ptr, rows: u32, width: u32) -> Launch {
    Launch::new("pad", [blocks(pad_len(rows, width) as u64), 1], 0, PadParams { out, x, rows, width }.args())
}

/// What the adapter's first product writes.
#[derive(Clone, Copy, Debug)]
pub struct LoraDown {
    /// [tokens, a_rows + lora_heads] = [D(x) Aᵀ | gate(x Rᵀ)].
    pub adapter_state: Ptr,
    /// [tokens, lora_heads · rank] = scale · H(gate ∘ lora_down).
    pub mixed: Operand,
}

/// The adapter's first product and its gate, from the operand x [tokens, d_in] and [A; R] that [`is_padded`] (`a`). The
/// f32 B becomes an operand on the way.
pub fn lora_down(out: LoraDown, x: Operand, a: Ptr, adapter: &Adapter, (b_bf16, b): (Operand, Ptr)) -> Launch {
    let LoraDown { adapter_state, mixed } = out;
    let Operand { at: x, rows: tokens, columns: d_in, pitch: x_pitch } = x;
    let Operand { at: mixed, pitch: mixed_pitch, .. } = mixed;
    let &Adapter { a_rows, stacked_rows, lora_heads, rank, gate, labels, inverse_temperature, top_k, .. } = adapter;
    let &Adapter { scale, dropout, head_dropout, .. } = adapter;
    let params = LoraDownParams {
        adapter_state,
        mixed,
        mixed_pitch,
        tokens,
        x,
        x_pitch,
        d_in,
        a,
        stacked_rows,
        scale,
        a_rows,
        lora_heads,
        rank,
        per_head_a: adapter.per_head_a.into(),
        gate,
        labels,
        inverse_temperature,
        top_k,
        head_seed: head_dropout.seed,
        head_threshold: head_dropout.threshold,
        head_keep_scale: head_dropout.scale,
        seed: dropout.seed,
        threshold: dropout.threshold,
        keep_scale: dropout.scale,
        b,
        b_bf16: b_bf16.at,
        b_bf16_pitch: b_bf16.pitch,
        d_out: b_bf16.rows,
    };
    let eights = b_bf16.rows * padded(adapter.mixed_width()) / 8;
    let rounded = eights.div_ceil(LORA_DOWN_ROUNDED * THREADS);
    let shared = LORA_DOWN_SUMS + lora_down_state(adapter.state_width());
    Launch::new("lora_down", [tokens.div_ceil(LORA_DOWN_TOKENS) + rounded, 1], shared, params.args())
}

/// Whether [`lora_down_matvec`] can be used for so many tokens: there is no dropout, and the partial sums fit shared
/// memory.
pub fn fits_matvec(tokens: u32, adapter: &Adapter) -> bool {
    let drops = adapter.dropout.drops() || adapter.head_dropout.drops();
    tokens <= MATVEC_TOKENS && !drops && lora_matvec_shared(adapter.stacked_rows) <= MAX_SHARED
}

/// [`lora_down`] for a few tokens, without dropout and from the f32 [A; R] (`a`).
pub fn lora_down_matvec(out: LoraDown, x: Operand, a: Ptr, adapter: &Adapter) -> Launch {
    let LoraDown { adapter_state, mixed } = out;
    let Operand { at: x, rows: tokens, columns: d_in, pitch: x_pitch } = x;
    let Operand { at: mixed, pitch: mixed_pitch, .. } = mixed;
    let &Adapter { a_rows, stacked_rows, lora_heads, rank, gate, labels, inverse_temperature, top_k, .. } = adapter;
    let params = LoraDownMatvecParams {
        adapter_state,
        mixed,
        mixed_pitch,
        tokens,
        x,
        x_pitch,
        d_in,
        a,
        stacked_rows,
        scale: adapter.scale,
        a_rows,
        lora_heads,
        rank,
        per_head_a: adapter.per_head_a.into(),
        gate,
        labels,
        inverse_temperature,
        top_k,
    };
    Launch::new("lora_down_matvec", [tokens, 1], lora_matvec_shared(stacked_rows), params.args())
}

/// `out` `[lora_heads]`, from the gates in `adapter_state` of all of a pass's tokens: what the load-balancing loss with
/// this coefficient adds to each token's d gate.
pub fn balance_loss_grad(out: Ptr, adapter_state: Ptr, tokens: u32, adapter: &Adapter, coefficient: f32) -> Launch {
    let &Adapter { a_rows, lora_heads, .. } = adapter;
    let scale = coefficient * lora_heads as f32 / tokens.max(1) as f32;
    let params = BalanceLossGradParams { out, adapter_state, tokens, a_rows, lora_heads, scale };
    Launch::new("balance_loss_grad", [lora_heads, 1], SQUARES_SHARED, params.args())
}

/// `dx` [tokens, d_in] += D(d lora_down · A), with A [a_rows, d_in] in f32.
pub fn dropped_dx(
    (dx, pitch): (Values, u32),
    [tokens, d_in]: [u32; 2],
    d_adapter_state: Ptr,
    a: Ptr,
    adapter: &Adapter,
) -> Launch {
    let Mask { seed, threshold, scale: keep_scale } = adapter.dropout;
    let params = DroppedDxParams {
        dx: dx.at,
        pitch,
        bf16: dx.bf16.into(),
        tokens,
        d_in,
        d_adapter_state,
        state_width: adapter.state_width(),
        a,
        a_rows: adapter.a_rows,
        seed,
        threshold,
        keep_scale,
    };
    let grid = [tokens.div_ceil(DROPPED_TOKENS), d_in.div_ceil(THREADS)];
    Launch::new("dropped_dx", grid, 0, params.args())
}
