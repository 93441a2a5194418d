//! The arguments of a [`Backend`]'s operations. Outputs come first, then inputs, weights, and what the forward pass saved.

use super::{Accumulate, Backend, HydraShape, Routing};
use crate::batch::Segment;
use core::num::NonZeroUsize;
use core::ops::Range;
use hydra_kernels::dropout::Dropout;

/// Values of either kind, to read.
pub enum AnyBuffer<'a, B: Backend + ?Sized> {
    /// f32.
    Buffer(&'a B::Buffer),
    /// In the device's precision for activations.
    Activations(&'a B::Activations),
}

/// Values of either kind, to write.
pub enum AnyBufferMut<'a, B: Backend + ?Sized> {
    /// f32.
    Buffer(&'a mut B::Buffer),
    /// In the device's precision for activations.
    Activations(&'a mut B::Activations),
}

/// [`Backend::rms_norm`].
pub struct RmsNorm<'a, B: Backend + ?Sized> {
    /// [tokens, d].
    pub y: &'a mut B::Activations,
    /// `[tokens]`.
    pub inv_rms: &'a mut B::Buffer,
    /// Rows.
    pub tokens: usize,
    /// [tokens, d].
    pub x: &'a B::Buffer,
    /// `[d]`; its length is d.
    pub weight: &'a B::Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// [`Backend::rms_norm_backward`].
pub struct RmsNormBackward<'a, B: Backend + ?Sized> {
    /// [tokens, d], added to.
    pub dx: &'a mut B::Buffer,
    /// Rows.
    pub tokens: usize,
    /// [tokens, d].
    pub dy: &'a B::Buffer,
    /// [tokens, d].
    pub x: &'a B::Buffer,
    /// `[tokens]`, from the forward pass.
    pub inv_rms: &'a B::Buffer,
    /// `[d]`; its length is d.
    pub weight: &'a B::Buffer,
}

/// [`Backend::head_norm`].
pub struct HeadNorm<'a, B: Backend + ?Sized> {
    /// [heads, head_dim].
    pub y: &'a mut B::Activations,
    /// The heads of all rows: tokens · heads in a row.
    pub heads: usize,
    /// [heads, head_dim].
    pub x: &'a B::Activations,
    /// `[head_dim]`; its length is head_dim.
    pub weight: &'a B::Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// [`Backend::head_norm_backward`].
pub struct HeadNormBackward<'a, B: Backend + ?Sized> {
    /// [heads, head_dim]: the gradient of y on entry, that of x on return.
    pub dx: &'a mut B::Activations,
    /// The heads of all rows: tokens · heads in a row.
    pub heads: usize,
    /// [heads, head_dim].
    pub x: &'a B::Activations,
    /// `[head_dim]`; its length is head_dim.
    pub weight: &'a B::Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// [`Backend::rope`].
pub struct Rope<'a, B: Backend + ?Sized> {
    /// [tokens, n_heads · head_dim], rotated in place; halves of a head are paired as in Hugging Face's LLaMA.
    pub x: &'a mut B::Activations,
    /// Heads in a row.
    pub n_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// [positions, head_dim]: cosines, then sines.
    pub table: &'a B::Buffer,
    /// Each token's position, `[tokens]`.
    pub positions: &'a [u32],
    /// Rotates back, which is also the gradient.
    pub inverse: bool,
}

/// Where [`Backend::linear`] writes, and what is added to the product.
pub enum LinearOutput<'a, B: Backend + ?Sized> {
    /// f32.
    Buffer {
        /// [tokens, d_out].
        y: &'a mut B::Buffer,
        /// [tokens, d_out].
        residual: Option<&'a B::Buffer>,
    },
    /// In the device's precision for activations.
    Activations {
        /// [tokens, d_out].
        y: &'a mut B::Activations,
        /// [tokens, d_out].
        residual: Option<&'a B::Activations>,
    },
}

/// [`Backend::linear`].
pub struct Linear<'a, B: Backend + ?Sized> {
    /// Where the result goes.
    pub output: LinearOutput<'a, B>,
    /// Rows.
    pub tokens: usize,
    /// [tokens, d_in].
    pub x: &'a B::Activations,
    /// W [d_out, d_in].
    pub weight: &'a B::Matrix,
    /// `[d_out]`.
    pub bias: Option<&'a B::Buffer>,
    /// The adapter, and its state [tokens, a_rows + lora_heads]: `[A x | gate]`, written for the backward pass.
    pub adapter: Option<(&'a AdapterArgs<'a, B>, &'a mut B::Buffer)>,
}

/// [`Backend::linear_backward`].
pub struct LinearBackward<'a, B: Backend + ?Sized> {
    /// [tokens, d_in], if wanted: overwritten or added to.
    pub dx: Option<(AnyBufferMut<'a, B>, Accumulate)>,
    /// The adapter's gradients, laid out as its parameters, if wanted: added to.
    pub dparams: Option<&'a mut B::Buffer>,
    /// Rows.
    pub tokens: usize,
    /// [tokens, d_out].
    pub dy: AnyBuffer<'a, B>,
    /// [tokens, d_in].
    pub x: &'a B::Activations,
    /// W [d_out, d_in].
    pub weight: &'a B::Matrix,
    /// The adapter, and the state that the forward pass wrote.
    pub adapter: Option<(&'a AdapterArgs<'a, B>, &'a B::Buffer)>,
}

/// [`Backend::attention`].
pub struct Attention<'a, B: Backend + ?Sized> {
    /// [tokens, n_heads · head_dim].
    pub o: &'a mut B::Activations,
    /// The logarithm of each row's softmax denominator, [tokens, n_heads].
    pub lse: &'a mut B::Buffer,
    /// Heads and their width.
    pub shape: AttentionShape,
    /// The sequences' rows: contiguous, in order, from row 0.
    pub segments: &'a [Segment],
    /// The keys that a query sees, its own and those just before it; `None`: all before it.
    pub window: Option<NonZeroUsize>,
    /// [tokens, n_heads · head_dim], rotated.
    pub q: &'a B::Activations,
    /// [tokens, kv_heads · head_dim], rotated.
    pub k: &'a B::Activations,
    /// [tokens, kv_heads · head_dim].
    pub v: &'a B::Activations,
    /// What every segment continues.
    pub prefix: Option<Prefix<'a, B>>,
}

/// How the rows of a call are computed. Those of a kind have the same bits in any company; the two kinds round
/// differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    /// One row of each sequence: each weight is read once for all rows, as it is stored.
    Decode,
    /// Many rows: weights are packed.
    Prompt,
}

/// Rows that have the same adapter.
pub struct RowGroup<'a, B: Backend + ?Sized> {
    /// How many; they follow those of the groups before.
    pub rows: usize,
    /// Without dropout.
    pub adapter: Option<AdapterArgs<'a, B>>,
}

/// [`Backend::linear_rows`].
pub struct LinearRows<'a, B: Backend + ?Sized> {
    /// Where the result goes.
    pub output: LinearOutput<'a, B>,
    /// [rows, d_in].
    pub x: &'a B::Activations,
    /// W [d_out, d_in].
    pub weight: &'a B::Matrix,
    /// `[d_out]`.
    pub bias: Option<&'a B::Buffer>,
    /// How the rows are computed.
    pub kind: RowKind,
    /// All rows, from the first on.
    pub groups: &'a [RowGroup<'a, B>],
    /// The states of the groups that have an adapter, one after the other: [rows, a_rows + lora_heads] each.
    pub states: Option<&'a mut B::Buffer>,
}

/// Some rows of a sequence, and the keys and values of its tokens up to them.
pub struct CachedRows<'a, B: Backend + ?Sized> {
    /// Their place.
    pub rows: Segment,
    /// `[len + rows, kv_heads * head_dim]`, rotated: those of the rows themselves have been copied behind the others.
    pub k: &'a B::Activations,
    /// `[len + rows, kv_heads * head_dim]`.
    pub v: &'a B::Activations,
    /// The sequence's tokens before these rows.
    pub len: usize,
}

/// [`Backend::attention_rows`].
pub struct AttentionRows<'a, B: Backend + ?Sized> {
    /// [rows, n_heads · head_dim].
    pub o: &'a mut B::Activations,
    /// The logarithm of each row's softmax denominator, [rows, n_heads].
    pub lse: &'a mut B::Buffer,
    /// Heads and their width.
    pub shape: AttentionShape,
    /// The keys that a query sees, its own and those just before it; `None`: all before it.
    pub window: Option<NonZeroUsize>,
    /// [rows, n_heads · head_dim], rotated.
    pub q: &'a B::Activations,
    /// The rows' own keys, [rows, kv_heads · head_dim], rotated.
    pub k: &'a B::Activations,
    /// The rows' own values, [rows, kv_heads · head_dim].
    pub v: &'a B::Activations,
    /// How the rows are computed; of a [`RowKind::Decode`] each sequence has one.
    pub kind: RowKind,
    /// Contiguous, in order, from row 0.
    pub sequences: &'a [CachedRows<'a, B>],
}

/// [`Backend::attention_backward`].
pub struct AttentionBackward<'a, B: Backend + ?Sized> {
    /// [tokens, n_heads · head_dim].
    pub dq: &'a mut B::Activations,
    /// [tokens, kv_heads · head_dim].
    pub dk: &'a mut B::Activations,
    /// [tokens, kv_heads · head_dim].
    pub dv: &'a mut B::Activations,
    /// Heads and their width.
    pub shape: AttentionShape,
    /// The sequences' rows: contiguous, in order, from row 0.
    pub segments: &'a [Segment],
    /// The keys that a query sees, its own and those just before it; `None`: all before it.
    pub window: Option<NonZeroUsize>,
    /// The gradient of `o`, [tokens, n_heads · head_dim].
    pub d_o: &'a B::Activations,
    /// The forward pass's result.
    pub o: &'a B::Activations,
    /// The forward pass's, [tokens, n_heads].
    pub lse: &'a B::Buffer,
    /// The forward pass's queries.
    pub q: &'a B::Activations,
    /// The forward pass's keys.
    pub k: &'a B::Activations,
    /// The forward pass's values.
    pub v: &'a B::Activations,
}

/// [`Backend::head_loss`].
pub struct HeadLoss<'a, B: Backend + ?Sized> {
    /// The negative log-likelihood of each target, `[targets]`.
    pub nll: &'a mut B::Buffer,
    /// `scale` · the gradient of Σ nll in x, [targets, d], if wanted.
    pub dx: Option<&'a mut B::Buffer>,
    /// [targets, d]: row i predicts target i.
    pub x: &'a B::Activations,
    /// The output head, [vocab, d].
    pub lm_head: &'a B::Matrix,
    /// Ids.
    pub targets: &'a [u32],
    /// Factor of the gradient.
    pub scale: f32,
}

/// [`Backend::adamw`].
pub struct AdamWStep<'a, B: Backend + ?Sized> {
    /// Updated.
    pub params: &'a mut B::Buffer,
    /// The first moment, updated.
    pub exp_avg: &'a mut B::Buffer,
    /// The second moment, updated.
    pub exp_avg_sq: &'a mut B::Buffer,
    /// Gradients of `params`.
    pub grads: &'a B::Buffer,
    /// Ranges of the parameters, without overlap, and each one's learning rate. Parameters outside of them stay.
    pub rates: &'a [(Range<usize>, f32)],
    /// The constants.
    pub adam: AdamW,
    /// This step's number, counted from 1.
    pub step: u64,
    /// Factor of the gradients, applied as they are read.
    pub grad_scale: f32,
}

/// What mixes the heads (the mathematics: `hydra_kernels::gate`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateKind {
    /// A learned softmax of each token's input.
    Router,
    /// The head of the record's category.
    Label,
    /// All heads alike.
    Uniform,
    /// The only head.
    One,
}

impl GateKind {
    /// All of them.
    pub const ALL: [GateKind; 4] = [GateKind::Router, GateKind::Label, GateKind::Uniform, GateKind::One];

    /// The name in files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            GateKind::Router => "router",
            GateKind::Label => "label",
            GateKind::Uniform => "uniform",
            GateKind::One => "one",
        }
    }

    /// From its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|gate| gate.name() == name)
    }

    /// As the kernels take it; only a router has a routing.
    pub(crate) const fn with(self, routing: Routing) -> hydra_kernels::Gate {
        match self {
            GateKind::Router => hydra_kernels::Gate::Router(routing),
            GateKind::Label => hydra_kernels::Gate::Label,
            GateKind::Uniform => hydra_kernels::Gate::Uniform,
            GateKind::One => hydra_kernels::Gate::One,
        }
    }
}

/// Where one projection's adapter lies in the flat parameter buffer, and what kind it is.
#[derive(Clone, Debug)]
pub struct AdapterSlot {
    /// Rank, heads and dimensions.
    pub shape: HydraShape,
    /// What mixes the heads.
    pub gate: GateKind,
    /// How the router's logits become weights.
    pub routing: Routing,
    /// alpha / rank, or alpha / √rank for rsLoRA.
    pub scale: f32,
    /// The stacked `[A; R]`, `[stacked_rows, d_in]`.
    pub a: Range<usize>,
    /// `B`, `[d_out, lora_heads * rank]`.
    pub b: Range<usize>,
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
    /// Coefficient of the load-balancing loss over this pass's tokens; 0 for none.
    pub balance: f32,
}

/// Keys and values that every segment of a batch attends to before its own: a shared prompt, or a generation's past.
pub struct Prefix<'a, B: Backend + ?Sized> {
    /// `[len, kv_heads * head_dim]`, rotated.
    pub k: &'a B::Activations,
    /// `[len, kv_heads * head_dim]`.
    pub v: &'a B::Activations,
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
