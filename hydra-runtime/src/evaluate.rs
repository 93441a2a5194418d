//! Scores: losses of whole sequences, and logits of a few tokens after a prompt that many sequences share.

use crate::adapter::device::DeviceAdapter;
use crate::adapter::{Adapter, AdapterConfig, GateKind};
use crate::backend::{Backend, Device, Linear, LinearOutput, Workload};
use crate::batch::{self, Packed, Sequence};
use crate::config::Config;
use crate::model::activations::{Activations, Plan, Purpose};
use crate::model::{AttachedAdapter, Cached, KvCache, Model, Pass};
pub use crate::progress::Progress;
use crate::progress::Watch;
use crate::projection::Projection;
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A sequence's negative log-likelihood.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SequenceLoss {
    /// Summed over its targets, in nats; 0 without any.
    pub nll: f64,
    /// Number of targets.
    pub targets: usize,
}

/// Mean gate of one adapted projection over some sequences' tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct GateMean {
    /// The layer.
    pub layer: usize,
    /// The projection.
    pub projection: Projection,
    /// Mean weight of each head; they add up to 1.
    pub lora_heads: Vec<f64>,
    /// Mean over tokens of the entropy of a token's weights, in nats: 0 where each token has one head, ln N where all alike.
    pub entropy: f64,
}

/// Runs a model forward, with or without an adapter. It owns all that it needs: it may move to another thread, or into any struct.
pub struct Evaluator<B: Backend = Device> {
    model: Model<B>,
    adapter: Option<Arc<DeviceAdapter<B>>>,
    activations: Activations<B>,
    rope: B::Buffer,
    /// Positions that the rope table has.
    positions: usize,
    prefix: Option<KvCache<B>>,
    watch: Watch,
}

impl<B: Backend> Evaluator<B> {
    /// Bytes that an evaluator takes beside the weights, a copy of the adapter among them; `u64::MAX` at most.
    pub fn plan_bytes(backend: &B, config: &Config, adapter: Option<&AdapterConfig>, max_tokens: usize) -> Result<u64> {
        let adapters = &adapter.map_or(Vec::new(), |adapter| adapter.shapes(config));
        let workspace = backend.workspace_bytes(&[Workload { config, tokens: max_tokens, adapters, training: false }]);
        Ok(workspace.saturating_add(Self::own_bytes(backend, config, adapter, max_tokens)?))
    }

    /// Without what the backend keeps for itself.
    pub(crate) fn own_bytes(
        backend: &B,
        config: &Config,
        adapter: Option<&AdapterConfig>,
        max_tokens: usize,
    ) -> Result<u64> {
        let activations = Plan::new(config, adapter, max_tokens, Purpose::Forward)?.bytes(backend);
        let rope = 4 * max_tokens.saturating_mul(config.head_dim) as u64;
        let parameters = adapter.map_or(0, |adapter| adapter.parameters(config).saturating_mul(4));
        Ok([rope, parameters].into_iter().fold(activations, u64::saturating_add))
    }

    /// An evaluator that takes up to `max_tokens` tokens, at least one, in one pass; no sequence may be longer. The adapter is copied
    /// to the device. Positions beyond [`crate::config::Config::context`] are computed as any other, but the model was not trained
    /// for them.
    pub fn new(model: &Model<B>, adapter: Option<&Adapter>, max_tokens: usize) -> Result<Self> {
        let attached = adapter.map(|adapter| model.attach(adapter)).transpose()?;
        Self::attached(model, attached.as_ref(), max_tokens)
    }

    /// The same with an adapter that is on the device already, or with none.
    pub fn attached(model: &Model<B>, adapter: Option<&AttachedAdapter<B>>, max_tokens: usize) -> Result<Self> {
        if max_tokens == 0 {
            return Err(Error::Invalid("evaluation with max_tokens 0".into()));
        }
        let adapter = adapter.map(|adapter| adapter.parameters(model)).transpose()?;
        let settings = adapter.as_ref().map(|adapter| &adapter.config);
        let activations =
            Plan::new(model.config(), settings, max_tokens, Purpose::Forward)?.allocate(model.backend())?;
        let rope = model.0.rope_table(max_tokens)?;
        let (model, watch) = (model.clone(), Watch::default());
        Ok(Self { model, adapter, activations, rope, positions: max_tokens, prefix: None, watch })
    }

    /// Ends a call with [`Error::Cancelled`] soon after `flag` is set.
    pub fn with_cancel(mut self, flag: Arc<AtomicBool>) -> Self {
        self.watch.cancel = Some(flag);
        self
    }

    /// Calls `report` after each pass over the model.
    pub fn with_progress(mut self, report: impl FnMut(Progress) + Send + Sync + 'static) -> Self {
        self.watch.progress = Some(Box::new(report));
        self
    }

    /// Losses of `sequences`, in order; each continues the prefix, if there is one.
    pub fn losses(&mut self, sequences: &[Sequence]) -> Result<Vec<SequenceLoss>> {
        let mut losses = Vec::with_capacity(sequences.len());
        let mut nll = Vec::new();
        self.packs(sequences, |pass, activations, cached, sequences| {
            nll.resize(pass.packed.targets.len(), 0.0);
            pass.read(activations, cached, &pass.packed.target_rows)?;
            pass.loss(activations, &mut nll)?;
            let mut rest = nll.as_slice();
            for sequence in sequences {
                let targets = sequence.targets.iter().filter(|&&id| id != batch::NO_TARGET).count();
                let (own, others) = rest.split_at(targets);
                losses.push(SequenceLoss { nll: own.iter().fold(0.0, |sum, &x| sum + f64::from(x)), targets });
                rest = others;
            }
            Ok(())
        })?;
        Ok(losses)
    }

    /// Computes `prompt` once: sequences given later continue it. An empty prompt takes the prefix away; after an error the earlier
    /// prefix is there still. A prefix is no head's: under the gate "label", sequences with a [`Sequence::lora_head`] can't continue one.
    pub fn set_prefix(&mut self, prompt: &[u32]) -> Result<()> {
        if prompt.is_empty() {
            self.prefix = None;
            return Ok(());
        }
        self.reserve_positions(prompt.len())?;
        let mut cache = KvCache::new(&self.model.0, prompt.len())?;
        let _bound = self.model.backend().bind_caller();
        // A prompt longer than a pass goes in by parts, each continuing the ones before.
        for part in prompt.chunks(self.activations.tokens) {
            let packed = Packed::new([&Sequence::prompt(part)], cache.len, self.model.config().vocab)?;
            let pass = pass(&self.model, &self.adapter, &packed, &self.rope, &self.watch);
            pass.read(&mut self.activations, Cached::Append(&mut cache), &[])?;
            self.watch.report(cache.len, prompt.len())?;
        }
        self.prefix = Some(cache);
        Ok(())
    }

    /// Logits of the tokens `ids` at the last position of each sequence.
    pub fn last_logits(&mut self, sequences: &[Sequence], ids: &[u32]) -> Result<Vec<Vec<f32>>> {
        let vocab = self.model.config().vocab;
        if let Some(&token) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::TokenOutOfRange { token, vocab });
        }
        if ids.is_empty() {
            return Ok(vec![Vec::new(); sequences.len()]);
        }
        let mut logits = Vec::with_capacity(sequences.len());
        self.packs(sequences, |pass, activations, cached, _| {
            let rows: Vec<u32> = pass.packed.segments.iter().map(|s| (s.start + s.len - 1) as u32).collect();
            pass.read(activations, cached, &rows)?;
            let mut out = vec![0.0; rows.len() * ids.len()];
            let model = pass.model;
            model.backend.head_rows(&mut out, &activations.read.normed, rows.len(), &model.lm_head, ids)?;
            logits.extend(out.chunks(ids.len()).map(<[f32]>::to_vec));
            Ok(())
        })?;
        Ok(logits)
    }

    /// Logits of the whole vocabulary at every position of one sequence, [tokens, vocab]: large, for comparisons.
    pub fn logits(&mut self, sequence: &Sequence) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        self.packs(std::slice::from_ref(sequence), |pass, activations, cached, _| {
            let rows: Vec<u32> = (0..pass.packed.len() as u32).collect();
            pass.read(activations, cached, &rows)?;
            let (model, vocab) = (pass.model, pass.model.config.vocab);
            let mut logits = model.backend.buffer(rows.len() * vocab)?;
            model.backend.linear(Linear {
                output: LinearOutput::Buffer { y: &mut logits, residual: None },
                tokens: rows.len(),
                x: &activations.read.normed,
                weight: &model.lm_head,
                bias: None,
                adapter: None,
            })?;
            out.resize(rows.len() * vocab, 0.0);
            model.backend.download(&mut out, &logits)
        })?;
        Ok(out)
    }

    /// The mean gate of each adapted projection over all tokens of `sequences`.
    pub fn gate_means(&mut self, sequences: &[Sequence]) -> Result<Vec<GateMean>> {
        let Some(adapter) = &self.adapter else { return Ok(Vec::new()) };
        let (lora_heads, layers) = (adapter.config.lora_heads, self.model.config().layers);
        let targets = adapter.config.targets.clone();
        let mut means: Vec<GateMean> = (0..layers)
            .flat_map(|layer| targets.iter().map(move |&projection| (layer, projection)))
            .map(|(layer, projection)| GateMean { layer, projection, lora_heads: vec![0.0; lora_heads], entropy: 0.0 })
            .collect();
        let mut tokens = 0;
        self.packs(sequences, |pass, activations, cached, _| {
            tokens += pass.packed.len();
            pass.forward_by_layer(activations, cached, |activations, layer| {
                for mean in means.iter_mut().filter(|mean| mean.layer == layer) {
                    add_gates(mean, pass, activations)?;
                }
                Ok(())
            })
        })?;
        for mean in &mut means {
            mean.lora_heads.iter_mut().chain([&mut mean.entropy]).for_each(|sum| *sum /= tokens.max(1) as f64);
        }
        Ok(means)
    }

    /// Hands each group of sequences that fits one pass to `run`.
    fn packs(
        &mut self,
        sequences: &[Sequence],
        mut run: impl FnMut(&Pass<'_, B>, &mut Activations<B>, Cached<'_, B>, &[Sequence]) -> Result<()>,
    ) -> Result<()> {
        self.adapter.as_ref().map_or(Ok(()), |adapter| adapter.check_lora_heads(sequences))?;
        let by_label = self.adapter.as_ref().is_some_and(|adapter| adapter.config.gate == GateKind::Label);
        if by_label && self.prefix.is_some() && sequences.iter().any(|sequence| sequence.lora_head.is_some()) {
            return Err(Error::Invalid("a sequence with a lora_head can't continue a prefix: expected none".into()));
        }
        let lengths: Vec<usize> = sequences.iter().map(|s| s.tokens.len()).collect();
        let start = self.prefix.as_ref().map_or(0, |prefix| prefix.len);
        self.reserve_positions(start + lengths.iter().copied().max().unwrap_or(0))?;
        let (mut done, total) = (0, lengths.iter().sum());
        let _bound = self.model.backend().bind_caller();
        for group in batch::groups(&lengths, self.activations.tokens)? {
            let sequences = &sequences[group];
            let packed = Packed::new(sequences, start, self.model.config().vocab)?;
            let cached = self.prefix.as_ref().map_or(Cached::No, Cached::Read);
            let pass = pass(&self.model, &self.adapter, &packed, &self.rope, &self.watch);
            run(&pass, &mut self.activations, cached, sequences)?;
            done += packed.len();
            self.watch.report(done, total)?;
        }
        Ok(())
    }

    fn reserve_positions(&mut self, positions: usize) -> Result<()> {
        if positions > self.positions {
            self.rope = self.model.0.rope_table(positions)?;
            self.positions = positions;
        }
        Ok(())
    }
}

/// A pass of an evaluation.
fn pass<'a, B: Backend>(
    model: &'a Model<B>,
    adapter: &'a Option<Arc<DeviceAdapter<B>>>,
    packed: &'a Packed,
    rope: &'a B::Buffer,
    watch: &'a Watch,
) -> Pass<'a, B> {
    let (model, adapter, cancel) = (&*model.0, adapter.as_deref(), watch.cancel.as_deref());
    Pass { model, adapter, packed, rope, training: None, cancel, batch: None }
}

/// Adds the gates of a pass's tokens to `mean`, whose layer has just been computed.
fn add_gates<B: Backend>(mean: &mut GateMean, pass: &Pass<'_, B>, activations: &Activations<B>) -> Result<()> {
    let adapter = pass.adapter.expect("gates are those of an adapter");
    let slot = adapter.slots.get(mean.layer, mean.projection).expect("means are of adapted projections");
    let state = activations.layers[0].adapter_state[mean.projection].as_ref();
    let (state, shape) = (state.expect("means are of adapted projections"), slot.shape);
    let mut rows = vec![0.0; pass.packed.len() * shape.state_width()];
    pass.model.backend.download(&mut rows, state)?;
    for row in rows.chunks_exact(shape.state_width()) {
        let gate = &row[shape.a_rows()..];
        mean.lora_heads.iter_mut().zip(gate).for_each(|(sum, &gate)| *sum += f64::from(gate));
        let weights = gate.iter().map(|&gate| f64::from(gate)).filter(|&gate| gate > 0.0);
        mean.entropy -= weights.map(|gate| gate * gate.ln()).sum::<f64>();
    }
    Ok(())
}
