//! Keys and values of tokens already seen.

use super::Loaded;
use super::activations::check_tokens;
use crate::Result;
use crate::backend::{AttentionShape, Backend, CachedRows, Prefix};
use crate::batch::Segment;

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

    /// Copies `len` rows of `width` columns of all layers from row `from` of `cache` to row `to`.
    pub fn copy_rows(
        &mut self,
        backend: &B,
        to: usize,
        cache: &Self,
        from: usize,
        [len, width]: [usize; 2],
    ) -> Result<()> {
        let values = from * width..(from + len) * width;
        let layers = self.k.iter_mut().zip(&cache.k).chain(self.v.iter_mut().zip(&cache.v));
        for (own, other) in layers {
            backend.copy_activations(own, to * width, other, values.clone())?;
        }
        Ok(())
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
    /// Segment i continues the cache whose number is `slots[i]`, and is added to it.
    Batch { caches: &'a mut [KvCache<B>], slots: &'a [usize] },
}

impl<B: Backend> Cached<'_, B> {
    /// What all of a layer's segments continue.
    pub(super) fn prefix(&self, layer: usize) -> Option<Prefix<'_, B>> {
        match self {
            Cached::No | Cached::Batch { .. } => None,
            Cached::Read(cache) => cache.prefix(layer),
            Cached::Append(cache) => cache.prefix(layer),
        }
    }

    /// The rows of each segment of a batch with their own cache.
    pub(super) fn sequences(&self, layer: usize, segments: &[Segment]) -> Vec<CachedRows<'_, B>> {
        let Cached::Batch { caches, slots } = self else { return Vec::new() };
        let sequence = |(&rows, &slot): (&Segment, &usize)| {
            let cache = &caches[slot];
            CachedRows { rows, k: &cache.k[layer], v: &cache.v[layer], len: cache.len }
        };
        segments.iter().zip(*slots).map(sequence).collect()
    }

    /// Copies a layer's new keys and values, of `width` columns, behind the rows in use. [`Cached::prefix`] does not
    /// have them before
    /// [`Cached::grow`].
    pub(super) fn append(
        &mut self,
        backend: &B,
        layer: usize,
        [k, v]: [&B::Activations; 2],
        segments: &[Segment],
        width: usize,
    ) -> Result<()> {
        self.each(segments, |cache, segment| {
            let (at, values) = (cache.len * width, segment.start * width..(segment.start + segment.len) * width);
            backend.copy_activations(&mut cache.k[layer], at, k, values.clone())?;
            backend.copy_activations(&mut cache.v[layer], at, v, values)
        })
    }

    /// Counts the tokens that all layers have appended.
    pub(super) fn grow(&mut self, segments: &[Segment]) -> Result<()> {
        self.each(segments, |cache, segment| {
            cache.len += segment.len;
            Ok(())
        })
    }

    /// Calls `body` with each segment that is added to a cache.
    fn each(
        &mut self,
        segments: &[Segment],
        mut body: impl FnMut(&mut KvCache<B>, Segment) -> Result<()>,
    ) -> Result<()> {
        match self {
            Cached::No | Cached::Read(_) => Ok(()),
            Cached::Append(cache) => segments.iter().try_for_each(|&segment| body(cache, segment)),
            Cached::Batch { caches, slots } => {
                segments.iter().zip(*slots).try_for_each(|(&segment, &slot)| body(&mut caches[slot], segment))
            }
        }
    }
}
