//! What a device has to be able to do.
//!
//! A device has memory of two kinds: [`Backend::Buffer`] holds f32, [`Backend::Activations`] holds what products read and may
//! round it to bf16. Matrices are row-major. Every operation writes into buffers of its caller; only [`Backend::buffer`] and
//! [`Backend::activations`] allocate. `tokens` says how many rows of a buffer take part, so that buffers that were planned for
//! the longest batch serve shorter ones. A gradient is called `d` + name. An operation *overwrites* its outputs unless it says
//! *adds*.
//!
//! Models run on this interface. A program that loads, trains and evaluates through [`crate::model`] calls none of it.
//!
//! # Panics
//! Operations panic, or fail, if a buffer is too short or an id or a row is out of range.

mod arguments;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;

pub use arguments::*;
pub use device::Device;

use crate::batch::Segment;
pub use crate::checkpoint::StoredWeight;
use crate::config::Config;
use crate::{Error, Result};
use core::ops::Range;
pub use hydra_kernels::gate::Routing;
pub use hydra_kernels::gemm::Accumulate;
pub use hydra_kernels::quant::{Format, Weight};
pub use hydra_kernels::shape::HydraShape;

/// A device that runs the model.
pub trait Backend: Send + Sync + 'static {
    /// f32 values on the device: residual streams, statistics, and everything that is trained.
    type Buffer: Send + Sync;
    /// What products read, in the device's precision for it: normalised rows, queries, keys, values, the feed-forward's inner
    /// values, and the gradients of these.
    type Activations: Send + Sync;
    /// A frozen matrix in the form in which the device multiplies it.
    type Matrix: Send + Sync;

    /// Keeps the calling thread where it runs best until the guard is dropped: called once for each step or pass.
    fn bind_caller(&self) -> Option<cpu::Bound> {
        None
    }
    /// A zeroed buffer of `len` values.
    fn buffer(&self, len: usize) -> Result<Self::Buffer>;
    /// Zeroed activations, `len` values.
    fn activations(&self, len: usize) -> Result<Self::Activations>;
    /// Zeroed activations [rows, width] that linear layers read, as x or as dy. A device may keep room behind each row for
    /// what the layer's adapter multiplies.
    fn operand(&self, rows: usize, width: usize) -> Result<Self::Activations> {
        self.activations(rows * width)
    }
    /// Bytes of [`Backend::operand`].
    fn operand_bytes(&self, rows: usize, width: usize) -> u64 {
        (rows as u64).saturating_mul(width as u64).saturating_mul(self.activation_bytes() as u64)
    }
    /// Bytes of one value of [`Backend::Activations`].
    fn activation_bytes(&self) -> usize;
    /// Takes a frozen weight to the device.
    fn matrix(&self, weight: StoredWeight) -> Result<Self::Matrix>;

    /// Copies `from` to the start of `to`.
    fn upload(&self, to: &mut Self::Buffer, from: &[f32]) -> Result<()>;
    /// Copies the start of `from` into `to`.
    fn download(&self, to: &mut [f32], from: &Self::Buffer) -> Result<()>;
    /// Copies `from` to the start of `to`, rounded to the device's precision.
    fn upload_activations(&self, to: &mut Self::Activations, from: &[f32]) -> Result<()>;
    /// Copies the start of `from` into `to`.
    fn download_activations(&self, to: &mut [f32], from: &Self::Activations) -> Result<()>;
    /// Copies the first `len` values of `from` to `to[start..]`.
    fn copy(&self, to: &mut Self::Buffer, start: usize, from: &Self::Buffer, len: usize) -> Result<()>;
    /// Copies `from[values]` to `to[start..]`.
    fn copy_activations(
        &self,
        to: &mut Self::Activations,
        start: usize,
        from: &Self::Activations,
        values: Range<usize>,
    ) -> Result<()>;
    /// Sets the first `len` values to zero.
    fn zero(&self, buffer: &mut Self::Buffer, len: usize) -> Result<()>;
    /// y += x, the first `len` values of each.
    fn add(&self, y: &mut Self::Buffer, x: &Self::Buffer, len: usize) -> Result<()>;

    /// `out[t] = table[tokens[t]]`; table [vocab, d], out [tokens, d].
    fn embed(&self, out: &mut Self::Buffer, table: &Self::Matrix, tokens: &[u32]) -> Result<()>;

    /// y = x · inv_rms · weight, with `inv_rms[t]` = 1/√(mean over row t of x² + eps).
    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<()>;
    /// *Adds* to `dx` the gradient of [`Backend::rms_norm`]: dx += inv_rms · (dy∘w − x · inv_rms² · mean(dy∘w∘x)).
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()>;

    /// y = x / √(mean of x² + eps) · weight, for each head of each row: the norm of queries and keys (arXiv 2302.05442).
    fn head_norm(&self, args: HeadNorm<'_, Self>) -> Result<()>;
    /// The gradient of [`Backend::head_norm`], in place: dx = r · (dy∘w − x · r² · mean(dy∘w∘x)), with r = 1/√(mean x² + eps).
    fn head_norm_backward(&self, args: HeadNormBackward<'_, Self>) -> Result<()>;

    /// Rotates each head of each row by the angle of its token's position (RoPE, arXiv 2104.09864).
    fn rope(&self, args: Rope<'_, Self>) -> Result<()>;

    /// A frozen linear layer and its adapter: y = residual + x Wᵀ + bias + scale · mixed Bᵀ.
    fn linear(&self, args: Linear<'_, Self>) -> Result<()>;
    /// Whether [`Backend::linear_rows`] and [`Backend::attention_rows`] take several sequences at a time.
    fn batches(&self) -> bool {
        false
    }
    /// [`Backend::linear`] for rows of several sequences, whose adapters may differ. A row's result has the same bits
    /// whichever rows are computed beside it. This one takes a single sequence.
    fn linear_rows(&self, args: LinearRows<'_, Self>) -> Result<()> {
        let LinearRows { output, x, weight, bias, groups: [group], states, .. } = args else {
            return Err(one_by_one());
        };
        let adapter = group.adapter.as_ref().zip(states);
        self.linear(Linear { output, tokens: group.rows, x, weight, bias, adapter })
    }
    /// The gradient of [`Backend::linear`]: `dx` is overwritten or added to, the adapter's gradients are *added* to `dparams`.
    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<()>;

    /// Causal attention inside each segment, after the prefix: o = softmax(q kᵀ / √head_dim) v, by blocks, so that scores are
    /// never stored (Dao et al., arXiv 2205.14135). A window counts keys back from the query's own, into the prefix.
    fn attention(&self, args: Attention<'_, Self>) -> Result<()>;
    /// [`Backend::attention`] for rows of several sequences, each behind its own cached keys and values. A row's result
    /// has the same bits whichever rows are computed beside it. This one takes a single sequence.
    fn attention_rows(&self, args: AttentionRows<'_, Self>) -> Result<()> {
        let AttentionRows { o, lse, shape, window, q, k, v, sequences: [sequence], .. } = args else {
            return Err(one_by_one());
        };
        let &CachedRows { rows, k: cached_k, v: cached_v, len } = sequence;
        let prefix = (len > 0).then_some(Prefix { k: cached_k, v: cached_v, len });
        let segments = &[Segment { start: 0, len: rows.len }];
        self.attention(Attention { o, lse, shape, segments, window, q, k, v, prefix })
    }
    /// The gradient of [`Backend::attention`] without a prefix; dq, dk, dv are overwritten.
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()>;

    /// out = silu(gate) ∘ up, each `len` values.
    fn swiglu(
        &self,
        out: &mut Self::Activations,
        len: usize,
        gate: &Self::Activations,
        up: &Self::Activations,
    ) -> Result<()>;
    /// The gradient of [`Backend::swiglu`]: `dgate` holds d out on entry and d gate on return; `dup` is overwritten.
    fn swiglu_backward(
        &self,
        dgate: &mut Self::Activations,
        dup: &mut Self::Activations,
        len: usize,
        gate: &Self::Activations,
        up: &Self::Activations,
    ) -> Result<()>;

    /// `out[i] = x[rows[i]]`, rows of width `d`.
    fn gather(&self, out: &mut Self::Buffer, x: &Self::Buffer, rows: &[u32], d: usize) -> Result<()>;
    /// `out[i] = x[rows[i]]`, rows of width `d`, an even number.
    fn gather_activations(
        &self,
        out: &mut Self::Activations,
        x: &Self::Activations,
        rows: &[u32],
        d: usize,
    ) -> Result<()>;
    /// `out[rows[i]] = x[i]`, zero elsewhere; out [tokens, d], `rows` ascending without repetition.
    fn scatter(&self, out: &mut Self::Buffer, tokens: usize, x: &Self::Buffer, rows: &[u32], d: usize) -> Result<()>;

    /// The output head and the cross-entropy in one, by vocabulary blocks, without a [rows, vocab] buffer.
    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Result<()>;
    /// `out[i, j] = head[ids[j]] · x[i]`: the logits of these ids alone; x [rows, d], out [rows, ids].
    fn head_rows(
        &self,
        out: &mut [f32],
        x: &Self::Activations,
        rows: usize,
        head: &Self::Matrix,
        ids: &[u32],
    ) -> Result<()>;

    /// Σ x² over the first `len` values, in an order that does not depend on the number of threads.
    fn sum_of_squares(&self, x: &Self::Buffer, len: usize) -> Result<f64>;
    /// One step of AdamW.
    fn adamw(&self, args: AdamWStep<'_, Self>) -> Result<()>;

    /// Fails if the device can't run a model of this configuration; the message names what it lacks.
    fn supports(&self, _config: &Config) -> Result<()> {
        Ok(())
    }
    /// Fails if this device computes no gradients; the message says what to choose instead.
    fn trains(&self) -> Result<()> {
        Ok(())
    }
    /// A name for people: device, instruction set, threads, precision.
    fn describe(&self) -> String;
    /// Free bytes of the device's own memory; `None` if it works in the machine's.
    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
    /// Bytes that the backend keeps for itself, for all of this work, one after the other.
    fn workspace_bytes(&self, work: &[Workload<'_>]) -> u64;
}

/// What decides how many bytes a backend keeps for itself.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// The model.
    pub config: &'a Config,
    /// The most rows of a pass.
    pub tokens: usize,
    /// The shapes of a layer's adapters, if it has any.
    pub adapters: &'a [HydraShape],
    /// Whether there are gradients.
    pub training: bool,
}

/// Several sequences, for a device that does not batch them.
fn one_by_one() -> Error {
    Error::Invalid("rows of several sequences on a device that takes one sequence at a time".into())
}
