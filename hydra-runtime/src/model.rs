//! The model: frozen weights, and a pass over them forward and backward.
//!
//! It is LLaMA's, with what [`Architecture`](crate::config::Architecture) adds to it. x₀ = embedding; each layer adds
//! attention(norm(x)) and then ffn(norm(x)) to the residual stream; the output head reads the normalised last one. The
//! backward pass ends at the lowest adapted projection.

pub(crate) mod activations;
mod block;
mod cache;
mod pass;

pub(crate) use cache::{Cached, KvCache};

use crate::adapter::Adapter;
use crate::adapter::device::{DeviceAdapter, Training};
use crate::backend::cpu::CpuOptions;
use crate::backend::{AttentionShape, Backend, Device, RowKind};
use crate::batch::Packed;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::config::Config;
use crate::projection::ByProjection;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

impl AttentionShape {
    /// The attention of a model.
    pub fn of(config: &Config) -> Self {
        Self { n_heads: config.n_heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
    }
}

/// A model on a device. Its weights are the checkpoint's: they stay in their own format and, on the CPU, in the mapped file.
///
/// A model is a handle: clones are cheap and share the weights, which live as long as any of them. Nothing about it changes
/// once it is loaded, so threads may share it; each takes its own evaluator, generator or trainer.
pub struct Model<B: Backend = Device>(pub(crate) Arc<Loaded<B>>);

impl<B: Backend> Clone for Model<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// What the clones of a model share.
pub(crate) struct Loaded<B: Backend> {
    pub backend: B,
    pub config: Config,
    pub embedding: B::Matrix,
    pub lm_head: B::Matrix,
    pub final_norm: B::Buffer,
    pub layers: Vec<Layer<B>>,
    checkpoint: Checkpoint,
    /// Built when it is first asked for.
    tokenizer: OnceLock<Tokenizer>,
}

/// One layer's frozen weights.
pub(crate) struct Layer<B: Backend> {
    pub attention_norm: B::Buffer,
    pub ffn_norm: B::Buffer,
    pub projections: ByProjection<B::Matrix>,
    pub biases: ByProjection<Option<B::Buffer>>,
    pub head_norms: Option<HeadNorms<B>>,
}

/// The weights of the norms of each head, `[head_dim]`.
pub(crate) struct HeadNorms<B: Backend> {
    pub q: B::Buffer,
    pub k: B::Buffer,
}

impl Model<Device> {
    /// Opens a Hugging Face folder or a GGUF file on the CPU, with all cores and in f32. [`Model::load`] leaves the choice of device
    /// and precision to the caller.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::load(Device::cpu(CpuOptions::default())?, &Checkpoint::open(path)?)
    }
}

impl<B: Backend> Model<B> {
    /// Takes a checkpoint's weights to a device. Fails if that can't run the model's architecture.
    pub fn load(backend: B, checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config().clone();
        backend.supports(&config)?;
        let vector = |id| {
            let values = checkpoint.vector(id);
            let mut buffer = backend.buffer(values.len())?;
            backend.upload(&mut buffer, &values)?;
            Ok::<_, Error>(buffer)
        };
        let matrix = |id| backend.matrix(checkpoint.stored(id));
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(Layer {
                attention_norm: vector(TensorId::AttentionNorm(layer))?,
                ffn_norm: vector(TensorId::FfnNorm(layer))?,
                projections: ByProjection::try_from_fn(|p| matrix(TensorId::Projection(layer, p)))?,
                biases: ByProjection::try_from_fn(|p| {
                    p.has_bias(&config).then(|| vector(TensorId::Bias(layer, p))).transpose()
                })?,
                head_norms: match config.architecture.head_norms {
                    true => {
                        Some(HeadNorms { q: vector(TensorId::QueryNorm(layer))?, k: vector(TensorId::KeyNorm(layer))? })
                    }
                    false => None,
                },
            });
        }
        let (embedding, lm_head) = (matrix(TensorId::Embedding)?, matrix(TensorId::Head)?);
        let final_norm = vector(TensorId::FinalNorm)?;
        let (checkpoint, tokenizer) = (checkpoint.clone(), OnceLock::new());
        Ok(Self(Arc::new(Loaded { backend, config, embedding, lm_head, final_norm, layers, checkpoint, tokenizer })))
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.0.backend
    }

    /// The files that it was loaded from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.0.checkpoint
    }

    /// The tokens that end a text, ascending: those that the configuration names (`eos_token_id`), and the tokenizer's. Fails as
    /// [`Model::tokenizer`] does.
    pub fn end_tokens(&self) -> Result<Vec<u32>> {
        let mut ends = self.0.config.eos.clone();
        ends.extend(self.tokenizer()?.eos());
        ends.sort_unstable();
        ends.dedup();
        Ok(ends)
    }

    /// The model's tokenizer. Fails as [`Checkpoint::tokenizer`] does; once built it is kept.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        match self.0.tokenizer.get() {
            Some(tokenizer) => Ok(tokenizer),
            None => {
                let tokenizer = self.0.checkpoint.tokenizer()?;
                Ok(self.0.tokenizer.get_or_init(|| tokenizer))
            }
        }
    }

    /// Copies an adapter to the model's device. Any number of adapters may be attached to one model: each use names its own.
    ///
    /// Fails if the adapter does not fit the model, or there is no memory for it.
    pub fn attach(&self, adapter: &Adapter) -> Result<AttachedAdapter<B>> {
        let parameters = DeviceAdapter::upload(self.backend(), self.config(), adapter)?;
        Ok(AttachedAdapter { model: self.clone(), parameters: Arc::new(parameters) })
    }

    /// Reads an adapter's folder and attaches the adapter.
    pub fn load_adapter(&self, folder: impl AsRef<Path>) -> Result<AttachedAdapter<B>> {
        self.attach(&Adapter::load(folder, self.config())?)
    }
}

/// An adapter on a model's device. Clones are cheap and share the parameters.
pub struct AttachedAdapter<B: Backend = Device> {
    model: Model<B>,
    parameters: Arc<DeviceAdapter<B>>,
}

impl<B: Backend> Clone for AttachedAdapter<B> {
    fn clone(&self) -> Self {
        Self { model: self.model.clone(), parameters: Arc::clone(&self.parameters) }
    }
}

impl<B: Backend> AttachedAdapter<B> {
    /// The adapter's kind and sizes.
    pub fn config(&self) -> &crate::adapter::AdapterConfig {
        &self.parameters.config
    }

    /// The model that it is attached to.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// The parameters, for a pass over `model`. Fails if that is another model.
    pub(crate) fn parameters(&self, model: &Model<B>) -> Result<Arc<DeviceAdapter<B>>> {
        if Arc::ptr_eq(&self.model.0, &model.0) {
            Ok(Arc::clone(&self.parameters))
        } else {
            Err(Error::WrongAdapter("an adapter that is attached to another model".into()))
        }
    }
}

impl<B: Backend> Loaded<B> {
    /// Cosines and sines for `positions` positions, [positions, head_dim], times the attention factor: see [`Backend::rope`].
    pub fn rope_table(&self, positions: usize) -> Result<B::Buffer> {
        let rope = &self.config.rope;
        let (frequencies, factor) =
            (rope.inverse_frequencies(self.config.head_dim), f64::from(rope.attention_factor()));
        let angles = |position: usize| frequencies.iter().map(move |&f| position as f64 * f64::from(f));
        let row = |position| angles(position).map(f64::cos).chain(angles(position).map(f64::sin));
        let table: Vec<f32> = (0..positions).flat_map(row).map(|x| (factor * x) as f32).collect();
        let mut buffer = self.backend.buffer(table.len())?;
        self.backend.upload(&mut buffer, &table)?;
        Ok(buffer)
    }
}

/// One pass over a packed batch: `model/pass.rs` runs it, `model/block.rs` has its layers.
pub(crate) struct Pass<'a, B: Backend> {
    pub model: &'a Loaded<B>,
    pub adapter: Option<&'a DeviceAdapter<B>>,
    pub packed: &'a Packed,
    pub rope: &'a B::Buffer,
    /// `None` in evaluation.
    pub training: Option<Training>,
    /// Ends the pass with [`Error::Cancelled`] once it is set.
    pub cancel: Option<&'a AtomicBool>,
    /// For rows of several sequences, with [`Cached::Batch`]: instead of `adapter`.
    pub batch: Option<Batch<'a, B>>,
}

/// Rows of several sequences.
pub(crate) struct Batch<'a, B: Backend> {
    pub kind: RowKind,
    /// Each group's number of rows, and their adapter.
    pub groups: &'a [(usize, Option<&'a DeviceAdapter<B>>)],
}

impl<B: Backend> Pass<'_, B> {
    /// Fails if the work has been cancelled.
    fn check(&self) -> Result<()> {
        match self.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }
}
