//! One token after another, with a key-value cache.

use crate::adapter::Adapter;
use crate::adapter::device::DeviceAdapter;
use crate::backend::{Backend, Device, Linear, LinearOutput};
use crate::batch::{Packed, Sequence};
use crate::model::activations::{Activations, Plan, Purpose};
use crate::model::{AttachedAdapter, Cached, KvCache, Model, Pass};
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Tokens of a prompt that go through the model at once.
const PROMPT_CHUNK: usize = 512;

/// A sequence that grows token by token: the keys and values of what has been fed are kept. The caller feeds it the prompt and then each
/// token that it draws; [`crate::model::Model::generate`] is that loop.
///
/// It owns all that it needs: it may move to another thread, or into any struct.
pub struct Generator<B: Backend = Device> {
    model: Model<B>,
    adapter: Option<Arc<DeviceAdapter<B>>>,
    activations: Activations<B>,
    rope: B::Buffer,
    cache: KvCache<B>,
    on_device: B::Buffer,
    logits: Vec<f32>,
    cancel: Option<Arc<AtomicBool>>,
}

impl<B: Backend> Generator<B> {
    /// Room for `max_len` tokens, prompt and answer. The adapter is copied to the device. Positions beyond
    /// [`crate::config::Config::context`] are computed as any other, but the model was not trained for them.
    ///
    /// Under the label gate every token gets the mean of the heads; [`Adapter::head`] takes out the one of a label.
    pub fn new(model: &Model<B>, adapter: Option<&Adapter>, max_len: usize) -> Result<Self> {
        let attached = adapter.map(|adapter| model.attach(adapter)).transpose()?;
        Self::attached(model, attached.as_ref(), max_len)
    }

    /// The same with an adapter that is on the device already, or with none.
    pub fn attached(model: &Model<B>, adapter: Option<&AttachedAdapter<B>>, max_len: usize) -> Result<Self> {
        let (backend, config) = (model.backend(), model.config());
        let adapter = adapter.map(|adapter| adapter.parameters(model)).transpose()?;
        let settings = adapter.as_ref().map(|adapter| &adapter.config);
        let tokens = PROMPT_CHUNK.min(max_len.max(1));
        Ok(Self {
            activations: Plan::new(config, settings, tokens, Purpose::Forward)?.allocate(backend)?,
            // Before the table of positions, which the host computes: too large a request is refused here.
            cache: KvCache::new(&model.0, max_len)?,
            rope: model.0.rope_table(max_len)?,
            on_device: backend.buffer(config.vocab)?,
            logits: vec![0.0; config.vocab],
            adapter,
            model: model.clone(),
            cancel: None,
        })
    }

    /// Ends [`Generator::feed`] with [`Error::Cancelled`] soon after `flag` is set.
    pub fn with_cancel(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = Some(flag);
        self
    }

    /// Appends `tokens`; returns the logits `[vocab]` of what may follow. After an error nothing has been appended:
    /// [`Error::CacheFull`], [`Error::TokenOutOfRange`], [`Error::Cancelled`] and others.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        if tokens.is_empty() {
            return Err(Error::Invalid("no tokens to feed".into()));
        }
        let (len, more, capacity) = (self.cache.len, tokens.len(), self.cache.capacity);
        if len + more > capacity {
            return Err(Error::CacheFull { len, more, capacity });
        }
        self.append(tokens).inspect_err(|_| self.cache.len = len)?;
        Ok(&self.logits)
    }

    fn append(&mut self, tokens: &[u32]) -> Result<()> {
        let mut position = self.cache.len;
        let parts = tokens.chunks(self.activations.tokens).map(|part| {
            let packed = Packed::new([&Sequence::prompt(part)], position, self.model.config().vocab);
            position += part.len();
            packed
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let last = parts.len() - 1;
        let (model, adapter, rope) = (&*self.model.0, self.adapter.as_deref(), &self.rope);
        let _bound = model.backend.bind_caller();
        for (i, packed) in parts.iter().enumerate() {
            let cancel = self.cancel.as_deref();
            let pass = Pass { model, adapter, packed, rope, training: None, cancel, batch: None };
            let row = packed.len() as u32 - 1;
            let read: &[u32] = if i == last { &[row] } else { &[] };
            pass.read(&mut self.activations, Cached::Append(&mut self.cache), read)?;
        }
        model.backend.linear(Linear {
            output: LinearOutput::Buffer { y: &mut self.on_device, residual: None },
            tokens: 1,
            x: &self.activations.read.normed,
            weight: &model.lm_head,
            bias: None,
            adapter: None,
        })?;
        model.backend.download(&mut self.logits, &self.on_device)
    }

    /// What the latest [`Generator::feed`] returned.
    pub(super) fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Tokens fed so far.
    pub fn len(&self) -> usize {
        self.cache.len
    }

    /// Whether nothing has been fed.
    pub fn is_empty(&self) -> bool {
        self.cache.len == 0
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.cache.len = self.cache.len.min(len);
    }
}
