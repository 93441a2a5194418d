//! The shape of a model, from `config.json`; GGUF metadata gives the same (see `checkpoint/gguf.rs`).

pub(crate) mod architecture;
pub(crate) mod json;
mod rope;

pub use architecture::{Architecture, Biases, Family, Window};
pub use rope::{Llama3Scaling, Rope, RopeScaling, Yarn};

/// What a model's arithmetic depends on, beside its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the feed-forward.
    pub d_ffn: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMS norms.
    pub norm_eps: f32,
    /// Rotary positions.
    pub rope: Rope,
    /// Positions the model was made for.
    pub context: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The tokens that end one.
    pub eos: Vec<u32>,
    /// What the model has beyond plain LLaMA.
    pub architecture: Architecture,
}

/// No real model has a size beyond this; it keeps every product of two sizes inside 64 bits.
pub(crate) const MAX_SIZE: usize = 1 << 28;
/// No real model is deeper; it bounds what a hostile file can make a loader list.
const MAX_LAYERS: usize = 1 << 12;

impl Config {
    /// Whether the sizes make a model; the text says which doesn't, what was wanted and what was found.
    pub(crate) fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocabulary", self.vocab, MAX_SIZE),
            ("hidden size", self.d_model, MAX_SIZE),
            ("feed-forward size", self.d_ffn, MAX_SIZE),
            ("number of layers", self.layers, MAX_LAYERS),
            ("number of heads", self.n_heads, MAX_LAYERS),
            ("number of key/value heads", self.kv_heads, MAX_LAYERS),
            ("head size", self.head_dim, MAX_LAYERS),
            ("context length", self.context, MAX_SIZE),
        ];
        for (what, value, most) in sizes {
            if value == 0 || value > most {
                return Err(format!("{what} {value}, wanted 1 to {most}"));
            }
        }
        if !self.n_heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads, wanted a multiple of the {} key/value heads", self.n_heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head size {}, wanted an even number", self.head_dim));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(format!("norm epsilon {}, wanted a number from 0 on", self.norm_eps));
        }
        self.rope.check(self.head_dim)
    }

    /// Names the shape, for [`crate::checkpoint::Checkpoint::fingerprint`]. Plain LLaMA's name is the one that runs recorded
    /// before there were other architectures.
    pub(crate) fn shape_name(&self) -> String {
        let name = format!("{self:?}");
        let plain = Architecture::default();
        if self.architecture == plain { name.replace(&format!(", architecture: {plain:?}"), "") } else { name }
    }
}
