//! The adapter's products, its gate and its gradients.

use super::*;

/// An adapter's sizes and its gate.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Rows of A.
    pub a_rows: u32,
    /// Rows of [A; R].
    pub stacked: u32,
    /// Heads.
    pub heads: u32,
    /// Rank of a head.
    pub rank: u32,
    /// One A a head.
    pub per_head: bool,
    /// One of `sizes::GATE_*`.
    pub gate: u32,
    /// Each token's label, for `GATE_LABEL`.
    pub labels: Ptr,
    /// The router's logits are multiplied by it.
    pub sharpness: f32,
    /// So many of a token's largest logits take part; as many as there are heads, or more, is all.
    pub top_k: u32,
    /// Dropout on the mixed heads.
    pub mask: Mask,
}

impl Heads {
    /// Columns of adapter_state.
    pub fn state_width(&self) -> u32 {
        self.a_rows + self.heads
    }

    /// Columns of mixed.
    pub fn mixed(&self) -> u32 {
        self.heads * self.rank
    }
}

/// Dropout, as `hydra_kernels::dropout` has it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mask {
    /// Names the mask.
    pub seed: u64,
    /// p · 2¹⁶; 0 drops nothing.
    pub threshold: u32,
    /// 1 / (1 − p).
    pub scale: f32,
}

fn skinny_shared(mask: Mask) -> u32 {
    if mask.threshold > 0 { SKINNY_DROPPED_SHARED } else { SKINNY_SHARED }
}

/// bf16 values of [A; R] as [`down`] takes it.
pub fn split_len(rows: u32, width: u32) -> usize {
    2 * rows as usize * width.next_multiple_of(SKINNY_DEPTH) as usize
}

/// `out` = x [rows, width], f32, in two parts of bf16: [`split_len`] values.
pub fn split(out: Ptr, x: Ptr, rows: u32, width: u32) -> Launch {
    let chunks = u64::from(rows) * u64::from(width.next_multiple_of(SKINNY_DEPTH) / 8);
    launch!("split", [blocks(chunks), 1], 0, out, x, rows, width)
}

/// From the operand x and [A; R] after [`split`] (`a`), `adapter_state` = [D(x) Aᵀ | gate(x Rᵀ)] and the operand `mixed` = scale · H(gate ∘ down).
#[allow(clippy::too_many_arguments)]
pub fn down(
    adapter_state: Ptr,
    mixed: Ptr,
    tokens: u32,
    x: Ptr,
    d_in: u32,
    a: Ptr,
    heads: &Heads,
    scale: f32,
    mask: Mask,
) -> Launch {
    let &Heads { a_rows, stacked, heads, rank, per_head, gate, labels, sharpness, top_k, mask: heads_mask } = heads;
    let Mask { seed, threshold, scale: keep_scale } = mask;
    launch!(
        "down",
        [tokens.div_ceil(SKINNY), 1],
        skinny_shared(mask),
        adapter_state,
        mixed,
        tokens,
        x,
        d_in,
        a,
        stacked,
        scale,
        a_rows,
        heads,
        rank,
        per_head,
        gate,
        labels,
        sharpness,
        top_k,
        heads_mask.seed,
        heads_mask.threshold,
        heads_mask.scale,
        seed,
        threshold,
        keep_scale
    )
}

/// The same for a few tokens, without dropout and from [A; R] itself, f32 (`a`).
#[allow(clippy::too_many_arguments)]
pub fn few_down(
    adapter_state: Ptr,
    mixed: Ptr,
    tokens: u32,
    x: Ptr,
    d_in: u32,
    a: Ptr,
    heads: &Heads,
    scale: f32,
) -> Launch {
    let &Heads { a_rows, stacked, heads, rank, per_head, gate, labels, sharpness, top_k, .. } = heads;
    launch!(
        "few_down",
        [tokens, 1],
        few_shared(stacked),
        adapter_state,
        mixed,
        tokens,
        x,
        d_in,
        a,
        stacked,
        scale,
        a_rows,
        heads,
        rank,
        per_head,
        gate,
        labels,
        sharpness,
        top_k
    )
}

/// `push`, a value a head, from the gates in `adapter_state` of all of a pass's tokens: what the load-balance term of weight `balance` adds to
/// each token's dgate.
pub fn gate_push(push: Ptr, adapter_state: Ptr, tokens: u32, heads: &Heads, balance: f32) -> Launch {
    let &Heads { a_rows, heads, .. } = heads;
    let scale = balance * heads as f32 / tokens.max(1) as f32;
    launch!("gate_push", [heads, 1], SQUARES_SHARED, push, adapter_state, tokens, a_rows, heads, scale)
}

/// Where [`up_backward`] writes.
#[derive(Clone, Copy, Debug)]
pub struct UpBackward {
    /// [tokens, a_rows + heads].
    pub d_adapter_state: Ptr,
    /// An operand, [tokens, stacked rows].
    pub dhidden16: Ptr,
    /// The same with zeros for A's part, which goes through dropout; or null.
    pub through: Ptr,
    /// An operand, [tokens, heads · rank].
    pub mixed: Ptr,
    /// [tokens, heads · rank].
    pub dmixed: Ptr,
}

/// From the operands `dy` and `b` [d_out, heads · rank] to the gradient of `adapter_state`; `push` is [`gate_push`]'s or null.
#[allow(clippy::too_many_arguments)]
pub fn up_backward(
    out: &UpBackward,
    tokens: u32,
    dy: Ptr,
    d_out: u32,
    b: Ptr,
    adapter_state: Ptr,
    push: Ptr,
    heads: &Heads,
    scale: f32,
) -> Launch {
    let &UpBackward { d_adapter_state, dhidden16, through, mixed, dmixed } = out;
    let &Heads { a_rows, stacked, heads, rank, per_head, gate, sharpness, mask, .. } = heads;
    launch!(
        "up_backward",
        [tokens.div_ceil(SKINNY), 1],
        SKINNY_SHARED,
        d_adapter_state,
        dhidden16,
        through,
        mixed,
        dmixed,
        tokens,
        dy,
        d_out,
        b,
        adapter_state,
        push,
        scale,
        stacked,
        a_rows,
        heads,
        rank,
        per_head,
        gate,
        sharpness,
        mask.seed,
        mask.threshold,
        mask.scale
    )
}

/// A sum over tokens of outer products, which is added to `out`(c, j) at `out[c · c_stride + j · j_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    out: Ptr,
    strides: [u32; 2],
    tokens: u32,
    big: Ptr,
    columns: u32,
    small: Ptr,
    rows: u32,
    scale: f32,
    a_rows: u32,
    mask: Mask,
}

/// `db` [d_out, heads · rank] += scale · dyᵀ mixed; both are operands.
pub fn db(db: Ptr, tokens: u32, dy: Ptr, d_out: u32, mixed: Ptr, heads: &Heads, scale: f32) -> Outer {
    let (rows, mask) = (heads.mixed(), Mask::default());
    let (big, columns, small) = (dy, d_out, mixed);
    Outer { out: db, strides: [rows, 1], tokens, big, columns, small, rows, scale, a_rows: 0, mask }
}

/// d[A; R] [stacked, d_in] += dhiddenᵀ D(x); both are operands.
pub fn da(da: Ptr, tokens: u32, x: Ptr, d_in: u32, dhidden16: Ptr, heads: &Heads, mask: Mask) -> Outer {
    let (big, columns, small) = (x, d_in, dhidden16);
    let (rows, a_rows) = (heads.stacked, heads.a_rows);
    Outer { out: da, strides: [1, d_in], tokens, big, columns, small, rows, scale: 1.0, a_rows, mask }
}

impl Outer {
    /// Tokens of a block, and how many blocks that makes for each tile: more than one where tiles are few.
    fn shares(&self) -> (u32, u32) {
        let tiles = self.columns.div_ceil(SKINNY) * self.rows.div_ceil(SKINNY);
        let wanted = (OUTER_BLOCKS / tiles.max(1)).max(1);
        let share = self.tokens.div_ceil(wanted).next_multiple_of(SKINNY_DEPTH);
        (share, self.tokens.div_ceil(share.max(1)))
    }

    /// Floats of room that the sum needs.
    pub fn parts(&self) -> usize {
        let (_, shares) = self.shares();
        if shares > 1 { shares as usize * self.columns as usize * self.rows as usize } else { 0 }
    }

    /// The sum, in `parts` if it needs room.
    pub fn sum(&self, parts: Ptr) -> Launch {
        let &Self { out, strides: [c_stride, j_stride], tokens, big, columns, small, rows, scale, a_rows, mask } = self;
        let (share, shares) = self.shares();
        let grid = [columns.div_ceil(SKINNY), rows.div_ceil(SKINNY) * shares];
        let Mask { seed, threshold, scale: keep_scale } = mask;
        launch!(
            "outer",
            grid,
            skinny_shared(mask),
            out,
            c_stride,
            j_stride,
            tokens,
            big,
            columns,
            small,
            rows,
            scale,
            a_rows,
            seed,
            threshold,
            keep_scale,
            share,
            parts
        )
    }

    /// What is to follow, if it needed room.
    pub fn total(&self, parts: Ptr) -> Launch {
        let &Self { out, strides: [c_stride, j_stride], columns, rows, scale, .. } = self;
        let (_, shares) = self.shares();
        let grid = [blocks(u64::from(columns) * u64::from(rows)), 1];
        launch!("outer_total", grid, 0, out, c_stride, j_stride, parts, shares, columns, rows, scale)
    }
}

/// `dx` [tokens, d_in] += D(ddown A).
pub fn dropped_add(
    dx: Values,
    tokens: u32,
    d_in: u32,
    d_adapter_state: Ptr,
    a: Ptr,
    heads: &Heads,
    mask: Mask,
) -> Launch {
    let grid = [d_in.div_ceil(THREADS), tokens.div_ceil(DROPPED_TOKENS)];
    let Mask { seed, threshold, scale } = mask;
    let (adapter_state, a_rows) = (heads.state_width(), heads.a_rows);
    launch!(
        "dropped_add",
        grid,
        0,
        dx.at,
        dx.bf16,
        tokens,
        d_in,
        d_adapter_state,
        adapter_state,
        a,
        a_rows,
        seed,
        threshold,
        scale
    )
}
