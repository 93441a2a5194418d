//! Keys and values of tokens already seen.

use super::Loaded;
use super::activations::check_tokens;
use crate::Result;
use crate::backend::{AttentionShape, Backend, Prefix};

/// Keys and values of tokens already seen, a buffer a layer.
pub(crate) struct KvCache<B: Backend> {
    k: Vec<B::Activations>,
    v: Vec<B::Activations>,
    /// Tokens in the cache.
    pub len: usize,
    /// Tokens it has room for.
    pub capacity: usize,
}

impl<B: Backend> KvCache<B> {
    pub fn new(model: &Loaded<B>, capacity: usize) -> Result<Self> {
        check_tokens(capacity)?;
        let width = AttentionShape::of(&model.config).kv_width();
        let buffers =
            || (0..model.config.layers).map(|_| model.backend.activations(capacity * width)).collect::<Result<_>>();
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

impl<B: Backend> Cached<'_, B> {
    /// What a layer's segments continue.
    pub(super) fn prefix(&self, layer: usize) -> Option<Prefix<'_, B>> {
        match self {
            Cached::No => None,
            Cached::Read(cache) => cache.prefix(layer),
            Cached::Append(cache) => cache.prefix(layer),
        }
    }

    /// Copies a layer's new keys and values, of `width` columns, behind the rows in use. Attention does not read them before
    /// [`Cached::grow`].
    pub(super) fn append(
        &mut self,
        backend: &B,
        layer: usize,
        [k, v]: [&B::Activations; 2],
        [tokens, width]: [usize; 2],
    ) -> Result<()> {
        let Cached::Append(cache) = self else { return Ok(()) };
        backend.copy_activations(&mut cache.k[layer], cache.len * width, k, tokens * width)?;
        backend.copy_activations(&mut cache.v[layer], cache.len * width, v, tokens * width)
    }

    /// Counts the tokens that all layers have appended.
    pub(super) fn grow(&mut self, tokens: usize) {
        if let Cached::Append(cache) = self {
            cache.len += tokens;
        }
    }
}
