//! One transformer layer, forward and backward.
//!
//! ```text
//! middle = x + O(attention(rope(h(Q n)), rope(h(K n)), V n))     n = norm(x)
//! out    = middle + Down(silu(Gate m) ∘ Up m)                    m = norm(middle)
//! ```
//!
//! h normalises each head in architectures that do, and is the identity in the others.
//!
//! The backward pass computes normalised streams and silu(gate) ∘ up again: cheaper than the memory they would take.

use super::activations::{Gradients, LayerActivations, Work};
use super::cache::Cached;
use super::{Batch, Layer, Pass};
use crate::Result;
use crate::adapter::device::DeviceAdapter;
use crate::backend::{
    Accumulate, AnyBuffer, AnyBufferMut, Attention, AttentionBackward, AttentionRows, AttentionShape, Backend,
    HeadNorm, HeadNormBackward, Linear, LinearBackward, LinearOutput, LinearRows, RmsNorm, RmsNormBackward, Rope,
    RowGroup,
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

/// Where a layer's queries or keys go.
struct Heads<'a, B: Backend> {
    /// Rotated, [tokens, heads * head_dim].
    rotated: &'a mut B::Activations,
    /// Before the norm of each head, if there is one.
    unnormed: Option<&'a mut B::Activations>,
}

/// The rows that a projection computes.
#[derive(Clone, Copy)]
struct Rows<'a> {
    tokens: usize,
    /// Each one's lora head under the label gate.
    labels: &'a [u32],
    /// Which of the pass's rows they are; `None`: all.
    selected: Option<&'a [u32]>,
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
                (Rows { tokens: rows.len(), labels: &labels, selected: Some(rows) }, &*out, &*q)
            }
            _ => (self.all_rows(), x, &*o),
        };
        let output = LinearOutput::Buffer { y: middle, residual: Some(x) };
        self.project(layer, O, rows, o, output, adapter_state)?;
        self.feed_forward(layer, rows, out, acts, work)
    }

    fn all_rows(&self) -> Rows<'_> {
        Rows { tokens: self.packed.len(), labels: &self.packed.labels, selected: None }
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
        let LayerActivations { unnormed, k, v, adapter_state, .. } = acts;
        let heads = Heads { rotated: k, unnormed: unnormed.as_mut().map(|unnormed| &mut unnormed.k) };
        self.project_heads(layer, K, heads, &work.normed, adapter_state)?;
        self.project(layer, V, rows, &work.normed, activations(v), adapter_state)?;
        cached.append(backend, layer, [k, v], &self.packed.segments, AttentionShape::of(config).kv_width())
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
        let LayerActivations { unnormed, q, k, v, o, lse, adapter_state, .. } = acts;
        let heads = Heads { rotated: q, unnormed: unnormed.as_mut().map(|unnormed| &mut unnormed.q) };
        self.project_heads(layer, Q, heads, &work.normed, adapter_state)?;
        let (shape, window) = (AttentionShape::of(config), config.architecture.window(layer));
        let (segments, prefix) = (&self.packed.segments, cached.prefix(layer));
        if let Some(Batch { kind, .. }) = self.batch {
            let sequences = &cached.sequences(layer, segments);
            let args = AttentionRows { o, lse, shape, window, q, k, v, kind, sequences };
            return self.model.backend.attention_rows(args);
        }
        self.model.backend.attention(Attention { o, lse, shape, segments, window, q, k, v, prefix })
    }

    /// Queries or keys: projected, each head normalised if the architecture does so, and rotated.
    fn project_heads(
        &self,
        layer: usize,
        projection: Projection,
        heads: Heads<'_, B>,
        x: &B::Activations,
        adapter_state: &mut ByProjection<Option<B::Buffer>>,
    ) -> Result<()> {
        let Heads { rotated, unnormed } = heads;
        let (rows, n_heads) = (self.all_rows(), self.heads_of(projection));
        match unnormed.zip(self.head_norm(layer, projection)) {
            None => self.project(layer, projection, rows, x, activations(rotated), adapter_state)?,
            Some((unnormed, weight)) => {
                self.project(layer, projection, rows, x, activations(unnormed), adapter_state)?;
                let (heads, eps) = (rows.tokens * n_heads, self.model.config.norm_eps);
                self.model.backend.head_norm(HeadNorm { y: rotated, heads, x: unnormed, weight, eps })?;
            }
        }
        self.rotate(rotated, n_heads, false)
    }

    /// Heads in a row of queries or keys.
    fn heads_of(&self, projection: Projection) -> usize {
        if projection == Q { self.model.config.n_heads } else { self.model.config.kv_heads }
    }

    /// The weight of the norm of each head of queries or keys, if there is one.
    fn head_norm(&self, layer: usize, projection: Projection) -> Option<&B::Buffer> {
        let norms = self.model.layers[layer].head_norms.as_ref()?;
        Some(if projection == Q { &norms.q } else { &norms.k })
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
        let Layer { projections, biases, .. } = &self.model.layers[layer];
        let (weight, bias) = (&projections[projection], biases[projection].as_ref());
        if let Some(batch) = &self.batch {
            let groups = &batch.groups(layer, projection, rows);
            let (kind, states) = (batch.kind, adapter_state[projection].as_mut());
            return self.model.backend.linear_rows(LinearRows { output, x, weight, bias, kind, groups, states });
        }
        let args = self.adapter.and_then(|adapter| adapter.args(layer, projection, rows.labels, self.training));
        let adapter = args.as_ref().zip(adapter_state[projection].as_mut());
        self.model.backend.linear(Linear { output, tokens: rows.tokens, x, weight, bias, adapter })
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

impl<B: Backend> Batch<'_, B> {
    /// The groups of `rows` as a projection reads them.
    fn groups<'a>(&'a self, layer: usize, projection: Projection, rows: Rows<'a>) -> Vec<RowGroup<'a, B>> {
        let (mut first, mut done) = (0, 0);
        let group = |&(len, adapter): &(usize, Option<&'a DeviceAdapter<B>>)| {
            let end = first + len;
            let selected = rows.selected.map_or(len, |selected| {
                selected.partition_point(|&row| (row as usize) < end)
                    - selected.partition_point(|&row| (row as usize) < first)
            });
            let labels = &rows.labels[done..done + selected];
            (first, done) = (end, done + selected);
            RowGroup {
                rows: selected,
                adapter: adapter.and_then(|adapter| adapter.args(layer, projection, labels, None)),
            }
        };
        self.groups.iter().map(group).filter(|group| group.rows > 0).collect()
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
        let (shape, window) = (AttentionShape::of(config), config.architecture.window(self.layer));
        let segments = &self.pass.packed.segments;
        let LayerActivations { unnormed, q, k, v, o, lse, .. } = acts;
        backend.attention_backward(AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v })?;
        self.heads(Q, dq, unnormed.as_ref().map(|unnormed| &unnormed.q))?;
        self.heads(K, dk, unnormed.as_ref().map(|unnormed| &unnormed.k))?;
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

    /// From the gradient of rotated queries or keys to that of the projection's result, in place.
    fn heads(&self, projection: Projection, dx: &mut B::Activations, unnormed: Option<&B::Activations>) -> Result<()> {
        let (pass, n_heads) = (self.pass, self.pass.heads_of(projection));
        pass.rotate(dx, n_heads, true)?;
        let Some((x, weight)) = unnormed.zip(pass.head_norm(self.layer, projection)) else { return Ok(()) };
        let (heads, eps) = (pass.packed.len() * n_heads, pass.model.config.norm_eps);
        pass.model.backend.head_norm_backward(HeadNormBackward { dx, heads, x, weight, eps })
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
