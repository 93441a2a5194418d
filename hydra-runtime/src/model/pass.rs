//! One pass over a packed batch, forward and backward.

use super::Pass;
use super::activations::{Activations, input_and_output};
use super::block::{Backward, Forward, Scope};
use super::cache::Cached;
use crate::backend::{Backend, HeadLoss, RmsNorm, RmsNormBackward};
use crate::{Error, Result};

impl<B: Backend> Pass<'_, B> {
    /// Runs all layers for all rows; the last one's output is then `acts.inputs[layers % inputs.len()]`.
    pub fn forward(&self, acts: &mut Activations<B>, cached: Cached<'_, B>) -> Result<()> {
        self.forward_by_layer(acts, cached, |_, _| Ok(()))
    }

    /// The same, and `after` sees the activations after each layer.
    pub fn forward_by_layer(
        &self,
        acts: &mut Activations<B>,
        mut cached: Cached<'_, B>,
        mut after: impl FnMut(&mut Activations<B>, usize) -> Result<()>,
    ) -> Result<()> {
        self.check_positions()?;
        self.model.backend.embed(&mut acts.inputs[0], &self.model.embedding, &self.packed.tokens)?;
        for layer in 0..self.model.config.layers {
            self.layer_forward(acts, layer, &mut cached)?;
            after(acts, layer)?;
        }
        cached.grow(&self.packed.segments)
    }

    /// The final norm of some rows, ascending without repetition, in `acts.read.normed`. Nothing is kept for gradients, and the last
    /// layer computes only what these rows need: for no rows, keys and values.
    pub fn read(&self, acts: &mut Activations<B>, mut cached: Cached<'_, B>, rows: &[u32]) -> Result<()> {
        self.check_positions()?;
        self.model.backend.embed(&mut acts.inputs[0], &self.model.embedding, &self.packed.tokens)?;
        let last = self.model.config.layers - 1;
        for layer in 0..last {
            self.layer_forward(acts, layer, &mut cached)?;
        }
        let (set, input) = (last % acts.layers.len(), last % acts.inputs.len());
        let (x, out) = (&acts.inputs[input], &mut acts.read.x);
        let scope = match rows {
            [] => Scope::KeysAndValues,
            rows if rows.len() < self.packed.len() => Scope::Rows(rows),
            _ => Scope::All,
        };
        let buffers = Forward { out, x, acts: &mut acts.layers[set], work: &mut acts.work };
        self.block_forward(last, buffers, &mut cached, scope)?;
        cached.grow(&self.packed.segments)?;
        if rows.is_empty() { Ok(()) } else { self.final_norm(acts, rows.len()) }
    }

    /// The final norm of some rows, ascending without repetition, in `acts.read.normed`, after [`Pass::forward`].
    pub fn read_outputs(&self, acts: &mut Activations<B>, rows: &[u32]) -> Result<()> {
        let config = &self.model.config;
        let last = &acts.inputs[config.layers % acts.inputs.len()];
        self.model.backend.gather(&mut acts.read.x, last, rows, config.d_model)?;
        self.final_norm(acts, rows.len())
    }

    /// Fails if a token is where the model's rope scaling is not known.
    fn check_positions(&self) -> Result<()> {
        let (config, last) = (&self.model.config, self.packed.positions.iter().max());
        match (config.rope.within_context(), last) {
            (Some(scaling), Some(&last)) if last as usize >= config.context => Err(Error::Invalid(format!(
                "a sequence of {} tokens: expected at most {} with the model's rope scaling, {scaling}, which isn't computed beyond",
                last as usize + 1,
                config.context
            ))),
            _ => Ok(()),
        }
    }

    fn layer_forward(&self, acts: &mut Activations<B>, layer: usize, cached: &mut Cached<'_, B>) -> Result<()> {
        self.check()?;
        let set = layer % acts.layers.len();
        let (x, out) = input_and_output(&mut acts.inputs, layer);
        let buffers = Forward { out, x, acts: &mut acts.layers[set], work: &mut acts.work };
        self.block_forward(layer, buffers, cached, Scope::All)
    }

    /// Of `rows` rows in `acts.read.x`, into `acts.read.normed`.
    fn final_norm(&self, acts: &mut Activations<B>, rows: usize) -> Result<()> {
        let (read, model) = (&mut acts.read, self.model);
        model.backend.rms_norm(RmsNorm {
            y: &mut read.normed,
            inv_rms: &mut read.inv_rms,
            tokens: rows,
            x: &read.x,
            weight: &model.final_norm,
            eps: model.config.norm_eps,
        })
    }

    /// The loss at the batch's targets, whose rows [`Pass::read`] has read: `nll` [targets].
    pub fn loss(&self, acts: &mut Activations<B>, nll: &mut [f32]) -> Result<()> {
        let (backend, read) = (&self.model.backend, &mut acts.read);
        backend.head_loss(HeadLoss {
            nll: &mut read.nll,
            dx: None,
            x: &read.normed,
            lm_head: &self.model.lm_head,
            targets: &self.packed.targets,
            scale: 1.0,
        })?;
        backend.download(nll, &read.nll)
    }

    /// The loss at the batch's targets, after [`Pass::forward`]: `nll` [targets]; and the gradient of `scale` · Σ nll in the
    /// adapter, added to `dparams`.
    pub fn gradient(
        &self,
        acts: &mut Activations<B>,
        nll: &mut [f32],
        dparams: &mut B::Buffer,
        scale: f32,
    ) -> Result<()> {
        if self.packed.targets.is_empty() {
            return Ok(());
        }
        self.loss_backward(acts, scale)?;
        self.layers_backward(acts, dparams)?;
        // Last, because a device has to be waited for: by now it has been given all its work.
        self.model.backend.download(nll, &acts.read.nll)
    }

    /// From the last layer's output to the loss at the targets, and back: `acts.read.nll`, and the gradient of the output.
    fn loss_backward(&self, acts: &mut Activations<B>, scale: f32) -> Result<()> {
        let (backend, config) = (&self.model.backend, &self.model.config);
        let (rows, targets) = (&self.packed.target_rows, &self.packed.targets);
        self.read_outputs(acts, rows)?;
        let read = &mut acts.read;
        let [dnormed, dx] = read.gradients.as_mut().expect("activations planned for training");
        backend.head_loss(HeadLoss {
            nll: &mut read.nll,
            dx: Some(&mut *dnormed),
            x: &read.normed,
            lm_head: &self.model.lm_head,
            targets,
            scale,
        })?;
        backend.zero(dx, targets.len() * config.d_model)?;
        backend.rms_norm_backward(RmsNormBackward {
            dx: &mut *dx,
            tokens: targets.len(),
            dy: dnormed,
            x: &read.x,
            inv_rms: &read.inv_rms,
            weight: &self.model.final_norm,
        })?;
        let gradients = acts.gradients.as_mut().expect("activations planned for training");
        backend.scatter(&mut gradients.dx, self.packed.len(), dx, rows, config.d_model)
    }

    /// From the gradient of the last layer's output down to the lowest adapted layer.
    fn layers_backward(&self, acts: &mut Activations<B>, dparams: &mut B::Buffer) -> Result<()> {
        let Some(adapter) = self.adapter else { return Ok(()) };
        let recompute = acts.layers.len() < self.model.config.layers;
        for layer in (0..self.model.config.layers).rev() {
            // The last layer's activations are still there.
            if recompute && layer + 1 < self.model.config.layers {
                self.layer_forward(acts, layer, &mut Cached::No)?;
            }
            self.check()?;
            let set = layer % acts.layers.len();
            let gradients = acts.gradients.as_mut().expect("activations planned for training");
            let (x, acts, work) = (&acts.inputs[layer], &acts.layers[set], &mut acts.work);
            self.block_backward(layer, adapter, Backward { gradients, dparams, x, acts, work })?;
        }
        Ok(())
    }
}
