//! Everything of a model that is no product: norms, rotations, the loss, the optimiser.

use super::*;

/// y [rows, d] and inv_rms `[rows]`.
pub fn rms_norm(y: Ptr, inv_rms: Ptr, rows: u32, x: Ptr, weight: Ptr, d: u32, eps: f32) -> Launch {
    launch!("rms_norm", [rows, 1], REDUCE_SHARED, y, inv_rms, x, weight, d, eps)
}

/// dx [rows, d] += the gradient.
pub fn rms_norm_backward(dx: Ptr, rows: u32, dy: Ptr, x: Ptr, inv_rms: Ptr, weight: Ptr, d: u32) -> Launch {
    launch!("rms_norm_backward", [rows, 1], REDUCE_SHARED, dx, dy, x, inv_rms, weight, d)
}

/// Turns x [tokens, heads · d] by `positions` `[tokens]`, or back.
pub fn rope(x: Ptr, tokens: u32, heads: u32, d: u32, table: Ptr, positions: Ptr, inverse: bool) -> Launch {
    let groups = u64::from(tokens) * u64::from(heads) * u64::from((d / 2).div_ceil(8));
    let sign = if inverse { -1f32 } else { 1.0 };
    launch!("rope", [blocks(groups), 1], 0, x, table, positions, tokens, heads, d, sign)
}

/// out = silu(gate) ∘ up.
pub fn swiglu(out: Ptr, len: u64, gate: Ptr, up: Ptr) -> Launch {
    launch!("swiglu", [blocks(len.div_ceil(8)), 1], 0, out, gate, up, len)
}

/// dgate: d out → d gate; dup is overwritten.
pub fn swiglu_backward(dgate: Ptr, dup: Ptr, len: u64, gate: Ptr, up: Ptr) -> Launch {
    launch!("swiglu_backward", [blocks(len.div_ceil(8)), 1], 0, dgate, dup, gate, up, len)
}

/// `out[t]` = `table[ids[t]]`.
pub fn embed(out: Ptr, tokens: u32, table: &Matrix, ids: Ptr) -> Launch {
    let (format, pitch) = (table.format.code(), table.pitch());
    launch!("embed", [tokens, 1], 0, out, table.data, table.scales, format, pitch, table.columns, ids)
}

/// `out[i]` = `x[rows[i]]`.
pub fn gather(out: Ptr, x: Ptr, rows: Ptr, count: u32, d: u32) -> Launch {
    launch!("gather", [count, 1], 0, out, x, rows, d)
}

/// `out[rows[i]]` = `x[i]`.
pub fn scatter(out: Ptr, x: Ptr, rows: Ptr, count: u32, d: u32) -> Launch {
    launch!("scatter", [count, 1], 0, out, x, rows, d)
}

/// Floats of a row's state in [`online_softmax`].
pub const LOSS_STATE: usize = 3;

/// Logits [rows, count] of ids `first ..` to bf16 weights `p`; see the kernel.
#[allow(clippy::too_many_arguments)]
pub fn online_softmax(
    p: Ptr,
    state: Ptr,
    dx: Ptr,
    rows: u32,
    logits: Ptr,
    count: u32,
    targets: Ptr,
    first: u32,
    d: u32,
) -> Launch {
    launch!("soften", [rows, 1], REDUCE_SHARED, p, state, dx, logits, count, targets, first, d)
}

/// `nll` and the finished dx.
pub fn finish_loss(nll: Ptr, dx: Ptr, rows: u32, state: Ptr, head: &Matrix, targets: Ptr, scale: f32) -> Launch {
    let (format, pitch, d) = (head.format.code(), head.pitch(), head.columns);
    let grid = [rows, 1];
    launch!("finish_loss", grid, 0, nll, dx, state, head.data, head.scales, format, pitch, targets, d, scale)
}

/// Partial sums of [`squares`] for `len` values.
pub fn squares_parts(len: u64) -> u32 {
    u32::try_from(len.div_ceil(u64::from(SQUARES_PER_BLOCK))).expect("fewer blocks than 2^32")
}

/// `parts` (f64) = sums of x² over 16 Ki values each.
pub fn squares(parts: Ptr, x: Ptr, len: u64) -> Launch {
    launch!("squares", [squares_parts(len), 1], SQUARES_SHARED, parts, x, len)
}

/// `out` (f64) = Σ parts.
pub fn squares_total(out: Ptr, parts: Ptr, count: u32) -> Launch {
    launch!("squares_total", [1, 1], SQUARES_SHARED, out, parts, count)
}

/// AdamW's constants in one step.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// 1 − lr · weight decay.
    pub keep: f32,
    /// lr / (1 − β₁ᵗ).
    pub step: f32,
    /// √(1 − β₂ᵗ).
    pub root: f32,
    /// What gradients are multiplied with.
    pub grad_scale: f32,
}

/// One step on `len` parameters.
pub fn adamw([params, m, v]: [Ptr; 3], grads: Ptr, len: u64, adam: &AdamWStep) -> Launch {
    let &AdamWStep { beta1, beta2, eps, keep, step, root, grad_scale } = adam;
    let grid = [blocks(len), 1];
    launch!("adamw", grid, 0, params, m, v, grads, len, beta1, beta2, eps, keep, step, root, grad_scale)
}
