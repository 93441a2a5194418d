//! What a device has to be able to do.
//!
//! Every operation writes into buffers that its caller owns; nothing is allocated but in [`Backend::buffer`] and
//! [`Backend::activation`]. Matrices are row-major, f32 but for activations; `tokens` says how many rows of a buffer take part, so that one set of buffers serves batches of any size
//! up to the planned one. Gradients are `d` + name. An operation *overwrites* its outputs unless it says *adds*.
//!
//! This is what models are run through; who loads, trains and evaluates by way of [`crate::model`] calls none of it. Operations take
//! buffers to be long enough and of the right kind, and ids and rows to be there: they panic, or fail, where these are not.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use crate::Result;
use crate::batch::Segment;
use crate::config::Config;
use core::ops::Range;
use hydra_kernels::dropout::Dropout;
pub use hydra_kernels::gate::Routing;
pub use hydra_kernels::gemm::Accumulate;
pub use hydra_kernels::quant::{Format, Weight};
pub use hydra_kernels::shape::HydraShape;

/// Which gate mixes an adapter's heads (the mathematics: `hydra_kernels::gate`).
pub use crate::adapter::GateKind;

/// Where one projection's adapter lies in the flat parameter buffer, and what kind it is.
#[derive(Clone, Debug)]
pub struct AdapterSlot {
    /// Rank, heads and dimensions; `tokens` is filled in at each call.
    pub shape: HydraShape,
    /// What mixes the heads.
    pub gate: GateKind,
    /// How the router's logits become weights.
    pub routing: Routing,
    /// alpha / rank.
    pub scale: f32,
    /// The stacked `[A; R]`, `[stacked_rows, d_in]`.
    pub a: Range<usize>,
    /// `B`, `[d_out, lora_heads * rank]`.
    pub b: Range<usize>,
}

impl AdapterSlot {
    /// This slot's shape for a batch of `tokens`.
    pub fn shape(&self, tokens: usize) -> HydraShape {
        HydraShape { tokens, ..self.shape }
    }
}

/// Dropout in this call.
#[derive(Clone, Copy, Debug)]
pub struct DropoutKey {
    /// Probability of dropping a value.
    pub p: f32,
    /// Names the mask: the same seed draws the same mask again, in the backward pass.
    pub seed: u64,
}

impl DropoutKey {
    /// The mask of an operand whose first row is row `first_row` of the pass.
    pub fn mask(self, first_row: usize) -> Dropout {
        Dropout { p: self.p, seed: self.seed, first_row: first_row as u64 }
    }
}

/// An adapter as a linear operation reads it.
pub struct AdapterArgs<'a, B: Backend + ?Sized> {
    /// Kind, shape and place.
    pub slot: &'a AdapterSlot,
    /// All trainable parameters, flat.
    pub params: &'a B::Buffer,
    /// Each token's head for the label gate, `[tokens]`.
    pub labels: &'a [u32],
    /// Dropout on the adapter's input, if this is a training step that wants it.
    pub dropout: Option<DropoutKey>,
    /// Dropout on the mixed heads, the same.
    pub head_dropout: Option<DropoutKey>,
    /// The weight of the load-balance term over this pass's tokens; 0 for none. (`slot.routing`'s isn't read.)
    pub balance: f32,
}

/// Keys and values that every segment of a batch attends to before its own: a shared prompt, or a generation's past.
pub struct Prefix<'a, B: Backend + ?Sized> {
    /// `[len, kv_heads * head_dim]`, rotated.
    pub k: &'a B::Buffer,
    /// `[len, kv_heads * head_dim]`.
    pub v: &'a B::Buffer,
    /// Rows in use.
    pub len: usize,
}

/// The sizes of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Width of a row of queries.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of a row of keys or values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Query heads that share a key head.
    pub fn group(&self) -> usize {
        self.n_heads / self.kv_heads
    }
}

/// AdamW's constants (Loshchilov & Hutter, arXiv 1711.05101).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// A device that runs the model.
pub trait Backend: Sync {
    /// Memory of the device.
    type Buffer: Send + Sync;
    /// A frozen matrix in the form in which the device multiplies it; may borrow the checkpoint's mapping for `'w`.
    type Matrix<'w>: Send + Sync;

    /// Runs many operations in a row; a device whose threads do the work may do it on one of them, so that none has to be
    /// woken for each operation.
    fn inside<R: Send>(&self, op: impl FnOnce() -> R + Send) -> R {
        op()
    }

    /// A zeroed f32 buffer of `len` values.
    fn buffer(&self, len: usize) -> Result<Self::Buffer>;
    /// A zeroed buffer for what products read: normalised rows, queries, keys, values, the feed-forward's inner values, and
    /// the gradients of these. It may hold fewer bits than f32; everything else comes from [`Backend::buffer`].
    fn activation(&self, len: usize) -> Result<Self::Buffer> {
        self.buffer(len)
    }
    /// Bytes of a value of [`Backend::activation`].
    fn activation_bytes(&self) -> usize {
        size_of::<f32>()
    }
    /// Copies `from` to the start of `to`.
    fn upload(&self, to: &mut Self::Buffer, from: &[f32]) -> Result<()>;
    /// Copies the start of `from` into `to`.
    fn download(&self, to: &mut [f32], from: &Self::Buffer) -> Result<()>;
    /// Copies `len` values to `to[to_start..]` from the start of `from`.
    fn copy(&self, to: &mut Self::Buffer, to_start: usize, from: &Self::Buffer, len: usize) -> Result<()>;
    /// Sets the first `len` values to zero.
    fn zero(&self, buffer: &mut Self::Buffer, len: usize) -> Result<()>;
    /// Takes a frozen weight into the device's keeping.
    fn matrix<'w>(&self, weight: Weight<'w>) -> Result<Self::Matrix<'w>>;

    /// `out[t] = table[tokens[t]]`; table [vocab, d], out [tokens, d].
    fn embed(&self, out: &mut Self::Buffer, table: &Self::Matrix<'_>, tokens: &[u32]) -> Result<()>;

    /// y = x · inv_rms · weight, with `inv_rms[t]` = 1/√(mean over a row of x² + eps); x, y [tokens, d] with d = weight's length.
    fn rms_norm(
        &self,
        y: &mut Self::Buffer,
        inv_rms: &mut Self::Buffer,
        tokens: usize,
        x: &Self::Buffer,
        weight: &Self::Buffer,
        eps: f32,
    ) -> Result<()>;
    /// *Adds* to `dx` the gradient of [`Backend::rms_norm`]: dx += inv_rms · (dy∘w − x · inv_rms² · mean(dy∘w∘x)).
    fn rms_norm_backward(
        &self,
        dx: &mut Self::Buffer,
        tokens: usize,
        dy: &Self::Buffer,
        x: &Self::Buffer,
        inv_rms: &Self::Buffer,
        weight: &Self::Buffer,
    ) -> Result<()>;

    /// Rotates each head of `x` [tokens, n_heads · head_dim] in place (RoPE, arXiv 2104.09864, halves paired as in Hugging Face's
    /// LLaMA) by its token's position; `table` is [positions, head_dim]: cosines, then sines. `inverse` undoes it, which is also its gradient.
    fn rope(
        &self,
        x: &mut Self::Buffer,
        n_heads: usize,
        head_dim: usize,
        table: &Self::Buffer,
        positions: &[u32],
        inverse: bool,
    ) -> Result<()>;

    /// Frozen linear and adapter: y = residual + x Wᵀ + scale · mixed Bᵀ; y and, if there is one, residual [tokens, d_out], both
    /// of one kind, x [tokens, d_in].
    /// Beside the adapter comes `adapter_state` [tokens, a_rows + lora_heads], which receives what the backward pass needs: `[down | gate]`.
    #[allow(clippy::too_many_arguments)]
    fn linear(
        &self,
        y: &mut Self::Buffer,
        residual: Option<&Self::Buffer>,
        tokens: usize,
        x: &Self::Buffer,
        weight: &Self::Matrix<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &mut Self::Buffer)>,
    ) -> Result<()>;
    /// The gradient of [`Backend::linear`]: `dx` (if wanted) is overwritten or added to; the adapter's gradients are *added* to
    /// `dparams`, which is laid out as the parameters. `adapter_state` is what the forward pass wrote.
    #[allow(clippy::too_many_arguments)]
    fn linear_backward(
        &self,
        dx: Option<(&mut Self::Buffer, Accumulate)>,
        dparams: Option<&mut Self::Buffer>,
        tokens: usize,
        dy: &Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Matrix<'_>,
        adapter: Option<(&AdapterArgs<'_, Self>, &Self::Buffer)>,
    ) -> Result<()>;

    /// Causal attention inside each segment, after the prefix: o = softmax(q kᵀ / √head_dim) v, blocked, scores never stored
    /// (Dao et al., arXiv 2205.14135). `lse` [tokens, n_heads] is the log of each row's softmax denominator.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        o: &mut Self::Buffer,
        lse: &mut Self::Buffer,
        shape: AttentionShape,
        segments: &[Segment],
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        prefix: Option<Prefix<'_, Self>>,
    ) -> Result<()>;
    /// The gradient of [`Backend::attention`] without a prefix; dq, dk, dv are overwritten.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        dq: &mut Self::Buffer,
        dk: &mut Self::Buffer,
        dv: &mut Self::Buffer,
        shape: AttentionShape,
        segments: &[Segment],
        d_o: &Self::Buffer,
        o: &Self::Buffer,
        lse: &Self::Buffer,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
    ) -> Result<()>;

    /// out = silu(gate) ∘ up, each `len` values.
    fn swiglu(&self, out: &mut Self::Buffer, len: usize, gate: &Self::Buffer, up: &Self::Buffer) -> Result<()>;
    /// The gradient of [`Backend::swiglu`]: `dgate` holds d out on entry and d gate on return; `dup` is overwritten.
    fn swiglu_backward(
        &self,
        dgate: &mut Self::Buffer,
        dup: &mut Self::Buffer,
        len: usize,
        gate: &Self::Buffer,
        up: &Self::Buffer,
    ) -> Result<()>;

    /// `out[i] = x[rows[i]]`, rows of width `d`; both buffers, or both activations and `d` even.
    fn gather(&self, out: &mut Self::Buffer, x: &Self::Buffer, rows: &[u32], d: usize) -> Result<()>;
    /// `out[rows[i]] = x[i]`, zero elsewhere; out [tokens, d], `rows` ascending without repetition.
    fn scatter(&self, out: &mut Self::Buffer, tokens: usize, x: &Self::Buffer, rows: &[u32], d: usize) -> Result<()>;

    /// Head and cross-entropy in one, by vocabulary blocks, without a [rows, vocab] buffer: `nll[i]` is the negative log-likelihood
    /// of `targets[i]` given row i of x; `dx`, if wanted, is `scale` times its gradient. x, dx [targets, d]; head [vocab, d].
    fn head_loss(
        &self,
        nll: &mut Self::Buffer,
        dx: Option<&mut Self::Buffer>,
        x: &Self::Buffer,
        head: &Self::Matrix<'_>,
        targets: &[u32],
        scale: f32,
    ) -> Result<()>;
    /// `out[i, j] = head[ids[j]] · x[i]`, only those rows of the head.
    fn head_rows(
        &self,
        out: &mut [f32],
        x: &Self::Buffer,
        rows: usize,
        head: &Self::Matrix<'_>,
        ids: &[u32],
    ) -> Result<()>;

    /// Σ x² over the first `len` values, in an order that does not depend on the number of threads.
    fn sum_of_squares(&self, x: &Self::Buffer, len: usize) -> Result<f64>;
    /// One AdamW step (t counted from 1): on each of these ranges of the parameters, which don't overlap, at its learning rate.
    /// Gradients are scaled by `grad_scale` as they are read.
    #[allow(clippy::too_many_arguments)]
    fn adamw(
        &self,
        params: &mut Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
        grads: &Self::Buffer,
        rates: &[(Range<usize>, f32)],
        adam: AdamW,
        t: u64,
        grad_scale: f32,
    ) -> Result<()>;

    /// A name for people: device, instruction set, threads, precision.
    fn describe(&self) -> String;
    /// Bytes of the device's own memory that are free now; `None` where it is the machine's.
    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
    /// Bytes that the backend keeps for itself, for a model of this configuration and `tokens` rows.
    fn workspace_bytes(&self, tokens: usize, config: &Config) -> u64;
}
