//! Rows of several sequences through the model in one pass, and what is read of them: logits, log-probabilities and
//! gates.

use super::gates::GateReader;
use super::logprob::token_logprob;
use super::{EngineOptions, TokenGates, TokenLogprob};
use crate::Result;
use crate::adapter::device::DeviceAdapter;
use crate::backend::{AttentionShape, Backend, LinearOutput, LinearRows, RowGroup, RowKind, Workload};
use crate::batch::{Packed, Sequence};
use crate::config::Config;
use crate::model::activations::{Activations, Plan, Purpose};
use crate::model::{Batch, Cached, KvCache, Model, Pass};
use crate::projection::{ByProjection, Projection};
use std::ops::Range;

/// Prompts are cut at multiples of this many tokens.
pub const SLICE: usize = 64;

/// The next tokens of a sequence.
pub(super) struct Slice<'a, B: Backend> {
    /// The cache that they continue.
    pub slot: usize,
    pub tokens: &'a [u32],
    pub adapter: Option<&'a DeviceAdapter<B>>,
    /// Whether a token is drawn after the last row.
    pub draws: bool,
    /// Whether the gates of the last row are wanted.
    pub gates: bool,
    pub logprobs: Option<Logprobs<'a>>,
}

/// Log-probabilities of a prompt's tokens.
#[derive(Clone, Copy)]
pub(super) struct Logprobs<'a> {
    /// The token after each row; the prompt's last row has none.
    pub targets: &'a [u32],
    /// How many of the likeliest tokens.
    pub top: usize,
}

/// What was asked of a slice.
pub(super) struct Outcome {
    /// The row of [`Passes::logits`] from which a token is drawn.
    pub drawn: Option<usize>,
    /// Of the slice's targets; an error concerns its request alone.
    pub logprobs: Result<Vec<TokenLogprob>>,
    pub gates: Option<TokenGates>,
}

/// All that passes write but the caches.
pub(super) struct Passes<B: Backend> {
    model: Model<B>,
    activations: Activations<B>,
    /// The widest adapter state of each projection that there is room for.
    state_widths: ByProjection<usize>,
    rope: B::Buffer,
    /// Rows whose logits are computed, [logit_rows, d_model].
    gathered: B::Activations,
    /// [logit_rows, vocab].
    on_device: B::Buffer,
    /// The same here.
    logits: Vec<f32>,
}

/// The most rows of a pass.
pub(super) fn rows<B: Backend>(backend: &B, options: &EngineOptions) -> usize {
    if backend.batches() { options.slots.max(options.prompt_tokens).max(SLICE) } else { SLICE }
}

/// The most rows whose logits are computed at a time.
fn logit_rows<B: Backend>(backend: &B, options: &EngineOptions) -> usize {
    if backend.batches() { options.slots.max(SLICE) } else { SLICE }
}

/// Bytes of what an engine with these options allocates, and of its backend's workspace.
pub(super) fn plan_bytes<B: Backend>(
    backend: &B,
    config: &Config,
    options: &EngineOptions,
    context: usize,
) -> Result<u64> {
    let (rows, logit_rows) = (rows(backend, options), logit_rows(backend, options) as u64);
    let activations = Plan::new(config, None, rows, Purpose::Forward)?.bytes(backend);
    let bytes = backend.activation_bytes() as u64;
    let token = 2 * bytes * (config.layers * AttentionShape::of(config).kv_width()) as u64;
    let tokens = (options.slots.saturating_mul(context) as u64).saturating_add(options.prefix_tokens as u64);
    let rope = 4 * context.saturating_mul(config.head_dim) as u64;
    let logits = logit_rows.saturating_mul(bytes * config.d_model as u64 + 8 * config.vocab as u64);
    // Adapters come with requests.
    let workspace = backend.workspace_bytes(&[Workload { config, tokens: rows, adapters: &[], training: false }]);
    let parts = [token.saturating_mul(tokens), rope, logits, workspace];
    Ok(parts.into_iter().fold(activations, u64::saturating_add))
}

impl<B: Backend> Passes<B> {
    /// For sequences of up to `context` tokens.
    pub fn new(model: &Model<B>, options: &EngineOptions, context: usize) -> Result<Self> {
        let (backend, config) = (model.backend(), model.config());
        let logit_rows = logit_rows(backend, options);
        Ok(Self {
            activations: Plan::new(config, None, rows(backend, options), Purpose::Forward)?.allocate(backend)?,
            state_widths: ByProjection::default(),
            rope: model.0.rope_table(context)?,
            gathered: backend.activations(logit_rows * config.d_model)?,
            on_device: backend.buffer(logit_rows * config.vocab)?,
            logits: vec![0.0; logit_rows * config.vocab],
            model: model.clone(),
        })
    }

    /// Makes room for an adapter's states.
    pub fn reserve(&mut self, adapter: &DeviceAdapter<B>) -> Result<()> {
        let rows = self.activations.tokens;
        let (backend, states) = (self.model.backend(), &mut self.activations.layers[0].adapter_state);
        for projection in Projection::ALL {
            let width = adapter.slots.get(0, projection).map_or(0, |slot| slot.shape.state_width());
            if width > self.state_widths[projection] {
                states[projection] = Some(backend.buffer(rows * width)?);
                self.state_widths[projection] = width;
            }
        }
        Ok(())
    }

    /// The logits `[vocab]` of a row of the latest pass.
    pub fn logits(&self, row: usize) -> &[f32] {
        let vocab = self.model.config().vocab;
        &self.logits[row * vocab..(row + 1) * vocab]
    }

    /// Takes slices through the model, behind what is in their caches: one, if the backend doesn't batch. Slices with
    /// the same adapter follow each other. After an error the caches are as before.
    pub fn run(&mut self, caches: &mut [KvCache<B>], slices: &[Slice<'_, B>], kind: RowKind) -> Result<Vec<Outcome>> {
        let lens: Vec<usize> = slices.iter().map(|slice| caches[slice.slot].len).collect();
        let outcomes = self.forward(caches, slices, kind);
        if outcomes.is_err() {
            slices.iter().zip(lens).for_each(|(slice, len)| caches[slice.slot].len = len);
        }
        outcomes
    }

    fn forward(&mut self, caches: &mut [KvCache<B>], slices: &[Slice<'_, B>], kind: RowKind) -> Result<Vec<Outcome>> {
        let (model, acts) = (&*self.model.0, &mut self.activations);
        let mut packed = Packed::default();
        for slice in slices {
            packed.push(&Sequence::prompt(slice.tokens), caches[slice.slot].len, model.config.vocab)?;
        }
        let (groups, (rows, read)) = (&groups(slices), read_rows(slices));
        let slots: Vec<usize> = slices.iter().map(|slice| slice.slot).collect();
        let cached = Cached::Batch { caches, slots: &slots };
        let (rope, batch) = (&self.rope, Some(Batch { kind, groups }));
        let pass = Pass { model, adapter: None, packed: &packed, rope, training: None, cancel: None, batch };
        let mut gates: Vec<_> = slices
            .iter()
            .zip(&packed.segments)
            .map(|(slice, rows)| {
                let adapter = slice.adapter.filter(|_| slice.gates)?;
                Some(GateReader::new(adapter, &model.config, rows.start + rows.len - 1))
            })
            .collect();
        if gates.iter().all(Option::is_none) {
            pass.read(acts, cached, &rows)?;
        } else {
            // All rows of all layers, whose gates lie where the rows do.
            pass.forward_by_layer(acts, cached, |acts, layer| {
                GateReader::read(&mut gates, &model.backend, acts, layer, groups)
            })?;
            pass.read_outputs(acts, &rows)?;
        }
        let mut outcomes = Vec::with_capacity(slices.len());
        for ((slice, read), gates) in slices.iter().zip(&read).zip(gates) {
            let logprobs = slice.logprobs.map_or(Ok(Ok(Vec::new())), |wanted| self.logprobs(read.start, wanted))?;
            outcomes.push(Outcome { drawn: None, logprobs, gates: gates.map(GateReader::finish) });
        }
        let mut drawn = Vec::new();
        for (i, _) in slices.iter().enumerate().filter(|(_, slice)| slice.draws) {
            outcomes[i].drawn = Some(drawn.len());
            drawn.push(read[i].end as u32 - 1);
        }
        self.lm_head(&drawn, RowKind::Decode)?;
        Ok(outcomes)
    }

    /// Of the tokens after the rows that were read from row `first` on.
    fn logprobs(&mut self, first: usize, wanted: Logprobs<'_>) -> Result<Result<Vec<TokenLogprob>>> {
        let mut logprobs = Vec::with_capacity(wanted.targets.len());
        for (i, targets) in wanted.targets.chunks(SLICE).enumerate() {
            let first = first + i * SLICE;
            let rows: Vec<u32> = (first..first + targets.len()).map(|row| row as u32).collect();
            self.lm_head(&rows, RowKind::Prompt)?;
            for (row, &token) in targets.iter().enumerate() {
                match token_logprob(self.logits(row), token, wanted.top) {
                    Ok(logprob) => logprobs.push(logprob),
                    Err(error) => return Ok(Err(error)),
                }
            }
        }
        Ok(Ok(logprobs))
    }

    /// The logits of some of the rows that were read, in order.
    fn lm_head(&mut self, rows: &[u32], kind: RowKind) -> Result<()> {
        let Model(model) = &self.model;
        // Row by row on a device that doesn't batch: there the bits of a row may depend on the rows beside it.
        let batch = if kind == RowKind::Decode && !model.backend.batches() { 1 } else { rows.len().max(1) };
        let (config, normed) = (&model.config, &self.activations.read.normed);
        for (rows, logits) in rows.chunks(batch).zip(self.logits.chunks_mut(batch * config.vocab)) {
            model.backend.gather_activations(&mut self.gathered, normed, rows, config.d_model)?;
            model.backend.linear_rows(LinearRows {
                output: LinearOutput::Buffer { y: &mut self.on_device, residual: None },
                x: &self.gathered,
                weight: &model.lm_head,
                bias: None,
                kind,
                groups: &[RowGroup { rows: rows.len(), adapter: None }],
                states: None,
            })?;
            model.backend.download(&mut logits[..rows.len() * config.vocab], &self.on_device)?;
        }
        Ok(())
    }
}

/// Rows that follow each other and have the same adapter.
fn groups<'a, B: Backend>(slices: &[Slice<'a, B>]) -> Vec<(usize, Option<&'a DeviceAdapter<B>>)> {
    let mut groups: Vec<(usize, Option<&DeviceAdapter<B>>)> = Vec::new();
    for slice in slices {
        let address = |adapter: Option<&DeviceAdapter<B>>| adapter.map(std::ptr::from_ref);
        match groups.last_mut() {
            Some((rows, adapter)) if address(*adapter) == address(slice.adapter) => *rows += slice.tokens.len(),
            _ => groups.push((slice.tokens.len(), slice.adapter)),
        }
    }
    groups
}

/// The rows of a pass that are read, and where each slice's are among them.
fn read_rows<B: Backend>(slices: &[Slice<'_, B>]) -> (Vec<u32>, Vec<Range<usize>>) {
    let (mut rows, mut ranges, mut end) = (Vec::new(), Vec::new(), 0);
    for slice in slices {
        let (start, before) = (end, rows.len());
        end += slice.tokens.len();
        let first = match slice {
            Slice { logprobs: Some(_), .. } => start,
            Slice { draws: true, .. } => end - 1,
            _ => end,
        };
        rows.extend((first..end).map(|row| row as u32));
        ranges.push(before..rows.len());
    }
    (rows, ranges)
}
