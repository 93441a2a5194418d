//! One transformer layer, forward and backward.
//!
//! ```text
//! middle = x + O(attention(rope(Q n), rope(K n), V n))     n = norm(x)
//! out    = middle + Down(silu(Gate m) ∘ Up m)              m = norm(middle)
//! ```
//!
//! Normalised streams and silu(gate) ∘ up are computed again in the backward pass: cheaper than the memory they would take.

use super::{Cached, Pass};
use crate::Result;
use crate::activations::{Gradients, LayerActivations, Work};
use crate::adapted::Adapted;
use crate::backend::{Accumulate, AttentionShape, Backend};
use crate::projection::Projection::{self, Down, Gate, K, O, Q, Up, V};

impl<B: Backend> Pass<'_, '_, B> {
    /// `out` = layer(`x`); see the module's heading. With `read`, `out` holds these rows alone, one after the other, and the rest of
    /// them is left off after their keys and values; the queries are then overwritten.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn block_forward(
        &self,
        layer: usize,
        out: &mut B::Buffer,
        x: &B::Buffer,
        acts: &mut LayerActivations<B::Buffer>,
        work: &mut Work<B::Buffer>,
        cached: &mut Cached<'_, B>,
        read: Option<&[u32]>,
    ) -> Result<()> {
        let (backend, config) = (&self.model.backend, &self.model.config);
        let nobody_reads = read.is_some_and(<[u32]>::is_empty);
        self.attend(layer, x, acts, work, cached, nobody_reads)?;
        if nobody_reads {
            return Ok(());
        }
        let LayerActivations { q, o, middle, ffn_inv_rms, gate, up, adapter_state, .. } = acts;
        let all = (self.packed.len(), &self.packed.labels);
        let of_read: Vec<u32>;
        let ((tokens, heads), x, o) = match read {
            None => (all, x, &*o),
            Some(rows) => {
                backend.gather(out, x, rows, config.d_model)?;
                backend.gather(q, o, rows, AttentionShape::of(config).q_width())?;
                of_read = rows.iter().map(|&row| self.packed.labels[row as usize]).collect();
                ((rows.len(), &of_read), &*out, &*q)
            }
        };
        let mut project = |projection: Projection, y: &mut B::Buffer, residual: Option<&B::Buffer>, x: &B::Buffer| {
            self.project(layer, projection, y, residual, tokens, heads, x, adapter_state)
        };
        project(O, middle, Some(x), o)?;
        let norm = &self.model.layers[layer].ffn_norm;
        backend.rms_norm(&mut work.normed, ffn_inv_rms, tokens, middle, norm, config.norm_eps)?;
        project(Gate, gate, None, &work.normed)?;
        project(Up, up, None, &work.normed)?;
        backend.swiglu(&mut work.act, tokens * config.d_ffn, gate, up)?;
        project(Down, out, Some(middle), &work.act)
    }

    /// From `x` to attention's result, `acts.o`; or, with `only_keys`, to keys and values.
    fn attend(
        &self,
        layer: usize,
        x: &B::Buffer,
        acts: &mut LayerActivations<B::Buffer>,
        work: &mut Work<B::Buffer>,
        cached: &mut Cached<'_, B>,
        only_keys: bool,
    ) -> Result<()> {
        let (backend, config, tokens) = (&self.model.backend, &self.model.config, self.packed.len());
        let attention = AttentionShape::of(config);
        let adapter_state = &mut acts.adapter_state;
        let mut project = |projection: Projection, y: &mut B::Buffer, x: &B::Buffer| {
            self.project(layer, projection, y, None, tokens, &self.packed.labels, x, adapter_state)
        };
        let norm = &self.model.layers[layer].attention_norm;
        backend.rms_norm(&mut work.normed, &mut acts.attention_inv_rms, tokens, x, norm, config.norm_eps)?;
        project(K, &mut acts.k, &work.normed)?;
        project(V, &mut acts.v, &work.normed)?;
        let positions = &self.packed.positions;
        backend.rope(&mut acts.k, config.kv_heads, config.head_dim, self.rope, positions, false)?;
        if let Cached::Append(cache) = cached {
            // Behind the rows in use, which are all that attention reads.
            let width = attention.kv_width();
            backend.copy(&mut cache.k[layer], cache.len * width, &acts.k, tokens * width)?;
            backend.copy(&mut cache.v[layer], cache.len * width, &acts.v, tokens * width)?;
        }
        if only_keys {
            return Ok(());
        }
        project(Q, &mut acts.q, &work.normed)?;
        backend.rope(&mut acts.q, config.n_heads, config.head_dim, self.rope, positions, false)?;
        let prefix = match &*cached {
            Cached::No => None,
            Cached::Read(cache) => cache.prefix(layer),
            Cached::Append(cache) => cache.prefix(layer),
        };
        let segments = &self.packed.segments;
        backend.attention(&mut acts.o, &mut acts.lse, attention, segments, &acts.q, &acts.k, &acts.v, prefix)
    }

    /// One projection with its adapter, if it has one; `heads` are the label gate's, of these `tokens` rows.
    #[allow(clippy::too_many_arguments)]
    fn project(
        &self,
        layer: usize,
        projection: Projection,
        y: &mut B::Buffer,
        residual: Option<&B::Buffer>,
        tokens: usize,
        heads: &[u32],
        x: &B::Buffer,
        adapter_state: &mut [Option<B::Buffer>; 7],
    ) -> Result<()> {
        let weight = &self.model.layers[layer].projections[projection as usize];
        let args = self.adapted.and_then(|a| a.args(layer, projection, heads, self.training));
        let adapter = args.as_ref().zip(adapter_state[projection as usize].as_mut());
        self.model.backend.linear(y, residual, tokens, x, weight, adapter)
    }

    /// Turns `gradients.dx` from the gradient of the layer's output into that of its input, adding to `dparams` on the way;
    /// leaves off where nothing below is adapted.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn block_backward(
        &self,
        layer: usize,
        adapted: &Adapted<B>,
        gradients: &mut Gradients<B::Buffer>,
        dparams: &mut B::Buffer,
        x: &B::Buffer,
        acts: &LayerActivations<B::Buffer>,
        work: &mut Work<B::Buffer>,
    ) -> Result<()> {
        let (backend, config, tokens) = (&self.model.backend, &self.model.config, self.packed.len());
        let (weights, attention) = (&self.model.layers[layer], AttentionShape::of(config));
        let positions = &self.packed.positions;
        // Whether something that these projections' input depends on is trained.
        let wanted = |below: &[Projection]| layer > 0 || below.iter().any(|p| adapted.config.targets.contains(p));
        let mut project =
            |projection: Projection, dx: Option<(&mut B::Buffer, Accumulate)>, dy: &B::Buffer, x: &B::Buffer| {
                let args = adapted.args(layer, projection, &self.packed.labels, self.training);
                let adapter = args.as_ref().zip(acts.adapter_state[projection as usize].as_ref());
                let weight = &weights.projections[projection as usize];
                backend.linear_backward(dx, Some(&mut *dparams), tokens, dy, x, weight, adapter)
            };
        let Gradients { dx, dnormed, d_o, dq, dk, dv, dact } = gradients;

        backend.swiglu(&mut work.act, tokens * config.d_ffn, &acts.gate, &acts.up)?;
        let go_on = wanted(&[Q, K, V, O, Gate, Up]);
        project(Down, go_on.then_some((&mut *dact, Accumulate::Overwrite)), dx, &work.act)?;
        if !go_on {
            return Ok(());
        }
        let (dgate, dup) = (dact, &mut work.act);
        backend.swiglu_backward(dgate, dup, tokens * config.d_ffn, &acts.gate, &acts.up)?;
        backend.rms_norm(
            &mut work.normed,
            &mut work.inv_rms,
            tokens,
            &acts.middle,
            &weights.ffn_norm,
            config.norm_eps,
        )?;
        let go_on = wanted(&[Q, K, V, O]);
        project(Gate, go_on.then_some((&mut *dnormed, Accumulate::Overwrite)), dgate, &work.normed)?;
        project(Up, go_on.then_some((&mut *dnormed, Accumulate::Add)), dup, &work.normed)?;
        if !go_on {
            return Ok(());
        }
        backend.rms_norm_backward(dx, tokens, dnormed, &acts.middle, &acts.ffn_inv_rms, &weights.ffn_norm)?;

        let go_on = wanted(&[Q, K, V]);
        project(O, go_on.then_some((&mut *d_o, Accumulate::Overwrite)), dx, &acts.o)?;
        if !go_on {
            return Ok(());
        }
        let segments = &self.packed.segments;
        let (q, k, v) = (&acts.q, &acts.k, &acts.v);
        backend.attention_backward(dq, dk, dv, attention, segments, d_o, &acts.o, &acts.lse, q, k, v)?;
        backend.rope(dq, config.n_heads, config.head_dim, self.rope, positions, true)?;
        backend.rope(dk, config.kv_heads, config.head_dim, self.rope, positions, true)?;
        backend.rms_norm(&mut work.normed, &mut work.inv_rms, tokens, x, &weights.attention_norm, config.norm_eps)?;
        let go_on = wanted(&[]);
        project(Q, go_on.then_some((&mut *dnormed, Accumulate::Overwrite)), dq, &work.normed)?;
        project(K, go_on.then_some((&mut *dnormed, Accumulate::Add)), dk, &work.normed)?;
        project(V, go_on.then_some((&mut *dnormed, Accumulate::Add)), dv, &work.normed)?;
        if !go_on {
            return Ok(());
        }
        backend.rms_norm_backward(dx, tokens, dnormed, x, &acts.attention_inv_rms, &weights.attention_norm)
    }
}
