//! LLaMA: frozen weights, and a pass over them forward and backward.
//!
//! x₀ = embedding; each layer adds attention(norm(x)) and then ffn(norm(x)) to the residual stream; the head reads the
//! normalised last one. The backward pass ends at the lowest adapted projection.

mod block;

use crate::Result;
use crate::activations::{Activations, check_tokens};
use crate::adapted::{Adapted, Training};
use crate::backend::{AttentionShape, Backend, Prefix};
use crate::batch::Packed;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::config::Config;
use crate::projection::Projection;

impl AttentionShape {
    /// The attention of a model.
    pub fn of(config: &Config) -> Self {
        Self { n_heads: config.n_heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
    }
}

/// One layer's frozen weights.
pub(crate) struct Layer<'w, B: Backend> {
    pub attention_norm: B::Buffer,
    pub ffn_norm: B::Buffer,
    /// By `Projection as usize`.
    pub projections: [B::Matrix<'w>; 7],
}

/// A model on a device. Its weights are the checkpoint's: they stay in their own format and, on the CPU, in the mapping.
///
/// Nothing about it changes once it is loaded, so threads may share it: each takes its own evaluator, generator or trainer.
/// It borrows the checkpoint; who can't keep the two side by side may leak the checkpoint (`Box::leak`).
pub struct Model<'w, B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: Config,
    pub(crate) embedding: B::Matrix<'w>,
    pub(crate) head: B::Matrix<'w>,
    pub(crate) final_norm: B::Buffer,
    pub(crate) layers: Vec<Layer<'w, B>>,
}

impl<'w, B: Backend> Model<'w, B> {
    /// Takes a checkpoint's weights to a device.
    pub fn load(backend: B, checkpoint: &'w Checkpoint) -> Result<Self> {
        let config = checkpoint.config().clone();
        let norm = |id| {
            let values = checkpoint.vector(id);
            let mut buffer = backend.buffer(values.len())?;
            backend.upload(&mut buffer, &values)?;
            Ok::<_, crate::Error>(buffer)
        };
        let matrix = |id| backend.matrix(checkpoint.weight(id));
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let projection = |p| matrix(TensorId::Projection(layer, p));
            use Projection::*;
            layers.push(Layer {
                attention_norm: norm(TensorId::AttentionNorm(layer))?,
                ffn_norm: norm(TensorId::FfnNorm(layer))?,
                projections: [
                    projection(Q)?,
                    projection(K)?,
                    projection(V)?,
                    projection(O)?,
                    projection(Gate)?,
                    projection(Up)?,
                    projection(Down)?,
                ],
            });
        }
        let (embedding, head) = (matrix(TensorId::Embedding)?, matrix(TensorId::Head)?);
        let final_norm = norm(TensorId::FinalNorm)?;
        Ok(Self { config, embedding, head, final_norm, layers, backend })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Cosines and sines for `positions` positions, [positions, head_dim]: see [`Backend::rope`].
    pub(crate) fn rope_table(&self, positions: usize) -> Result<B::Buffer> {
        let frequencies = self.config.rope.inverse_frequencies(self.config.head_dim);
        let angles = |position: usize| frequencies.iter().map(move |&f| position as f64 * f64::from(f));
        let row = |position| angles(position).map(f64::cos).chain(angles(position).map(f64::sin));
        let table: Vec<f32> = (0..positions).flat_map(row).map(|x| x as f32).collect();
        let mut buffer = self.backend.buffer(table.len())?;
        self.backend.upload(&mut buffer, &table)?;
        Ok(buffer)
    }
}

/// Keys and values of tokens already seen, a buffer a layer.
pub(crate) struct KvCache<B: Backend> {
    k: Vec<B::Buffer>,
    v: Vec<B::Buffer>,
    /// Tokens in the cache.
    pub len: usize,
    /// Tokens it has room for.
    pub capacity: usize,
}

impl<B: Backend> KvCache<B> {
    pub fn new(model: &Model<'_, B>, capacity: usize) -> Result<Self> {
        check_tokens(capacity)?;
        let width = AttentionShape::of(&model.config).kv_width();
        let buffers =
            || (0..model.config.layers).map(|_| model.backend.activation(capacity * width)).collect::<Result<_>>();
        Ok(Self { k: buffers()?, v: buffers()?, len: 0, capacity })
    }

    fn prefix(&self, layer: usize) -> Option<Prefix<'_, B>> {
        (self.len > 0).then(|| Prefix { k: &self.k[layer], v: &self.v[layer], len: self.len })
    }
}

/// What a pass does with the cache.
pub(crate) enum Cached<'a, B: Backend> {
    /// There is none.
    No,
    /// All segments continue what is in it.
    Read(&'a KvCache<B>),
    /// The one segment continues what is in it and is added to it.
    Append(&'a mut KvCache<B>),
}

/// One pass over a packed batch.
pub(crate) struct Pass<'a, 'w, B: Backend> {
    pub model: &'a Model<'w, B>,
    pub adapted: Option<&'a Adapted<B>>,
    pub packed: &'a Packed,
    pub rope: &'a B::Buffer,
    /// `None` in evaluation.
    pub training: Option<Training>,
}

impl<'a, 'w, B: Backend> Pass<'a, 'w, B> {
    /// A pass without the options that concern training alone.
    pub fn evaluating(
        model: &'a Model<'w, B>,
        adapted: Option<&'a Adapted<B>>,
        packed: &'a Packed,
        rope: &'a B::Buffer,
    ) -> Self {
        Self { model, adapted, packed, rope, training: None }
    }
}

impl<B: Backend> Pass<'_, '_, B> {
    /// Runs all layers for all rows; the last one's output is then `acts.inputs[layers % inputs.len()]`.
    pub fn forward(&self, acts: &mut Activations<B::Buffer>, cached: Cached<'_, B>) -> Result<()> {
        self.model.backend.inside(|| self.forward_by_layer(acts, cached, |_, _| Ok(())))
    }

    /// The same, and `after` sees the activations after each layer.
    pub fn forward_by_layer(
        &self,
        acts: &mut Activations<B::Buffer>,
        mut cached: Cached<'_, B>,
        mut after: impl FnMut(&mut Activations<B::Buffer>, usize) -> Result<()>,
    ) -> Result<()> {
        self.model.backend.embed(&mut acts.inputs[0], &self.model.embedding, &self.packed.tokens)?;
        for layer in 0..self.model.config.layers {
            self.layer_forward(acts, layer, &mut cached)?;
            after(acts, layer)?;
        }
        if let Cached::Append(cache) = cached {
            cache.len += self.packed.len();
        }
        Ok(())
    }

    /// The final norm of some rows, ascending without repetition, in `acts.read.normed`. Nothing is kept for gradients, and of the
    /// last layer only what these rows need is computed: for none of them, keys and values.
    pub fn read(&self, acts: &mut Activations<B::Buffer>, mut cached: Cached<'_, B>, rows: &[u32]) -> Result<()> {
        self.model.backend.inside(|| {
            self.model.backend.embed(&mut acts.inputs[0], &self.model.embedding, &self.packed.tokens)?;
            let last = self.model.config.layers - 1;
            for layer in 0..last {
                self.layer_forward(acts, layer, &mut cached)?;
            }
            let (set, input) = (last % acts.layers.len(), last % acts.inputs.len());
            let (x, out) = (&acts.inputs[input], &mut acts.read.x);
            let some = (rows.len() < self.packed.len()).then_some(rows);
            self.block_forward(last, out, x, &mut acts.layers[set], &mut acts.work, &mut cached, some)?;
            if let Cached::Append(cache) = cached {
                cache.len += self.packed.len();
            }
            if rows.is_empty() { Ok(()) } else { self.final_norm(acts, rows.len()) }
        })
    }

    fn layer_forward(&self, acts: &mut Activations<B::Buffer>, layer: usize, cached: &mut Cached<'_, B>) -> Result<()> {
        let set = layer % acts.layers.len();
        let (x, out) = Activations::input_and_output(&mut acts.inputs, layer);
        self.block_forward(layer, out, x, &mut acts.layers[set], &mut acts.work, cached, None)
    }

    /// Of `rows` rows in `acts.read.x`, into `acts.read.normed`.
    fn final_norm(&self, acts: &mut Activations<B::Buffer>, rows: usize) -> Result<()> {
        let (read, model) = (&mut acts.read, self.model);
        let (weight, eps) = (&model.final_norm, model.config.norm_eps);
        model.backend.rms_norm(&mut read.normed, &mut read.inv_rms, rows, &read.x, weight, eps)
    }

    /// The loss at the batch's targets, whose rows [`Pass::read`] has read: `nll` [targets].
    pub fn loss(&self, acts: &mut Activations<B::Buffer>, nll: &mut [f32]) -> Result<()> {
        let (backend, read) = (&self.model.backend, &mut acts.read);
        backend.inside(|| {
            backend.head_loss(&mut read.nll, None, &read.normed, &self.model.head, &self.packed.targets, 1.0)?;
            backend.download(nll, &read.nll)
        })
    }

    /// The loss at the batch's targets, after [`Pass::forward`]: `nll` [targets]; and the gradient of `scale` · Σ nll in the
    /// adapter, added to `dparams`.
    pub fn gradient(
        &self,
        acts: &mut Activations<B::Buffer>,
        nll: &mut [f32],
        dparams: &mut B::Buffer,
        scale: f32,
    ) -> Result<()> {
        if self.packed.targets.is_empty() {
            return Ok(());
        }
        self.model.backend.inside(|| self.gradient_inside(acts, nll, dparams, scale))
    }

    fn gradient_inside(
        &self,
        acts: &mut Activations<B::Buffer>,
        nll: &mut [f32],
        dparams: &mut B::Buffer,
        scale: f32,
    ) -> Result<()> {
        let (backend, config) = (&self.model.backend, &self.model.config);
        let last = &acts.inputs[config.layers % acts.inputs.len()];
        backend.gather(&mut acts.read.x, last, &self.packed.target_rows, config.d_model)?;
        self.final_norm(acts, self.packed.targets.len())?;
        let read = &mut acts.read;
        let (targets, head) = (&self.packed.targets, &self.model.head);
        let [dnormed, dx] = read.gradients.as_mut().expect("activations planned for training");
        backend.head_loss(&mut read.nll, Some(dnormed), &read.normed, head, targets, scale)?;
        backend.zero(dx, targets.len() * config.d_model)?;
        backend.rms_norm_backward(dx, targets.len(), dnormed, &read.x, &read.inv_rms, &self.model.final_norm)?;
        let gradients = acts.gradients.as_mut().expect("activations planned for training");
        backend.scatter(&mut gradients.dx, self.packed.len(), dx, &self.packed.target_rows, config.d_model)?;
        self.backward(acts, dparams)?;
        // Last, because a device has to be waited for: by now it has been given all its work.
        backend.download(nll, &acts.read.nll)
    }

    fn backward(&self, acts: &mut Activations<B::Buffer>, dparams: &mut B::Buffer) -> Result<()> {
        let Some(adapted) = self.adapted else { return Ok(()) };
        let recompute = acts.layers.len() < self.model.config.layers;
        for layer in (0..self.model.config.layers).rev() {
            // The last layer's activations are still there.
            if recompute && layer + 1 < self.model.config.layers {
                self.layer_forward(acts, layer, &mut Cached::No)?;
            }
            let set = layer % acts.layers.len();
            let gradients = acts.gradients.as_mut().expect("activations planned for training");
            self.block_backward(
                layer,
                adapted,
                gradients,
                dparams,
                &acts.inputs[layer],
                &acts.layers[set],
                &mut acts.work,
            )?;
        }
        Ok(())
    }
}
