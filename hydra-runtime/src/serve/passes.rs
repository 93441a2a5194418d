//! Slices of sequences through the model, and what is read of them: logits and gates.

use super::{EngineOptions, TokenGates};
use crate::adapter::device::DeviceAdapter;
use crate::backend::{AttentionShape, Backend, Linear, LinearOutput};
use crate::batch::{Packed, Sequence};
use crate::config::Config;
use crate::model::activations::{Activations, Plan, Purpose};
use crate::model::{Cached, KvCache, Loaded, Model, Pass};
use crate::projection::{ByProjection, Projection};
use crate::{Error, Result};

/// Prompts are cut at multiples of this many tokens.
pub const SLICE: usize = 64;

/// What is to be read of a slice.
#[derive(Clone, Copy)]
pub(super) struct Wants {
    /// The logits of its last row, from which a token is drawn.
    pub last: bool,
    /// Those of all rows.
    pub all: bool,
    /// The gates of its last row.
    pub gates: bool,
}

/// The next tokens of a sequence.
pub(super) struct Slice<'a, B: Backend> {
    pub tokens: &'a [u32],
    pub adapter: Option<&'a DeviceAdapter<B>>,
    pub wants: Wants,
}

/// What was asked for; empty what was not.
pub(super) struct Outcome<'a> {
    /// `[vocab]`.
    pub last: &'a [f32],
    /// [rows, vocab].
    all: &'a [f32],
    vocab: usize,
    pub gates: Option<TokenGates>,
}

impl Outcome<'_> {
    /// The logits of each row.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.all.chunks_exact(self.vocab)
    }
}

/// All that passes write but the caches.
pub(super) struct Passes<B: Backend> {
    model: Model<B>,
    activations: Activations<B>,
    /// The widest adapter state of each projection that there is room for.
    state_widths: ByProjection<usize>,
    rope: B::Buffer,
    /// The row from which a token is drawn, [d_model].
    drawn: B::Activations,
    /// `[vocab]`, on the device and here.
    last: (B::Buffer, Vec<f32>),
    /// [SLICE, vocab], on the device and here; made when it is first used.
    all: Option<(B::Buffer, Vec<f32>)>,
}

/// Bytes of what an engine with these options allocates, and of its backend's workspace.
pub(super) fn plan_bytes<B: Backend>(
    backend: &B,
    config: &Config,
    options: &EngineOptions,
    context: usize,
) -> Result<u64> {
    let activations = Plan::new(config, None, SLICE, Purpose::Forward)?.bytes(backend);
    let width = AttentionShape::of(config).kv_width();
    let token = (2 * config.layers * width * backend.activation_bytes()) as u64;
    let cached = (options.slots.saturating_mul(context) as u64).saturating_add(options.prefix_tokens as u64);
    let rope = 4 * context.saturating_mul(config.head_dim) as u64;
    let read = 4 * (1 + SLICE as u64) * config.vocab as u64 + (config.d_model * backend.activation_bytes()) as u64;
    let parts = [token.saturating_mul(cached), rope, read, backend.workspace_bytes(SLICE, config)];
    Ok(parts.into_iter().fold(activations, u64::saturating_add))
}

impl<B: Backend> Passes<B> {
    /// For sequences of up to `context` tokens.
    pub fn new(model: &Model<B>, context: usize) -> Result<Self> {
        let (backend, config) = (model.backend(), model.config());
        Ok(Self {
            activations: Plan::new(config, None, SLICE, Purpose::Forward)?.allocate(backend)?,
            state_widths: ByProjection::default(),
            rope: model.0.rope_table(context)?,
            drawn: backend.activations(config.d_model)?,
            last: (backend.buffer(config.vocab)?, vec![0.0; config.vocab]),
            all: None,
            model: model.clone(),
        })
    }

    /// Makes room for an adapter's states.
    pub fn reserve(&mut self, adapter: &DeviceAdapter<B>) -> Result<()> {
        let (backend, states) = (self.model.backend(), &mut self.activations.layers[0].adapter_state);
        for projection in Projection::ALL {
            let width = adapter.slots.get(0, projection).map_or(0, |slot| slot.shape.state_width());
            if width > self.state_widths[projection] {
                states[projection] = Some(backend.buffer(SLICE * width)?);
                self.state_widths[projection] = width;
            }
        }
        Ok(())
    }

    /// Takes at most [`SLICE`] tokens through the model, behind those in the cache. After an error the cache is as before.
    pub fn run(&mut self, cache: &mut KvCache<B>, slice: &Slice<'_, B>) -> Result<Outcome<'_>> {
        let len = cache.len;
        let gates = self.forward(cache, slice).inspect_err(|_| cache.len = len)?;
        let vocab = self.last.1.len();
        let last: &[f32] = if slice.wants.last { &self.last.1 } else { &[] };
        let all = self.all.as_ref().filter(|_| slice.wants.all);
        let all = all.map_or(&[][..], |(_, logits)| &logits[..slice.tokens.len() * vocab]);
        Ok(Outcome { last, all, vocab, gates })
    }

    fn forward(&mut self, cache: &mut KvCache<B>, slice: &Slice<'_, B>) -> Result<Option<TokenGates>> {
        let Slice { tokens, adapter, wants } = *slice;
        let (model, acts) = (&*self.model.0, &mut self.activations);
        let packed = Packed::new([&Sequence::prompt(tokens)], cache.len, model.config.vocab)?;
        let pass = Pass { model, adapter, packed: &packed, rope: &self.rope, training: None, cancel: None };
        let count = tokens.len() as u32;
        let rows = match (wants.all, wants.last) {
            (true, _) => (0..count).collect(),
            (false, true) => vec![count - 1],
            (false, false) => Vec::new(),
        };
        let gates = match adapter.filter(|_| wants.gates) {
            None => {
                pass.read(acts, Cached::Append(cache), &rows)?;
                None
            }
            Some(adapter) => {
                let mut gates = GateReader::new(adapter, &model.config);
                pass.forward_by_layer(acts, Cached::Append(cache), |acts, layer| {
                    gates.read(&model.backend, acts, layer, tokens.len() - 1)
                })?;
                pass.read_outputs(acts, &rows)?;
                Some(gates.gates)
            }
        };
        self.logits(rows.len(), wants)?;
        Ok(gates)
    }

    /// The logits of the `rows` rows that were read.
    fn logits(&mut self, rows: usize, wants: Wants) -> Result<()> {
        let (model, normed) = (&*self.model.0, &self.activations.read.normed);
        let vocab = model.config.vocab;
        if wants.all {
            if self.all.is_none() {
                self.all = Some((model.backend.buffer(SLICE * vocab)?, vec![0.0; SLICE * vocab]));
            }
            let (on_device, logits) = self.all.as_mut().expect("it has just been made");
            lm_head(model, on_device, &mut logits[..rows * vocab], normed)?;
        }
        if wants.last {
            // Always as a row of its own, so that it has the same bits whatever else is read.
            let x = if rows > 1 {
                model.backend.gather_activations(&mut self.drawn, normed, &[rows as u32 - 1], model.config.d_model)?;
                &self.drawn
            } else {
                normed
            };
            lm_head(model, &mut self.last.0, &mut self.last.1, x)?;
        }
        Ok(())
    }
}

/// `logits` [rows, vocab] of the first rows of `x` [rows, d_model].
fn lm_head<B: Backend>(
    model: &Loaded<B>,
    on_device: &mut B::Buffer,
    logits: &mut [f32],
    x: &B::Activations,
) -> Result<()> {
    model.backend.linear(Linear {
        output: LinearOutput::Buffer { y: on_device, residual: None },
        tokens: logits.len() / model.config.vocab,
        x,
        weight: &model.lm_head,
        bias: None,
        adapter: None,
    })?;
    model.backend.download(logits, on_device)
}

/// Collects the gates of one row, layer by layer.
struct GateReader<'a, B: Backend> {
    adapter: &'a DeviceAdapter<B>,
    gates: TokenGates,
}

impl<'a, B: Backend> GateReader<'a, B> {
    fn new(adapter: &'a DeviceAdapter<B>, config: &Config) -> Self {
        let adapted = |layer| Projection::ALL.into_iter().filter(move |&p| adapter.slots.get(layer, p).is_some());
        let slots: Vec<_> = (0..config.layers).flat_map(|layer| adapted(layer).map(move |p| (layer, p))).collect();
        let lora_heads = adapter.config.lora_heads;
        let gates = TokenGates { gates: Vec::with_capacity(slots.len() * lora_heads), slots, lora_heads };
        Self { adapter, gates }
    }

    /// Takes those of a layer that has just been computed.
    fn read(&mut self, backend: &B, acts: &Activations<B>, layer: usize, row: usize) -> Result<()> {
        for projection in Projection::ALL {
            let Some(slot) = self.adapter.slots.get(layer, projection) else { continue };
            let state = acts.layers[0].adapter_state[projection].as_ref();
            let state =
                state.ok_or_else(|| Error::WrongAdapter("an adapter that the engine has no room for".into()))?;
            let (shape, width) = (slot.shape, slot.shape.state_width());
            let mut rows = vec![0.0; (row + 1) * width];
            backend.download(&mut rows, state)?;
            self.gates.gates.extend_from_slice(&rows[row * width + shape.a_rows()..]);
        }
        Ok(())
    }
}
