//! What the forward pass leaves for the backward pass, sized before anything is allocated.
//!
//! Each struct is generic in what it holds: a [`Size`] (a plan) or a backend's buffer. So the bytes that are announced are the
//! bytes that are allocated.

use crate::adapter::AdapterConfig;
use crate::backend::{AttentionShape, Backend};
use crate::config::{Config, MAX_SIZE};
use crate::projection::Projection;
use crate::{Error, Result};

/// What is kept between the forward and the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// Every layer's activations: the fastest.
    #[default]
    All,
    /// Every layer's input; the rest is computed again, layer by layer: a third more work, a fraction of the memory.
    Inputs,
}

/// What the activations are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Scores and text: nothing is kept.
    Forward,
    /// Gradients.
    Training(Keep),
}

/// A planned buffer, in values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// From [`Backend::buffer`]: residual streams, statistics, what is summed up.
    Buffer(usize),
    /// From [`Backend::activation`].
    Activation(usize),
}

/// One layer's activations, for a row of `tokens`.
#[derive(Clone, Debug)]
pub struct LayerActivations<T> {
    /// 1/rms of the layer's input, `[tokens]`.
    pub attention_inv_rms: T,
    /// Rotated queries, [tokens, n_heads * head_dim].
    pub q: T,
    /// Rotated keys, [tokens, kv_n_heads * head_dim].
    pub k: T,
    /// Values, [tokens, kv_n_heads * head_dim].
    pub v: T,
    /// Attention's result, [tokens, n_heads * head_dim].
    pub o: T,
    /// Log of the softmax denominators, [tokens, n_heads].
    pub lse: T,
    /// The residual stream between attention and feed-forward, [tokens, d_model].
    pub middle: T,
    /// 1/rms of `middle`, `[tokens]`.
    pub ffn_inv_rms: T,
    /// The gate projection's result, [tokens, d_ffn].
    pub gate: T,
    /// The up projection's result, [tokens, d_ffn].
    pub up: T,
    /// `[down | gate]` of each adapted projection, [tokens, a_rows + lora_heads].
    pub adapter_state: [Option<T>; 7],
}

/// Results that live only inside one layer.
#[derive(Clone, Debug)]
pub struct Work<T> {
    /// A normalised residual stream, [tokens, d_model].
    pub normed: T,
    /// Its 1/rms, where the backward pass computes it again, `[tokens]`.
    pub inv_rms: T,
    /// silu(gate) ∘ up, [tokens, d_ffn].
    pub act: T,
}

/// The backward pass's own buffers.
#[derive(Clone, Debug)]
pub struct Gradients<T> {
    /// Gradient of the residual stream, [tokens, d_model].
    pub dx: T,
    /// Gradient of a normalised residual stream, [tokens, d_model].
    pub dnormed: T,
    /// Gradient of attention's result, [tokens, n_heads * head_dim].
    pub d_o: T,
    /// Gradient of the queries.
    pub dq: T,
    /// Gradient of the keys.
    pub dk: T,
    /// Gradient of the values.
    pub dv: T,
    /// Gradient of `act`, then of `gate`, [tokens, d_ffn].
    pub dact: T,
}

/// The positions whose prediction is read.
#[derive(Clone, Debug)]
pub struct Read<T> {
    /// Their rows of the last layer's output, [tokens, d_model].
    pub x: T,
    /// 1/rms, `[tokens]`.
    pub inv_rms: T,
    /// Normalised, [tokens, d_model].
    pub normed: T,
    /// Negative log-likelihoods, `[tokens]`.
    pub nll: T,
    /// Gradient of `normed`, and then of `x`, [tokens, d_model]; training only.
    pub gradients: Option<[T; 2]>,
}

/// All that a pass over the model writes.
#[derive(Clone, Debug)]
pub struct Activations<T> {
    /// The most tokens in one row.
    pub tokens: usize,
    /// Inputs of the layers and the last one's output: `layers + 1` of them when training, else two that alternate.
    pub inputs: Vec<T>,
    /// One set a layer under [`Keep::All`], else one for all.
    pub layers: Vec<LayerActivations<T>>,
    /// Shared by all layers.
    pub work: Work<T>,
    /// The positions that are read.
    pub read: Read<T>,
    /// Training only.
    pub gradients: Option<Gradients<T>>,
}

/// An error if memory can't be planned for so many tokens.
pub(crate) fn check_tokens(tokens: usize) -> Result<()> {
    if tokens > MAX_SIZE {
        return Err(Error::Invalid(format!("memory for {tokens} tokens asked for, wanted at most {MAX_SIZE}")));
    }
    Ok(())
}

impl Activations<Size> {
    /// The sizes for rows of up to `tokens` tokens. Fails if that is absurd, or the adapter's settings don't go together.
    pub fn plan(config: &Config, adapter: Option<&AdapterConfig>, tokens: usize, purpose: Purpose) -> Result<Self> {
        check_tokens(tokens)?;
        adapter.map_or(Ok(()), AdapterConfig::check)?;
        use Size::{Activation, Buffer};
        let attention = AttentionShape::of(config);
        let (d, ffn) = (tokens * config.d_model, Activation(tokens * config.d_ffn));
        let (q, kv) = (Activation(tokens * attention.q_width()), Activation(tokens * attention.kv_width()));
        let adapter_state = Projection::ALL.map(|projection| {
            let adapter = adapter.filter(|a| a.targets.contains(&projection))?;
            Some(Buffer(adapter.shape(config, projection, tokens).state_width() * tokens))
        });
        let layer = LayerActivations {
            attention_inv_rms: Buffer(tokens),
            q,
            k: kv,
            v: kv,
            o: q,
            lse: Buffer(tokens * config.n_heads),
            middle: Buffer(d),
            ffn_inv_rms: Buffer(tokens),
            gate: ffn,
            up: ffn,
            adapter_state,
        };
        let training = purpose != Purpose::Forward;
        let sets = if purpose == Purpose::Training(Keep::All) { config.layers } else { 1 };
        Ok(Self {
            tokens,
            inputs: vec![Buffer(d); if training { config.layers + 1 } else { 2 }],
            layers: vec![layer; sets],
            work: Work { normed: Activation(d), inv_rms: Buffer(tokens), act: ffn },
            read: Read {
                x: Buffer(d),
                inv_rms: Buffer(tokens),
                normed: Activation(d),
                nll: Buffer(tokens),
                gradients: training.then_some([Buffer(d), Buffer(d)]),
            },
            gradients: training.then_some(Gradients {
                dx: Buffer(d),
                dnormed: Buffer(d),
                d_o: q,
                dq: q,
                dk: kv,
                dv: kv,
                dact: ffn,
            }),
        })
    }

    /// What [`Activations::allocate`] will take of this backend, `u64::MAX` at most.
    pub fn bytes<B: Backend>(&self, backend: &B) -> u64 {
        let mut bytes = 0u64;
        let counted = self.clone().try_map(&mut |size| {
            let (each, len) = match size {
                Size::Buffer(len) => (4, len),
                Size::Activation(len) => (backend.activation_bytes(), len),
            };
            bytes = bytes.saturating_add((each as u64).saturating_mul(len as u64));
            Ok(())
        });
        debug_assert!(counted.is_ok());
        bytes
    }

    /// The buffers.
    pub fn allocate<B: Backend>(self, backend: &B) -> Result<Activations<B::Buffer>> {
        self.try_map(&mut |size| match size {
            Size::Buffer(len) => backend.buffer(len),
            Size::Activation(len) => backend.activation(len),
        })
    }
}

impl<T> Activations<T> {
    fn try_map<U>(self, f: &mut impl FnMut(T) -> Result<U>) -> Result<Activations<U>> {
        Ok(Activations {
            tokens: self.tokens,
            inputs: self.inputs.into_iter().map(&mut *f).collect::<Result<_>>()?,
            layers: self.layers.into_iter().map(|layer| layer.try_map(f)).collect::<Result<_>>()?,
            work: Work { normed: f(self.work.normed)?, inv_rms: f(self.work.inv_rms)?, act: f(self.work.act)? },
            read: self.read.try_map(f)?,
            gradients: self.gradients.map(|gradients| gradients.try_map(f)).transpose()?,
        })
    }

    /// The input of `layer`, and where its output goes.
    pub(crate) fn input_and_output(inputs: &mut [T], layer: usize) -> (&T, &mut T) {
        let (input, output) = (layer % inputs.len(), (layer + 1) % inputs.len());
        if input < output {
            let (left, right) = inputs.split_at_mut(output);
            (&left[input], &mut right[0])
        } else {
            let (left, right) = inputs.split_at_mut(input);
            (&right[0], &mut left[output])
        }
    }
}

impl<T> LayerActivations<T> {
    fn try_map<U>(self, f: &mut impl FnMut(T) -> Result<U>) -> Result<LayerActivations<U>> {
        let mut adapter_state = [const { None }; 7];
        for (to, from) in adapter_state.iter_mut().zip(self.adapter_state) {
            *to = from.map(&mut *f).transpose()?;
        }
        Ok(LayerActivations {
            attention_inv_rms: f(self.attention_inv_rms)?,
            q: f(self.q)?,
            k: f(self.k)?,
            v: f(self.v)?,
            o: f(self.o)?,
            lse: f(self.lse)?,
            middle: f(self.middle)?,
            ffn_inv_rms: f(self.ffn_inv_rms)?,
            gate: f(self.gate)?,
            up: f(self.up)?,
            adapter_state,
        })
    }
}

impl<T> Read<T> {
    fn try_map<U>(self, f: &mut impl FnMut(T) -> Result<U>) -> Result<Read<U>> {
        let gradients = match self.gradients {
            Some([dnormed, dx]) => Some([f(dnormed)?, f(dx)?]),
            None => None,
        };
        Ok(Read { x: f(self.x)?, inv_rms: f(self.inv_rms)?, normed: f(self.normed)?, nll: f(self.nll)?, gradients })
    }
}

impl<T> Gradients<T> {
    fn try_map<U>(self, f: &mut impl FnMut(T) -> Result<U>) -> Result<Gradients<U>> {
        Ok(Gradients {
            dx: f(self.dx)?,
            dnormed: f(self.dnormed)?,
            d_o: f(self.d_o)?,
            dq: f(self.dq)?,
            dk: f(self.dk)?,
            dv: f(self.dv)?,
            dact: f(self.dact)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_alternate_or_follow_each_other() {
        let mut two = [0, 1];
        assert_eq!(Activations::input_and_output(&mut two, 0), (&0, &mut 1));
        assert_eq!(Activations::input_and_output(&mut two, 1), (&1, &mut 0));
        let mut many = [0, 1, 2, 3];
        assert_eq!(Activations::input_and_output(&mut many, 2), (&2, &mut 3));
    }
}
