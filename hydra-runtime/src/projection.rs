//! The seven linear layers of a block that an adapter may sit on.

use crate::config::Config;
use core::ops::{Index, IndexMut};

/// A projection. [`ByProjection`] holds a value for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The attention's output.
    O,
    /// The feed-forward's gate.
    Gate,
    /// The feed-forward's input.
    Up,
    /// The feed-forward's output.
    Down,
}

use Projection::{Down, Gate, K, O, Q, Up, V};

impl Projection {
    /// All of them, in canonical order.
    pub const ALL: [Projection; 7] = [Q, K, V, O, Gate, Up, Down];

    /// The name in adapter files and on the command line: "q_proj".
    pub const fn name(self) -> &'static str {
        match self {
            Q => "q_proj",
            K => "k_proj",
            V => "v_proj",
            O => "o_proj",
            Gate => "gate_proj",
            Up => "up_proj",
            Down => "down_proj",
        }
    }

    /// The name inside a Hugging Face layer: "self_attn.q_proj".
    pub const fn hf_path(self) -> &'static str {
        match self {
            Q => "self_attn.q_proj",
            K => "self_attn.k_proj",
            V => "self_attn.v_proj",
            O => "self_attn.o_proj",
            Gate => "mlp.gate_proj",
            Up => "mlp.up_proj",
            Down => "mlp.down_proj",
        }
    }

    /// The name inside a GGUF block: "attn_q".
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Q => "attn_q",
            K => "attn_k",
            V => "attn_v",
            O => "attn_output",
            Gate => "ffn_gate",
            Up => "ffn_up",
            Down => "ffn_down",
        }
    }

    /// `(d_out, d_in)` of its weight.
    pub const fn dims(self, config: &Config) -> (usize, usize) {
        let (q, kv) = (config.n_heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Q => (q, config.d_model),
            K | V => (kv, config.d_model),
            O => (config.d_model, q),
            Gate | Up => (config.d_ffn, config.d_model),
            Down => (config.d_model, config.d_ffn),
        }
    }

    /// Whether it adds a bias.
    pub const fn has_bias(self, config: &Config) -> bool {
        let biases = config.architecture.biases;
        match self {
            Q | K | V => biases.qkv,
            O => biases.o,
            Gate | Up | Down => biases.mlp,
        }
    }

    /// From "q_proj" or "q".
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| name == p.name() || p.name().strip_suffix("_proj") == Some(name))
    }
}

/// A value for each projection, in the order of [`Projection::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByProjection<T>([T; Projection::ALL.len()]);

impl<T> ByProjection<T> {
    /// What `value` gives for each projection.
    pub fn from_fn(value: impl FnMut(Projection) -> T) -> Self {
        Self(Projection::ALL.map(value))
    }

    /// What `value` gives for each projection; the first error ends it.
    pub fn try_from_fn<E>(mut value: impl FnMut(Projection) -> Result<T, E>) -> Result<Self, E> {
        let [q, k, v, o, gate, up, down] = Projection::ALL;
        Ok(Self([value(q)?, value(k)?, value(v)?, value(o)?, value(gate)?, value(up)?, value(down)?]))
    }

    /// The values, in order.
    pub fn iter(&self) -> core::slice::Iter<'_, T> {
        self.0.iter()
    }

    /// The values, in order.
    pub fn iter_mut(&mut self) -> core::slice::IterMut<'_, T> {
        self.0.iter_mut()
    }
}

impl<T> Index<Projection> for ByProjection<T> {
    type Output = T;

    fn index(&self, projection: Projection) -> &T {
        &self.0[projection as usize]
    }
}

impl<T> IndexMut<Projection> for ByProjection<T> {
    fn index_mut(&mut self, projection: Projection) -> &mut T {
        &mut self.0[projection as usize]
    }
}

impl<'a, T> IntoIterator for &'a ByProjection<T> {
    type Item = &'a T;
    type IntoIter = core::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'a, T> IntoIterator for &'a mut ByProjection<T> {
    type Item = &'a mut T;
    type IntoIter = core::slice::IterMut<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}
