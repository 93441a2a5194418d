//! The adapter's products, its gate and its gradients.

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
    /// The router's logits are multiplied by it.
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

fn skinny_shared(mask: Mask) -> u32 {
    if mask.drops() { SKINNY_DROPPED_SHARED } else { SKINNY_SHARED }
}

/// The number of bf16 values of [A; R] [rows, width] as [`lora_down`] reads it.
pub fn split_len(rows: u32, width: u32) -> usize {
    2 * rows as usize * width.next_multiple_of(SKINNY_DEPTH) as usize
}

/// `out` = x [rows, width], f32, in two parts of bf16: [`split_len`] values.
pub fn split(out: Ptr, x: Ptr, rows: u32, width: u32) -> Launch {
    let chunks = u64::from(rows) * u64::from(width.next_multiple_of(SKINNY_DEPTH) / 8);
    Launch::new("split", [blocks(chunks), 1], 0, SplitParams { out, x, rows, width }.args())
}

/// What the adapter's first product writes.
#[derive(Clone, Copy, Debug)]
pub struct LoraDown {
    /// [tokens, a_rows + lora_heads] = [D(x) Aᵀ | gate(x Rᵀ)].
    pub adapter_state: Ptr,
    /// The operand [tokens, lora_heads · rank] = scale · H(gate ∘ lora_down).
    pub mixed: Ptr,
}

/// The adapter's first product and its gate, from the operand x [tokens, d_in] and [A; R] after [`split`] (`a`).
pub fn lora_down(out: LoraDown, x: Operand, a: Ptr, adapter: &Adapter) -> Launch {
    let LoraDown { adapter_state, mixed } = out;
    let Operand { at: x, rows: tokens, columns: d_in } = x;
    let &Adapter { a_rows, stacked_rows, lora_heads, rank, gate, labels, inverse_temperature, top_k, .. } = adapter;
    let &Adapter { scale, dropout, head_dropout, .. } = adapter;
    let params = LoraDownParams {
        adapter_state,
        mixed,
        tokens,
        x,
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
    };
    Launch::new("lora_down", [tokens.div_ceil(SKINNY), 1], skinny_shared(dropout), params.args())
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
    let Operand { at: x, rows: tokens, columns: d_in } = x;
    let &Adapter { a_rows, stacked_rows, lora_heads, rank, gate, labels, inverse_temperature, top_k, .. } = adapter;
    let params = LoraDownMatvecParams {
        adapter_state,
        mixed,
        tokens,
        x,
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

/// Where [`lora_up_backward`] writes.
#[derive(Clone, Copy, Debug)]
pub struct LoraUpBackward {
    /// [tokens, a_rows + lora_heads].
    pub d_adapter_state: Ptr,
    /// Its first stacked_rows columns as an operand.
    pub d_adapter_state_bf16: Ptr,
    /// The same with zeros in A's columns, whose gradient goes through dropout; or null.
    pub d_router_bf16: Ptr,
    /// The operand gate ∘ lora_down, [tokens, lora_heads · rank].
    pub mixed: Ptr,
    /// [tokens, lora_heads · rank].
    pub d_mixed: Ptr,
}

/// What [`lora_up_backward`] reads beside dy.
#[derive(Clone, Copy, Debug)]
pub struct LoraUpInputs {
    /// B as an operand, [d_out, lora_heads · rank].
    pub b: Ptr,
    /// From the forward pass, [tokens, a_rows + lora_heads].
    pub adapter_state: Ptr,
    /// From [`balance_loss_grad`], or null.
    pub balance_loss_grad: Ptr,
}

/// The gradient of `adapter_state` from the operand dy [tokens, d_out].
pub fn lora_up_backward(out: &LoraUpBackward, dy: Operand, inputs: &LoraUpInputs, adapter: &Adapter) -> Launch {
    let &LoraUpBackward { d_adapter_state, d_adapter_state_bf16, d_router_bf16, mixed, d_mixed } = out;
    let Operand { at: dy, rows: tokens, columns: d_out } = dy;
    let &LoraUpInputs { b, adapter_state, balance_loss_grad } = inputs;
    let &Adapter { a_rows, stacked_rows, lora_heads, rank, gate, inverse_temperature, scale, .. } = adapter;
    let params = LoraUpBackwardParams {
        d_adapter_state,
        d_adapter_state_bf16,
        d_router_bf16,
        mixed,
        d_mixed,
        tokens,
        dy,
        d_out,
        b,
        adapter_state,
        balance_loss_grad,
        scale,
        stacked_rows,
        a_rows,
        lora_heads,
        rank,
        per_head_a: adapter.per_head_a.into(),
        gate,
        inverse_temperature,
        head_seed: adapter.head_dropout.seed,
        head_threshold: adapter.head_dropout.threshold,
        head_keep_scale: adapter.head_dropout.scale,
    };
    Launch::new("lora_up_backward", [tokens.div_ceil(SKINNY), 1], SKINNY_SHARED, params.args())
}

/// A weight gradient: a sum over tokens of outer products, which is added to `out`. Element (c, j) of it lies at
/// c · c_stride + j · j_stride.
#[derive(Clone, Copy, Debug)]
pub struct WeightGrad {
    out: Ptr,
    strides: [u32; 2],
    /// x or dy.
    wide: Operand,
    /// What it is multiplied by, and its columns.
    narrow: Ptr,
    rows: u32,
    scale: f32,
    /// Rows j < a_rows read `wide` after dropout.
    a_rows: u32,
    mask: Mask,
}

/// `db` [d_out, lora_heads · rank] += scale · dyᵀ mixed; `mixed` is an operand.
pub fn db(db: Ptr, dy: Operand, mixed: Ptr, adapter: &Adapter) -> WeightGrad {
    let (rows, mask) = (adapter.mixed_width(), Mask::default());
    WeightGrad { out: db, strides: [rows, 1], wide: dy, narrow: mixed, rows, scale: adapter.scale, a_rows: 0, mask }
}

/// d[A; R] [stacked_rows, d_in] += d_adapter_stateᵀ D(x); `d_adapter_state_bf16` is an operand.
pub fn da(da: Ptr, x: Operand, d_adapter_state_bf16: Ptr, adapter: &Adapter) -> WeightGrad {
    let &Adapter { stacked_rows: rows, a_rows, dropout: mask, .. } = adapter;
    let strides = [1, x.columns];
    WeightGrad { out: da, strides, wide: x, narrow: d_adapter_state_bf16, rows, scale: 1.0, a_rows, mask }
}

impl WeightGrad {
    /// Tokens of a part, and the number of parts: more than one where there are few tiles of results.
    fn parts(&self) -> (u32, u32) {
        let Operand { rows: tokens, columns, .. } = self.wide;
        let tiles = columns.div_ceil(SKINNY) * self.rows.div_ceil(SKINNY);
        let wanted = (WEIGHT_GRAD_BLOCKS / tiles.max(1)).max(1);
        let part_tokens = tokens.div_ceil(wanted).next_multiple_of(SKINNY_DEPTH);
        (part_tokens, tokens.div_ceil(part_tokens.max(1)))
    }

    /// Floats of memory that the parts take; 0 if there is only one.
    pub fn parts_len(&self) -> usize {
        let (_, count) = self.parts();
        if count > 1 { count as usize * self.wide.columns as usize * self.rows as usize } else { 0 }
    }

    /// The sum, or its parts, with [`WeightGrad::parts_len`] floats at `parts`.
    pub fn sum(&self, parts: Ptr) -> Launch {
        let &Self { out, strides: [c_stride, j_stride], wide, narrow, rows, scale, a_rows, mask } = self;
        let Operand { at: wide, rows: tokens, columns } = wide;
        let Mask { seed, threshold, scale: keep_scale } = mask;
        let (part_tokens, count) = self.parts();
        let params = WeightGradParams {
            out,
            c_stride,
            j_stride,
            tokens,
            wide,
            columns,
            narrow,
            rows,
            scale,
            a_rows,
            seed,
            threshold,
            keep_scale,
            part_tokens,
            parts,
        };
        let grid = [columns.div_ceil(SKINNY), rows.div_ceil(SKINNY) * count];
        Launch::new("weight_grad", grid, skinny_shared(mask), params.args())
    }

    /// What has to follow if there is more than one part.
    pub fn total(&self, parts: Ptr) -> Launch {
        let &Self { out, strides: [c_stride, j_stride], wide: Operand { columns, .. }, rows, scale, .. } = self;
        let (_, count) = self.parts();
        let params = WeightGradTotalParams { out, c_stride, j_stride, parts, count, columns, rows, scale };
        Launch::new("weight_grad_total", [blocks(u64::from(columns) * u64::from(rows)), 1], 0, params.args())
    }
}

/// `dx` [tokens, d_in] += D(d lora_down · A), with A [a_rows, d_in] in f32.
pub fn dropped_dx(dx: Values, [tokens, d_in]: [u32; 2], d_adapter_state: Ptr, a: Ptr, adapter: &Adapter) -> Launch {
    let Mask { seed, threshold, scale: keep_scale } = adapter.dropout;
    let params = DroppedDxParams {
        dx: dx.at,
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
    let grid = [d_in.div_ceil(THREADS), tokens.div_ceil(DROPPED_TOKENS)];
    Launch::new("dropped_dx", grid, 0, params.args())
}
