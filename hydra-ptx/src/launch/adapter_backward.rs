//! The adapter's gradients: what follows from dy, and d[A; R].
//!
//! Both sum over tokens. A block has 256 columns of dy or x and a group of tokens; the groups' sums are parts, which
//! another launch adds.

use super::*;
use crate::kernels::adapter::*;

/// The most groups of tokens, for a sum of products of `columns` columns with `rows` columns.
fn wanted(columns: usize, rows: usize) -> usize {
    let blocks = columns.div_ceil(WIDE as usize).saturating_mul(rows.div_ceil(NARROW as usize));
    (WIDE_BLOCKS as usize / blocks.max(1)).max(1)
}

/// Tokens of a group and the number of groups, for such a sum.
fn groups(tokens: u32, columns: u32, rows: u32) -> (u32, u32) {
    let wanted = wanted(columns as usize, rows as usize) as u32;
    let group = tokens.div_ceil(wanted).max(GROUP_TOKENS).next_multiple_of(WIDE_TOKENS);
    (group, tokens.div_ceil(group))
}

/// The most parts of a sum over up to so many tokens, for a gradient [columns, rows] or [rows, columns].
pub fn most_parts(tokens: usize, columns: usize, rows: usize) -> usize {
    wanted(columns, rows).min(tokens.div_ceil(GROUP_TOKENS as usize))
}

/// A launch of the blocks of [`groups`].
fn wide_launch(entry: &'static str, grid: [u32; 2], shared: u32, args: Vec<Arg>) -> Launch {
    Launch { threads: WIDE_THREADS, ..Launch::new(entry, grid, shared, args) }
}

/// The gradients that follow from the operand dy [tokens, d_out]: dB, and that of `adapter_state`.
#[derive(Clone, Copy, Debug)]
pub struct LoraUpBackward<'a> {
    /// dy.
    pub dy: Operand,
    /// From the forward pass, [tokens, a_rows + lora_heads].
    pub adapter_state: Ptr,
    /// The adapter.
    pub adapter: &'a Adapter,
}

/// What passes from [`LoraUpBackward::products`] to [`LoraUpBackward::gate`].
#[derive(Clone, Copy, Debug)]
pub struct LoraUpParts {
    /// [`LoraUpBackward::d_mixed_len`] floats.
    pub d_mixed: Ptr,
    /// [`LoraUpBackward::db_len`] floats; or null, if dB isn't wanted.
    pub db: Ptr,
}

/// Where [`LoraUpBackward::gate`] writes.
#[derive(Clone, Copy, Debug)]
pub struct GateGradient {
    /// [tokens, a_rows + lora_heads].
    pub d_adapter_state: Ptr,
    /// Its first stacked_rows columns.
    pub d_adapter_state_bf16: Operand,
    /// The same with zeros in A's columns, whose gradient goes through dropout.
    pub d_router_bf16: Option<Operand>,
    /// [d_out, lora_heads · rank], to which dB is added; unused without its parts.
    pub db: Ptr,
}

impl LoraUpBackward<'_> {
    fn groups(&self) -> (u32, u32) {
        groups(self.dy.rows, self.dy.columns, self.adapter.mixed_width())
    }

    fn pitch(&self) -> usize {
        padded(self.adapter.mixed_width()) as usize
    }

    /// Floats of d_mixed's parts.
    pub fn d_mixed_len(&self) -> usize {
        self.dy.columns.div_ceil(WIDE) as usize * self.dy.rows as usize * self.pitch()
    }

    /// Floats of dB's parts.
    pub fn db_len(&self) -> usize {
        self.groups().1 as usize * self.dy.columns as usize * self.pitch()
    }

    /// dy's two products: d_mixed = dy B with B [d_out, lora_heads · rank] rounded to bf16, and dB = dyᵀ mixed.
    pub fn products(&self, parts: LoraUpParts, b: Ptr) -> Launch {
        let &Self { dy: Operand { at: dy, rows: tokens, columns: d_out, pitch: dy_pitch }, adapter_state, adapter } =
            self;
        let (group_tokens, count) = self.groups();
        let params = LoraUpBackwardParams {
            d_mixed: parts.d_mixed,
            db: parts.db,
            tokens,
            dy,
            dy_pitch,
            d_out,
            b,
            adapter_state,
            group_tokens,
            a_rows: adapter.a_rows,
            lora_heads: adapter.lora_heads,
            rank: adapter.rank,
            per_head_a: adapter.per_head_a.into(),
            head_seed: adapter.head_dropout.seed,
            head_threshold: adapter.head_dropout.threshold,
            head_keep_scale: adapter.head_dropout.scale,
        };
        let grid = [d_out.div_ceil(WIDE), count * adapter.mixed_width().div_ceil(NARROW)];
        wide_launch("lora_up_backward", grid, LORA_UP_BACKWARD_SHARED, params.args())
    }

    /// The gradient of `adapter_state`, and dB. `balance_loss_grad` is that of [`balance_loss_grad`], or null.
    pub fn gate(&self, out: &GateGradient, parts: LoraUpParts, balance_loss_grad: Ptr) -> Launch {
        let &Self { dy: Operand { rows: tokens, columns: d_out, .. }, adapter_state, adapter } = self;
        let &GateGradient { d_adapter_state, d_adapter_state_bf16, d_router_bf16, db } = out;
        let Operand { at: d_adapter_state_bf16, pitch: d_adapter_state_pitch, .. } = d_adapter_state_bf16;
        let Operand { at: d_router_bf16, pitch: d_router_pitch, .. } = d_router_bf16.unwrap_or(Operand::NONE);
        let db_count = if parts.db == Ptr::NULL { 0 } else { self.groups().1 };
        let params = GateBackwardParams {
            d_adapter_state,
            d_adapter_state_bf16,
            d_adapter_state_pitch,
            d_router_bf16,
            d_router_pitch,
            d_mixed: parts.d_mixed,
            d_mixed_count: d_out.div_ceil(WIDE),
            db,
            db_parts: parts.db,
            db_count,
            d_out,
            tokens,
            adapter_state,
            balance_loss_grad,
            scale: adapter.scale,
            stacked_rows: adapter.stacked_rows,
            a_rows: adapter.a_rows,
            lora_heads: adapter.lora_heads,
            rank: adapter.rank,
            per_head_a: adapter.per_head_a.into(),
            gate: adapter.gate,
            inverse_temperature: adapter.inverse_temperature,
            head_seed: adapter.head_dropout.seed,
            head_threshold: adapter.head_dropout.threshold,
            head_keep_scale: adapter.head_dropout.scale,
        };
        let db_blocks = if db_count == 0 { 0 } else { blocks(u64::from(d_out) * self.pitch() as u64 / 2) };
        let shared = gate_backward_shared(adapter.state_width(), adapter.mixed_width());
        Launch::new("gate_backward", [tokens.div_ceil(GATE_TOKENS) + db_blocks, 1], shared, params.args())
    }
}

/// d[A; R]: a sum over tokens of outer products.
#[derive(Clone, Copy, Debug)]
pub struct WeightGrad {
    out: Ptr,
    x: Operand,
    /// What it is multiplied by, and its columns.
    narrow: Operand,
    rows: u32,
    /// Rows j < a_rows read x after dropout.
    a_rows: u32,
    mask: Mask,
}

/// d[A; R] [stacked_rows, d_in] += d_adapter_stateᵀ D(x); `d_adapter_state_bf16` is an operand.
pub fn da(da: Ptr, x: Operand, d_adapter_state_bf16: Operand, adapter: &Adapter) -> WeightGrad {
    let &Adapter { stacked_rows: rows, a_rows, dropout: mask, .. } = adapter;
    WeightGrad { out: da, x, narrow: d_adapter_state_bf16, rows, a_rows, mask }
}

impl WeightGrad {
    fn groups(&self) -> (u32, u32) {
        groups(self.x.rows, self.x.columns, self.rows)
    }

    /// Floats of memory that the parts take; 0 if there is only one.
    pub fn parts_len(&self) -> usize {
        let (_, count) = self.groups();
        if count > 1 { count as usize * padded(self.x.columns) as usize * self.rows as usize } else { 0 }
    }

    /// The sum, or its parts, with [`WeightGrad::parts_len`] floats at `parts`.
    pub fn sum(&self, parts: Ptr) -> Launch {
        let &Self { out, x, narrow, rows, a_rows, mask } = self;
        let Operand { at: wide, rows: tokens, columns, pitch: wide_pitch } = x;
        let Operand { at: narrow, pitch: narrow_pitch, .. } = narrow;
        let Mask { seed, threshold, scale: keep_scale } = mask;
        let (part_tokens, count) = self.groups();
        let params = WeightGradParams {
            out,
            tokens,
            wide,
            wide_pitch,
            columns,
            narrow,
            narrow_pitch,
            rows,
            a_rows,
            seed,
            threshold,
            keep_scale,
            part_tokens,
            parts,
        };
        let grid = [columns.div_ceil(WIDE), count * rows.div_ceil(NARROW)];
        let shared = if mask.drops() { WEIGHT_GRAD_DROPPED_SHARED } else { WEIGHT_GRAD_SHARED };
        wide_launch("weight_grad", grid, shared, params.args())
    }

    /// What has to follow if there is more than one part.
    pub fn total(&self, parts: Ptr) -> Launch {
        let &Self { out, x: Operand { columns, .. }, rows, .. } = self;
        let params = WeightGradTotalParams { out, parts, count: self.groups().1, rows, columns };
        let twos = u64::from(rows) * u64::from(padded(columns) / 2);
        Launch::new("weight_grad_total", [blocks(twos), 1], 0, params.args())
    }
}
