//! What the forward pass leaves for the backward pass, sized before anything is allocated.
//!
//! [`Plan::build`] asks for each buffer once. It is asked to count and to allocate, so the bytes that are announced are the
//! bytes that are allocated.

use crate::adapter::AdapterConfig;
use crate::backend::{AttentionShape, Backend};
use crate::config::{Config, MAX_SIZE};
use crate::projection::ByProjection;
use crate::{Error, Result};

/// Activation checkpointing (gradient checkpointing, arXiv 1604.06174): what is kept between the forward and the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationCheckpointing {
    /// Keeps every layer's activations: the fastest.
    #[default]
    Off,
    /// Keeps every layer's input and computes the rest again, layer by layer: a third more work, a fraction of the memory.
    EveryLayer,
}

/// What buffers are: a backend's, or nothing where they are only counted.
pub(crate) trait Memory {
    type Buffer;
    type Activations;
}

impl<B: Backend> Memory for B {
    type Buffer = B::Buffer;
    type Activations = B::Activations;
}

/// What the activations are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Scores and text: nothing is kept.
    Forward,
    /// Gradients.
    Training(ActivationCheckpointing),
}

/// One layer's activations, for a row of `tokens`.
pub(crate) struct LayerActivations<M: Memory> {
    /// 1/rms of the layer's input, `[tokens]`.
    pub attention_inv_rms: M::Buffer,
    /// Queries and keys before their heads are normalised, in the shapes of `q` and `k`; `None` without head norms.
    pub unnormed: Option<QueriesAndKeys<M>>,
    /// Rotated queries, [tokens, n_heads * head_dim].
    pub q: M::Activations,
    /// Rotated keys, [tokens, kv_heads * head_dim].
    pub k: M::Activations,
    /// Values, [tokens, kv_heads * head_dim].
    pub v: M::Activations,
    /// Attention's result, [tokens, n_heads * head_dim].
    pub o: M::Activations,
    /// Log of the softmax denominators, [tokens, n_heads].
    pub lse: M::Buffer,
    /// The residual stream between attention and feed-forward, [tokens, d_model].
    pub middle: M::Buffer,
    /// 1/rms of `middle`, `[tokens]`.
    pub ffn_inv_rms: M::Buffer,
    /// The gate projection's result, [tokens, d_ffn].
    pub gate: M::Activations,
    /// The up projection's result, [tokens, d_ffn].
    pub up: M::Activations,
    /// `[A x | gate]` of each adapted projection, [tokens, a_rows + lora_heads].
    pub adapter_state: ByProjection<Option<M::Buffer>>,
}

/// Queries and keys of a layer.
pub(crate) struct QueriesAndKeys<M: Memory> {
    /// [tokens, n_heads * head_dim].
    pub q: M::Activations,
    /// [tokens, kv_heads * head_dim].
    pub k: M::Activations,
}

/// Results that live only inside one layer.
pub(crate) struct Work<M: Memory> {
    /// A normalised residual stream, [tokens, d_model].
    pub normed: M::Activations,
    /// Its 1/rms, where the backward pass computes it again, `[tokens]`.
    pub inv_rms: M::Buffer,
    /// silu(gate) ∘ up, [tokens, d_ffn].
    pub act: M::Activations,
}

/// The backward pass's own buffers.
pub(crate) struct Gradients<M: Memory> {
    /// Gradient of the residual stream, [tokens, d_model].
    pub dx: M::Buffer,
    /// Gradient of a normalised residual stream, [tokens, d_model].
    pub dnormed: M::Buffer,
    /// Gradient of attention's result, [tokens, n_heads * head_dim].
    pub d_o: M::Activations,
    /// Gradient of the queries.
    pub dq: M::Activations,
    /// Gradient of the keys.
    pub dk: M::Activations,
    /// Gradient of the values.
    pub dv: M::Activations,
    /// Gradient of `act`, then of `gate`, [tokens, d_ffn].
    pub dact: M::Activations,
}

/// The positions whose prediction is read.
pub(crate) struct Read<M: Memory> {
    /// Their rows of the last layer's output, [tokens, d_model].
    pub x: M::Buffer,
    /// 1/rms, `[tokens]`.
    pub inv_rms: M::Buffer,
    /// Normalised, [tokens, d_model].
    pub normed: M::Activations,
    /// Negative log-likelihoods, `[tokens]`.
    pub nll: M::Buffer,
    /// Gradient of `normed`, and then of `x`, [tokens, d_model]; training only.
    pub gradients: Option<[M::Buffer; 2]>,
}

/// All that a pass over the model writes.
pub(crate) struct Activations<M: Memory> {
    /// The most tokens in one row.
    pub tokens: usize,
    /// Inputs of the layers and the last one's output: `layers + 1` of them when training, else two that alternate.
    pub inputs: Vec<M::Buffer>,
    /// One set a layer under [`ActivationCheckpointing::Off`], else one for all.
    pub layers: Vec<LayerActivations<M>>,
    /// Shared by all layers.
    pub work: Work<M>,
    /// The positions that are read.
    pub read: Read<M>,
    /// Training only.
    pub gradients: Option<Gradients<M>>,
}

/// An error if memory can't be planned for so many tokens.
pub(crate) fn check_tokens(tokens: usize) -> Result<()> {
    if tokens > MAX_SIZE {
        return Err(Error::SequenceTooLong { tokens, limit: MAX_SIZE });
    }
    Ok(())
}

/// The sizes of [`Activations`] for rows of up to `tokens` tokens.
#[derive(Clone, Copy)]
pub(crate) struct Plan<'a> {
    config: &'a Config,
    adapter: Option<&'a AdapterConfig>,
    tokens: usize,
    purpose: Purpose,
}

impl<'a> Plan<'a> {
    /// Fails if there are absurdly many tokens, or the adapter's settings don't go together.
    pub fn new(
        config: &'a Config,
        adapter: Option<&'a AdapterConfig>,
        tokens: usize,
        purpose: Purpose,
    ) -> Result<Self> {
        check_tokens(tokens)?;
        adapter.map_or(Ok(()), AdapterConfig::check)?;
        Ok(Self { config, adapter, tokens, purpose })
    }

    /// What [`Plan::allocate`] will take of this backend, `u64::MAX` at most.
    pub fn bytes<B: Backend>(self, backend: &B) -> u64 {
        let mut counter = Counter { backend, bytes: 0 };
        let counted = self.build(&mut counter);
        debug_assert!(counted.is_ok());
        counter.bytes
    }

    /// The buffers.
    pub fn allocate<B: Backend>(self, backend: &B) -> Result<Activations<B>> {
        self.build(&mut Allocator(backend))
    }

    fn build<M: Memory>(self, source: &mut impl Source<M>) -> Result<Activations<M>> {
        let Self { config, tokens, purpose, .. } = self;
        let training = purpose != Purpose::Forward;
        let sets = if purpose == Purpose::Training(ActivationCheckpointing::Off) { config.layers } else { 1 };
        let stream = tokens * config.d_model;
        let inputs = if training { config.layers + 1 } else { 2 };
        Ok(Activations {
            tokens,
            inputs: (0..inputs).map(|_| source.buffer(stream)).collect::<Result<_>>()?,
            layers: (0..sets).map(|_| self.layer(source)).collect::<Result<_>>()?,
            work: Work {
                normed: source.operand(tokens, config.d_model)?,
                inv_rms: source.buffer(tokens)?,
                act: source.operand(tokens, config.d_ffn)?,
            },
            read: Read {
                x: source.buffer(stream)?,
                inv_rms: source.buffer(tokens)?,
                normed: source.activations(stream)?,
                nll: source.buffer(tokens)?,
                gradients: if training { Some([source.buffer(stream)?, source.buffer(stream)?]) } else { None },
            },
            gradients: if training { Some(self.gradients(source)?) } else { None },
        })
    }

    fn layer<M: Memory>(self, source: &mut impl Source<M>) -> Result<LayerActivations<M>> {
        let Self { config, tokens, .. } = self;
        let attention = AttentionShape::of(config);
        let adapter_state = ByProjection::try_from_fn(|projection| {
            let Some(adapter) = self.adapter.filter(|adapter| adapter.targets.contains(&projection)) else {
                return Ok(None);
            };
            let width = adapter.shape(config, projection).state_width();
            source.buffer(tokens * width).map(Some)
        })?;
        let unnormed = match config.architecture.head_norms {
            true => Some(QueriesAndKeys {
                q: source.activations(tokens * attention.q_width())?,
                k: source.activations(tokens * attention.kv_width())?,
            }),
            false => None,
        };
        Ok(LayerActivations {
            attention_inv_rms: source.buffer(tokens)?,
            unnormed,
            q: source.activations(tokens * attention.q_width())?,
            k: source.activations(tokens * attention.kv_width())?,
            v: source.activations(tokens * attention.kv_width())?,
            o: source.operand(tokens, attention.q_width())?,
            lse: source.buffer(tokens * config.n_heads)?,
            middle: source.buffer(tokens * config.d_model)?,
            ffn_inv_rms: source.buffer(tokens)?,
            gate: source.activations(tokens * config.d_ffn)?,
            up: source.activations(tokens * config.d_ffn)?,
            adapter_state,
        })
    }

    fn gradients<M: Memory>(self, source: &mut impl Source<M>) -> Result<Gradients<M>> {
        let Self { config, tokens, .. } = self;
        let attention = AttentionShape::of(config);
        Ok(Gradients {
            dx: source.buffer(tokens * config.d_model)?,
            dnormed: source.buffer(tokens * config.d_model)?,
            d_o: source.activations(tokens * attention.q_width())?,
            dq: source.operand(tokens, attention.q_width())?,
            dk: source.operand(tokens, attention.kv_width())?,
            dv: source.operand(tokens, attention.kv_width())?,
            dact: source.operand(tokens, config.d_ffn)?,
        })
    }
}

/// Where buffers come from.
trait Source<M: Memory> {
    fn buffer(&mut self, len: usize) -> Result<M::Buffer>;
    fn activations(&mut self, len: usize) -> Result<M::Activations>;
    /// See [`Backend::operand`].
    fn operand(&mut self, rows: usize, width: usize) -> Result<M::Activations>;
}

struct Allocator<'a, B>(&'a B);

impl<B: Backend> Source<B> for Allocator<'_, B> {
    fn buffer(&mut self, len: usize) -> Result<B::Buffer> {
        self.0.buffer(len)
    }

    fn activations(&mut self, len: usize) -> Result<B::Activations> {
        self.0.activations(len)
    }

    fn operand(&mut self, rows: usize, width: usize) -> Result<B::Activations> {
        self.0.operand(rows, width)
    }
}

/// Nothing is allocated, and what would be is added up.
struct Counter<'a, B> {
    backend: &'a B,
    bytes: u64,
}

impl<B> Counter<'_, B> {
    fn add(&mut self, len: usize, bytes: usize) {
        self.bytes = self.bytes.saturating_add((len as u64).saturating_mul(bytes as u64));
    }
}

struct Counted;

impl Memory for Counted {
    type Buffer = ();
    type Activations = ();
}

impl<B: Backend> Source<Counted> for Counter<'_, B> {
    fn buffer(&mut self, len: usize) -> Result<()> {
        self.add(len, size_of::<f32>());
        Ok(())
    }

    fn activations(&mut self, len: usize) -> Result<()> {
        self.add(len, self.backend.activation_bytes());
        Ok(())
    }

    fn operand(&mut self, rows: usize, width: usize) -> Result<()> {
        self.bytes = self.bytes.saturating_add(self.backend.operand_bytes(rows, width));
        Ok(())
    }
}

/// The input of `layer`, and where its output goes.
pub(crate) fn input_and_output<T>(inputs: &mut [T], layer: usize) -> (&T, &mut T) {
    let (input, output) = (layer % inputs.len(), (layer + 1) % inputs.len());
    if input < output {
        let (left, right) = inputs.split_at_mut(output);
        (&left[input], &mut right[0])
    } else {
        let (left, right) = inputs.split_at_mut(input);
        (&right[0], &mut left[output])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_alternate_or_follow_each_other() {
        let mut two = [0, 1];
        assert_eq!(input_and_output(&mut two, 0), (&0, &mut 1));
        assert_eq!(input_and_output(&mut two, 1), (&1, &mut 0));
        let mut many = [0, 1, 2, 3];
        assert_eq!(input_and_output(&mut many, 2), (&2, &mut 3));
    }
}
