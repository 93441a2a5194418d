//! One transformer layer, forward and backward.
//!
//! ```text
//! middle = x + O(attention(rope(Q n), rope(K n), V n))     n = norm(x)
//! out    = middle + Down(silu(Gate m) ∘ Up m)              m = norm(middle)
//! ```
//!
//! The backward pass computes normalised streams and silu(gate) ∘ up again: cheaper than the memory they would take.

use super::Pass;
use super::activations::{Gradients, LayerActivations, Work};
use super::cache::Cached;
use crate::Result;
use crate::adapter::device::DeviceAdapter;
use crate::backend::{
    Accumulate, AnyBuffer, AnyBufferMut, Attention, AttentionBackward, AttentionShape, Backend, Linear, LinearBackward,
    LinearOutput, RmsNorm, RmsNormBackward, Rope,
};
use crate::projection::ByProjection;
use crate::projection::Projection::{self, Down, Gate, K, O, Q, Up, V};

/// The buffers of a layer's forward pass.
pub(super) struct Forward<'a, B: Backend> {
    pub out: &'a mut B::Buffer,
    pub x: &'a B::Buffer,
    pub acts: &'a mut LayerActivations<B>,
    pub work: &'a mut Work<B>,
}

/// The buffers of a layer's backward pass.
pub(super) struct Backward<'a, B: Backend> {
    /// `gradients.dx` is the gradient of the layer's output, and then that of its input.
    pub gradients: &'a mut Gradients<B>,
    pub dparams: &'a mut B::Buffer,
    pub x: &'a B::Buffer,
    pub acts: &'a LayerActivations<B>,
    pub work: &'a mut Work<B>,
}

/// What a layer has to compute.
#[derive(Clone, Copy)]
pub(super) enum Scope<'a> {
    /// All rows.
    All,
    /// The output of these rows alone, one after the other; of the others keys and values.
    Rows(&'a [u32]),
    /// No output.
    KeysAndValues,
}

/// The rows that a projection computes.
#[derive(Clone, Copy)]
struct Rows<'a> {
    tokens: usize,
    /// Each one's lora head under the label gate.
    labels: &'a [u32],
}

impl<B: Backend> Pass<'_, B> {
    /// `out` = layer(`x`). Under [`Scope::Rows`] the queries are overwritten.
    pub(super) fn block_forward(
        &self,
        layer: usize,
        buffers: Forward<'_, B>,
        cached: &mut Cached<'_, B>,
        scope: Scope<'_>,
    ) -> Result<()> {
        let Forward { out, x, acts, work } = buffers;
        self.keys_and_values(layer, x, acts, work, cached)?;
        if matches!(scope, Scope::KeysAndValues) {
            return Ok(());
        }
        self.attend(layer, acts, work, cached)?;
        let (backend, config) = (&self.model.backend, &self.model.config);
        let LayerActivations { q, o, middle, adapter_state, .. } = acts;
        let labels: Vec<u32>;
        let (rows, x, o) = match scope {
            Scope::Rows(rows) => {
                backend.gather(out, x, rows, config.d_model)?;
                backend.gather_activations(q, o, rows, AttentionShape::of(config).q_width())?;
                labels = rows.iter().map(|&row| self.packed.labels[row as usize]).collect();
                (Rows { tokens: rows.len(), labels: &labels }, &*out, &*q)
            }
            _ => (self.all_rows(), x, &*o),
        };
        let output = LinearOutput::Buffer { y: middle, residual: Some(x) };
        self.project(layer, O, rows, o, output, adapter_state)?;
        self.feed_forward(layer, rows, out, acts, work)
    }

    fn all_rows(&self) -> Rows<'_> {
        Rows { tokens: self.packed.len(), labels: &self.packed.labels }
    }

    /// The layer's normalised input, its keys and its values.
    fn keys_and_values(
        &self,
        layer: usize,
        x: &B::Buffer,
        acts: &mut LayerActivations<B>,
        work: &mut Work<B>,
        cached: &mut Cached<'_, B>,
    ) -> Result<()> {
        let (backend, config, rows) = (&self.model.backend, &self.model.config, self.all_rows());
        backend.rms_norm(RmsNorm {
            y: &mut work.normed,
            inv_rms: &mut acts.attention_inv_rms,
            tokens: rows.tokens,
            x,
            weight: &self.model.layers[layer].attention_norm,
            eps: config.norm_eps,
        })?;
        let LayerActivations { k, v, adapter_state, .. } = acts;
        self.project(layer, K, rows, &work.normed, activations(k), adapter_state)?;
        self.project(layer, V, rows, &work.normed, activations(v), adapter_state)?;
        self.rotate(k, config.kv_heads, false)?;
        cached.append(backend, layer, [k, v], [rows.tokens, AttentionShape::of(config).kv_width()])
    }

    /// The queries, and attention's result.
    fn attend(
        &self,
        layer: usize,
        acts: &mut LayerActivations<B>,
        work: &Work<B>,
        cached: &Cached<'_, B>,
    ) -> Result<()> {
        let config = &self.model.config;
        let LayerActivations { q, k, v, o, lse, adapter_state, .. } = acts;
        self.project(layer, Q, self.all_rows(), &work.normed, activations(q), adapter_state)?;
        self.rotate(q, config.n_heads, false)?;
        let (shape, segments, prefix) = (AttentionShape::of(config), &self.packed.segments, cached.prefix(layer));
        self.model.backend.attention(Attention { o, lse, shape, segments, q, k, v, prefix })
    }

    /// From the stream between attention and feed-forward, `acts.middle`, to `out`.
    fn feed_forward(
        &self,
        layer: usize,
        rows: Rows<'_>,
        out: &mut B::Buffer,
        acts: &mut LayerActivations<B>,
        work: &mut Work<B>,
    ) -> Result<()> {
        let (backend, config) = (&self.model.backend, &self.model.config);
        let LayerActivations { middle, ffn_inv_rms, gate, up, adapter_state, .. } = acts;
        backend.rms_norm(RmsNorm {
            y: &mut work.normed,
            inv_rms: ffn_inv_rms,
            tokens: rows.tokens,
            x: middle,
            weight: &self.model.layers[layer].ffn_norm,
            eps: config.norm_eps,
        })?;
        self.project(layer, Gate, rows, &work.normed, activations(gate), adapter_state)?;
        self.project(layer, Up, rows, &work.normed, activations(up), adapter_state)?;
        backend.swiglu(&mut work.act, rows.tokens * config.d_ffn, gate, up)?;
        let output = LinearOutput::Buffer { y: out, residual: Some(middle) };
        self.project(layer, Down, rows, &work.act, output, adapter_state)
    }

    /// One projection with its adapter, if it has one.
    fn project(
        &self,
        layer: usize,
        projection: Projection,
        rows: Rows<'_>,
        x: &B::Activations,
        output: LinearOutput<'_, B>,
        adapter_state: &mut ByProjection<Option<B::Buffer>>,
    ) -> Result<()> {
        let weight = &self.model.layers[layer].projections[projection];
        let args = self.adapter.and_then(|adapter| adapter.args(layer, projection, rows.labels, self.training));
        let adapter = args.as_ref().zip(adapter_state[projection].as_mut());
        self.model.backend.linear(Linear { output, tokens: rows.tokens, x, weight, adapter })
    }

    fn rotate(&self, x: &mut B::Activations, n_heads: usize, inverse: bool) -> Result<()> {
        let (head_dim, positions) = (self.model.config.head_dim, &self.packed.positions);
        self.model.backend.rope(Rope { x, n_heads, head_dim, table: self.rope, positions, inverse })
    }

    /// Turns `gradients.dx` from the gradient of the layer's output into that of its input, adding to `dparams` on the way. Ends
    /// early where nothing below is adapted.
    pub(super) fn block_backward(
        &self,
        layer: usize,
        adapter: &DeviceAdapter<B>,
        mut buffers: Backward<'_, B>,
    ) -> Result<()> {
        let block = BlockBackward { pass: self, adapter, layer };
        if block.feed_forward(&mut buffers)? { block.attention(&mut buffers) } else { Ok(()) }
    }
}

/// An output without a residual.
fn activations<B: Backend>(y: &mut B::Activations) -> LinearOutput<'_, B> {
    LinearOutput::Activations { y, residual: None }
}

/// Where a projection's dx goes, if it is wanted.
fn into_buffer<B: Backend>(
    wanted: bool,
    dx: &mut B::Buffer,
    store: Accumulate,
) -> Option<(AnyBufferMut<'_, B>, Accumulate)> {
    wanted.then_some((AnyBufferMut::Buffer(dx), store))
}

/// One layer's backward pass.
struct BlockBackward<'a, B: Backend> {
    pass: &'a Pass<'a, B>,
    adapter: &'a DeviceAdapter<B>,
    layer: usize,
}

impl<B: Backend> BlockBackward<'_, B> {
    /// Whether something is trained that lies in a layer below or among `below` in this one.
    fn reaches(&self, below: &[Projection]) -> bool {
        self.layer > 0 || below.iter().any(|projection| self.adapter.config.targets.contains(projection))
    }

    /// The feed-forward part: `gradients.dx` becomes the gradient of `middle`. Returns whether to go on.
    fn feed_forward(&self, buffers: &mut Backward<'_, B>) -> Result<bool> {
        let (model, tokens) = (self.pass.model, self.pass.packed.len());
        let (backend, norm) = (&model.backend, &model.layers[self.layer].ffn_norm);
        let len = tokens * model.config.d_ffn;
        let Backward { gradients, dparams, acts, work, .. } = buffers;
        let Gradients { dx, dnormed, dact, .. } = &mut **gradients;
        backend.swiglu(&mut work.act, len, &acts.gate, &acts.up)?;
        let go_on = self.reaches(&[Q, K, V, O, Gate, Up]);
        let wanted = go_on.then_some((AnyBufferMut::Activations(dact), Accumulate::Overwrite));
        self.project(Down, wanted, dparams, AnyBuffer::Buffer(dx), &work.act, acts)?;
        if !go_on {
            return Ok(false);
        }
        let (dgate, dup) = (dact, &mut work.act);
        backend.swiglu_backward(dgate, dup, len, &acts.gate, &acts.up)?;
        self.norm(&mut work.normed, &mut work.inv_rms, &acts.middle, norm)?;
        let go_on = self.reaches(&[Q, K, V, O]);
        self.project(
            Gate,
            into_buffer(go_on, dnormed, Accumulate::Overwrite),
            dparams,
            AnyBuffer::Activations(dgate),
            &work.normed,
            acts,
        )?;
        self.project(
            Up,
            into_buffer(go_on, dnormed, Accumulate::Add),
            dparams,
            AnyBuffer::Activations(dup),
            &work.normed,
            acts,
        )?;
        if go_on {
            let (dy, x, inv_rms) = (&*dnormed, &acts.middle, &acts.ffn_inv_rms);
            backend.rms_norm_backward(RmsNormBackward { dx, tokens, dy, x, inv_rms, weight: norm })?;
        }
        Ok(go_on)
    }

    /// The attention part: `gradients.dx` becomes the gradient of the layer's input.
    fn attention(&self, buffers: &mut Backward<'_, B>) -> Result<()> {
        let (model, tokens) = (self.pass.model, self.pass.packed.len());
        let (backend, config) = (&model.backend, &model.config);
        let norm = &model.layers[self.layer].attention_norm;
        let Backward { gradients, dparams, x, acts, work } = buffers;
        let Gradients { dx, dnormed, d_o, dq, dk, dv, .. } = &mut **gradients;
        let go_on = self.reaches(&[Q, K, V]);
        let wanted = go_on.then_some((AnyBufferMut::Activations(d_o), Accumulate::Overwrite));
        self.project(O, wanted, dparams, AnyBuffer::Buffer(dx), &acts.o, acts)?;
        if !go_on {
            return Ok(());
        }
        let (shape, segments) = (AttentionShape::of(config), &self.pass.packed.segments);
        let LayerActivations { q, k, v, o, lse, .. } = acts;
        backend.attention_backward(AttentionBackward { dq, dk, dv, shape, segments, d_o, o, lse, q, k, v })?;
        self.pass.rotate(dq, config.n_heads, true)?;
        self.pass.rotate(dk, config.kv_heads, true)?;
        self.norm(&mut work.normed, &mut work.inv_rms, x, norm)?;
        let go_on = self.reaches(&[]);
        self.project(
            Q,
            into_buffer(go_on, dnormed, Accumulate::Overwrite),
            dparams,
            AnyBuffer::Activations(dq),
            &work.normed,
            acts,
        )?;
        self.project(
            K,
            into_buffer(go_on, dnormed, Accumulate::Add),
            dparams,
            AnyBuffer::Activations(dk),
            &work.normed,
            acts,
        )?;
        self.project(
            V,
            into_buffer(go_on, dnormed, Accumulate::Add),
            dparams,
            AnyBuffer::Activations(dv),
            &work.normed,
            acts,
        )?;
        if go_on {
            let (dy, inv_rms) = (&*dnormed, &acts.attention_inv_rms);
            backend.rms_norm_backward(RmsNormBackward { dx, tokens, dy, x, inv_rms, weight: norm })?;
        }
        Ok(())
    }

    /// A projection's gradients.
    fn project(
        &self,
        projection: Projection,
        dx: Option<(AnyBufferMut<'_, B>, Accumulate)>,
        dparams: &mut B::Buffer,
        dy: AnyBuffer<'_, B>,
        x: &B::Activations,
        acts: &LayerActivations<B>,
    ) -> Result<()> {
        let (pass, layer) = (self.pass, self.layer);
        let args = self.adapter.args(layer, projection, &pass.packed.labels, pass.training);
        let adapter = args.as_ref().zip(acts.adapter_state[projection].as_ref());
        let weight = &pass.model.layers[layer].projections[projection];
        let (dparams, tokens) = (Some(dparams), pass.packed.len());
        pass.model.backend.linear_backward(LinearBackward { dx, dparams, tokens, dy, x, weight, adapter })
    }

    /// A normalised stream once more.
    fn norm(&self, y: &mut B::Activations, inv_rms: &mut B::Buffer, x: &B::Buffer, weight: &B::Buffer) -> Result<()> {
        let (model, tokens) = (self.pass.model, self.pass.packed.len());
        model.backend.rms_norm(RmsNorm { y, inv_rms, tokens, x, weight, eps: model.config.norm_eps })
    }
}
