//! Everything of a model that is no product: norms, rotations, the loss, the optimiser.

use super::*;
use crate::kernels::model::*;

/// y [rows, d] and inv_rms `[rows]`.
pub fn rms_norm(y: Rows, inv_rms: Ptr, rows: u32, x: Ptr, weight: Ptr, d: u32, eps: f32) -> Launch {
    let Rows { at: y, pitch: y_pitch } = y;
    let params = RmsNormParams { y, y_pitch, inv_rms, x, weight, d, eps };
    Launch::new("rms_norm", [rows, 1], REDUCE_SHARED, params.args())
}

/// dx [rows, d] += the gradient.
pub fn rms_norm_backward(dx: Ptr, rows: u32, dy: Ptr, x: Ptr, inv_rms: Ptr, weight: Ptr, d: u32) -> Launch {
    let params = RmsNormBackwardParams { dx, dy, x, inv_rms, weight, d };
    Launch::new("rms_norm_backward", [rows, 1], REDUCE_SHARED, params.args())
}

/// y [heads, d]: each head of x normalised; d is even.
pub fn head_norm(y: Ptr, x: Ptr, weight: Ptr, [heads, d]: [u32; 2], eps: f32) -> Launch {
    let params = HeadNormParams { y, x, weight, heads, d, eps };
    Launch::new("head_norm", [heads.div_ceil(THREADS / 32), 1], 0, params.args())
}

/// dx [rows, n_heads · d] holds the gradient of y and becomes that of x; d is even.
pub fn head_norm_backward(dx: Rows, x: Ptr, weight: Ptr, [rows, n_heads, d]: [u32; 3], eps: f32) -> Launch {
    let (Rows { at: dx, pitch }, heads) = (dx, rows * n_heads);
    let params = HeadNormBackwardParams { dx, pitch, n_heads, x, weight, heads, d, eps };
    Launch::new("head_norm_backward", [heads.div_ceil(THREADS / 32), 1], 0, params.args())
}

/// y [rows, d] += bias.
pub fn add_bias(y: Values, rows: u32, bias: Ptr, d: u32) -> Launch {
    let groups = u64::from(rows) * u64::from(d.div_ceil(8));
    let params = AddBiasParams { y: y.at, bf16: y.bf16.into(), bias, rows, d };
    Launch::new("add_bias", [blocks(groups), 1], 0, params.args())
}

/// Rotates x [tokens, n_heads · d] by `positions` `[tokens]`, or back.
pub fn rope(x: Rows, tokens: u32, n_heads: u32, d: u32, table: Ptr, positions: Ptr, inverse: bool) -> Launch {
    let groups = u64::from(tokens) * u64::from(n_heads) * u64::from((d / 2).div_ceil(8));
    let sign = if inverse { -1.0 } else { 1.0 };
    let Rows { at: x, pitch } = x;
    let params = RopeParams { x, pitch, table, positions, tokens, n_heads, d, sign };
    Launch::new("rope", [blocks(groups), 1], 0, params.args())
}

/// Blocks of threads that have eight neighbours each of a matrix [rows, d].
fn eights(rows: u32, d: u32) -> u32 {
    let count = u64::from(rows) * u64::from(d.div_ceil(8));
    u32::try_from(count).expect("a matrix of less than 2^35 values").div_ceil(THREADS)
}

/// out [rows, d] = silu(gate) ∘ up.
pub fn swiglu(out: Rows, [rows, d]: [u32; 2], gate: Ptr, up: Ptr) -> Launch {
    let Rows { at: out, pitch } = out;
    let params = SwigluParams { out, pitch, gate, up, rows, d };
    Launch::new("swiglu", [eights(rows, d), 1], 0, params.args())
}

/// `dgate` [rows, d] holds the output's gradient and becomes the gate's; `dup` is overwritten.
pub fn swiglu_backward(dgate: Rows, dup: Rows, [rows, d]: [u32; 2], gate: Ptr, up: Ptr) -> Launch {
    let (Rows { at: dgate, pitch: dgate_pitch }, Rows { at: dup, pitch: dup_pitch }) = (dgate, dup);
    let params = SwigluBackwardParams { dgate, dgate_pitch, dup, dup_pitch, gate, up, rows, d };
    Launch::new("swiglu_backward", [eights(rows, d), 1], 0, params.args())
}

/// `out[t]` = `table[ids[t]]`.
pub fn embed(out: Ptr, tokens: u32, table: &Matrix, ids: Ptr) -> Launch {
    let (format, pitch, d) = (table.format.code(), table.pitch, table.columns);
    let params = EmbedParams { out, table: table.data, scales: table.scales, format, pitch, d, ids };
    Launch::new("embed", [tokens, 1], 0, params.args())
}

/// `out[i]` = `x[rows[i]]`, rows of `d` words of 32 bits; x's pitch is in such words.
pub fn gather(out: Ptr, x: Rows, rows: Ptr, count: u32, d: u32) -> Launch {
    let Rows { at: x, pitch: x_pitch } = x;
    Launch::new("gather", [count, 1], 0, MoveRowsParams { out, x, x_pitch, rows, d }.args())
}

/// `out[rows[i]]` = `x[i]`, rows of `d` words of 32 bits.
pub fn scatter(out: Ptr, x: Ptr, rows: Ptr, count: u32, d: u32) -> Launch {
    Launch::new("scatter", [count, 1], 0, MoveRowsParams { out, x, x_pitch: d, rows, d }.args())
}

/// The cross-entropy of some rows, while blocks of the vocabulary pass by.
#[derive(Clone, Copy, Debug)]
pub struct RunningLoss {
    /// Rows.
    pub rows: u32,
    /// Columns of dx.
    pub d: u32,
    /// Each row's target id, `[rows]`.
    pub targets: Ptr,
    /// The running softmax, [rows, [`LOSS_STATE`]].
    pub state: Ptr,
    /// [rows, d], or null where no gradient is needed.
    pub dx: Ptr,
}

/// The logits of a block of ids.
#[derive(Clone, Copy, Debug)]
pub struct LogitsBlock {
    /// [rows, count].
    pub logits: Ptr,
    /// The first id.
    pub first: u32,
    /// Ids.
    pub count: u32,
}

/// The operand `p` [rows, count] = exp(logit − max); the running softmax and dx are rescaled to the new maximum.
pub fn online_softmax(p: Ptr, block: &LogitsBlock, loss: &RunningLoss) -> Launch {
    let &LogitsBlock { logits, first, count } = block;
    let &RunningLoss { rows, d, targets, state, dx } = loss;
    let params = OnlineSoftmaxParams { p, state, dx, logits, count, targets, first, d };
    Launch::new("online_softmax", [rows, 1], REDUCE_SHARED, params.args())
}

/// `nll` `[rows]` and the finished dx, times `scale`.
pub fn finish_loss(nll: Ptr, loss: &RunningLoss, lm_head: &Matrix, scale: f32) -> Launch {
    let &RunningLoss { rows, d, targets, state, dx } = loss;
    let &Matrix { format, data, scales, .. } = lm_head;
    let (format, pitch) = (format.code(), lm_head.pitch);
    let params = FinishLossParams { nll, dx, state, lm_head: data, scales, format, pitch, targets, d, scale };
    Launch::new("finish_loss", [rows, 1], 0, params.args())
}

/// The number of partial sums in [`squares`] for `len` values.
pub fn squares_parts(len: u64) -> u32 {
    u32::try_from(len.div_ceil(u64::from(SQUARES_PER_BLOCK))).expect("fewer blocks than 2^32")
}

/// `parts` (f64) = sums of x² over 16 Ki values each.
pub fn squares(parts: Ptr, x: Ptr, len: u64) -> Launch {
    Launch::new("squares", [squares_parts(len), 1], SQUARES_SHARED, SquaresParams { parts, x, len }.args())
}

/// `out` (f64) = Σ parts.
pub fn squares_total(out: Ptr, parts: Ptr, count: u32) -> Launch {
    Launch::new("squares_total", [1, 1], SQUARES_SHARED, SquaresTotalParams { out, parts, count }.args())
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
    /// Factor of the gradients.
    pub grad_scale: f32,
}

/// One step on `len` parameters.
pub fn adamw([params, m, v]: [Ptr; 3], grads: Ptr, len: u64, adam: &AdamWStep) -> Launch {
    let &AdamWStep { beta1, beta2, eps, keep, step, root, grad_scale } = adam;
    let params = AdamWParams { params, m, v, grads, len, beta1, beta2, eps, keep, step, root, grad_scale };
    Launch::new("adamw", [blocks(len), 1], 0, params.args())
}
