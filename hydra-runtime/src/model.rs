//! LLaMA: frozen weights, and a pass over them forward and backward.
//!
//! x₀ = embedding; each layer adds attention(norm(x)) and then ffn(norm(x)) to the residual stream; the head reads the
//! normalised last one. The backward pass ends at the lowest adapted projection.

pub(crate) mod activations;
mod block;
mod cache;
mod pass;

pub(crate) use cache::{Cached, KvCache};

use crate::Result;
use crate::adapter::device::{DeviceAdapter, Training};
use crate::backend::{AttentionShape, Backend};
use crate::batch::Packed;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::config::Config;
use crate::projection::Projection;
use core::marker::PhantomData;

impl AttentionShape {
    /// The attention of a model.
    pub fn of(config: &Config) -> Self {
        Self { n_heads: config.n_heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
    }
}

/// One layer's frozen weights.
pub(crate) struct Layer<B: Backend> {
    pub attention_norm: B::Buffer,
    pub ffn_norm: B::Buffer,
    /// By `Projection as usize`.
    pub projections: [B::Matrix; 7],
}

/// A model on a device. Its weights are the checkpoint's: they stay in their own format and, on the CPU, in the mapping.
///
/// Nothing about it changes once it is loaded, so threads may share it: each takes its own evaluator, generator or trainer.
/// It borrows the checkpoint; who can't keep the two side by side may leak the checkpoint (`Box::leak`).
pub struct Model<'w, B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: Config,
    pub(crate) embedding: B::Matrix,
    pub(crate) lm_head: B::Matrix,
    pub(crate) final_norm: B::Buffer,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) checkpoint: PhantomData<&'w Checkpoint>,
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
        let matrix = |id| backend.matrix(checkpoint.stored(id));
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
        let (embedding, lm_head) = (matrix(TensorId::Embedding)?, matrix(TensorId::Head)?);
        let final_norm = norm(TensorId::FinalNorm)?;
        Ok(Self { config, embedding, lm_head, final_norm, layers, backend, checkpoint: PhantomData })
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

/// One pass over a packed batch: `model/pass.rs` runs it, `model/block.rs` has its layers.
pub(crate) struct Pass<'a, 'w, B: Backend> {
    pub model: &'a Model<'w, B>,
    pub adapted: Option<&'a DeviceAdapter<B>>,
    pub packed: &'a Packed,
    pub rope: &'a B::Buffer,
    /// `None` in evaluation.
    pub training: Option<Training>,
}
