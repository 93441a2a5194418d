//! Scores: losses of whole sequences, and logits of a few tokens after a prompt that many sequences share.

use crate::adapter::Adapter;
use crate::adapter::device::DeviceAdapter;
use crate::backend::{Backend, Linear, LinearOutput};
use crate::batch::{self, Packed, Sequence};
use crate::model::activations::{Activations, Plan, Purpose};
use crate::model::{Cached, KvCache, Model, Pass};
use crate::projection::Projection;
use crate::{Error, Result};

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

/// Runs a model forward, with or without an adapter.
pub struct Evaluator<'m, 'w, B: Backend> {
    model: &'m Model<'w, B>,
    adapted: Option<DeviceAdapter<B>>,
    activations: Activations<B>,
    rope: B::Buffer,
    /// Positions the rope table has.
    positions: usize,
    prefix: Option<KvCache<B>>,
}

impl<'m, 'w, B: Backend> Evaluator<'m, 'w, B> {
    /// An evaluator that takes up to `max_tokens` tokens, at least one, in one pass; no sequence may be longer. The adapter is copied.
    /// Positions beyond [`crate::config::Config::context`] are computed as any other, but the model was not made for them.
    pub fn new(model: &'m Model<'w, B>, adapter: Option<&Adapter>, max_tokens: usize) -> Result<Self> {
        if max_tokens == 0 {
            return Err(Error::Invalid("evaluation with max_tokens 0".into()));
        }
        let (backend, config) = (&model.backend, &model.config);
        let adapted = adapter.map(|adapter| DeviceAdapter::upload(backend, config, adapter)).transpose()?;
        let adapter = adapter.map(|adapter| &adapter.config);
        let activations = Plan::new(config, adapter, max_tokens, Purpose::Forward)?.allocate(backend)?;
        let rope = model.rope_table(max_tokens)?;
        Ok(Self { model, adapted, activations, rope, positions: max_tokens, prefix: None })
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

    /// Computes `prompt` once: sequences given later continue it. An empty one takes the prefix away.
    pub fn set_prefix(&mut self, prompt: &[u32]) -> Result<()> {
        self.prefix = None;
        if prompt.is_empty() {
            return Ok(());
        }
        self.reserve_positions(prompt.len())?;
        let mut cache = KvCache::new(self.model, prompt.len())?;
        // A prompt longer than a pass goes in by parts, each continuing the ones before.
        for part in prompt.chunks(self.activations.tokens) {
            let packed = Packed::new([&Sequence::prompt(part)], cache.len, self.model.config.vocab)?;
            let pass = Pass::evaluating(self.model, self.adapted.as_ref(), &packed, &self.rope);
            pass.read(&mut self.activations, Cached::Append(&mut cache), &[])?;
        }
        self.prefix = Some(cache);
        Ok(())
    }

    /// Logits of the tokens `ids` at the last position of each sequence.
    pub fn last_logits(&mut self, sequences: &[Sequence], ids: &[u32]) -> Result<Vec<Vec<f32>>> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.model.config.vocab) {
            return Err(Error::Invalid(format!("token {id} in a vocabulary of {}", self.model.config.vocab)));
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
                adapter: None,
            })?;
            out.resize(rows.len() * vocab, 0.0);
            model.backend.download(&mut out, &logits)
        })?;
        Ok(out)
    }

    /// The mean gate of each adapted projection over all tokens of `sequences`.
    pub fn gate_means(&mut self, sequences: &[Sequence]) -> Result<Vec<GateMean>> {
        let Some(adapted) = &self.adapted else { return Ok(Vec::new()) };
        let (lora_heads, layers) = (adapted.config.lora_heads, self.model.config.layers);
        let targets = adapted.config.targets.clone();
        let mut means: Vec<GateMean> = (0..layers)
            .flat_map(|layer| targets.iter().map(move |&projection| (layer, projection)))
            .map(|(layer, projection)| GateMean { layer, projection, lora_heads: vec![0.0; lora_heads], entropy: 0.0 })
            .collect();
        let mut tokens = 0;
        self.packs(sequences, |pass, activations, cached, _| {
            tokens += pass.packed.len();
            pass.forward_by_layer(activations, cached, |activations, layer| {
                let adapted = pass.adapted.expect("checked above");
                for mean in means.iter_mut().filter(|mean| mean.layer == layer) {
                    let slot = adapted.slots.get(layer, mean.projection).expect("a target");
                    let shape = slot.shape;
                    let adapter_state =
                        activations.layers[0].adapter_state[mean.projection as usize].as_ref().expect("a target");
                    let mut rows = vec![0.0; pass.packed.len() * shape.state_width()];
                    pass.model.backend.download(&mut rows, adapter_state)?;
                    for row in rows.chunks_exact(shape.state_width()) {
                        let gate = &row[shape.a_rows()..];
                        mean.lora_heads.iter_mut().zip(gate).for_each(|(sum, &gate)| *sum += f64::from(gate));
                        let weights = gate.iter().map(|&gate| f64::from(gate)).filter(|&gate| gate > 0.0);
                        mean.entropy -= weights.map(|gate| gate * gate.ln()).sum::<f64>();
                    }
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
        mut run: impl FnMut(&Pass<'_, '_, B>, &mut Activations<B>, Cached<'_, B>, &[Sequence]) -> Result<()>,
    ) -> Result<()> {
        self.adapted.as_ref().map_or(Ok(()), |adapted| adapted.check_lora_heads(sequences))?;
        let lengths: Vec<usize> = sequences.iter().map(|s| s.tokens.len()).collect();
        let start = self.prefix.as_ref().map_or(0, |prefix| prefix.len);
        self.reserve_positions(start + lengths.iter().copied().max().unwrap_or(0))?;
        for group in batch::groups(&lengths, self.activations.tokens)? {
            let sequences = &sequences[group];
            let packed = Packed::new(sequences, start, self.model.config.vocab)?;
            let cached = self.prefix.as_ref().map_or(Cached::No, Cached::Read);
            let pass = Pass::evaluating(self.model, self.adapted.as_ref(), &packed, &self.rope);
            run(&pass, &mut self.activations, cached, sequences)?;
        }
        Ok(())
    }

    fn reserve_positions(&mut self, positions: usize) -> Result<()> {
        if positions > self.positions {
            self.rope = self.model.rope_table(positions)?;
            self.positions = positions;
        }
        Ok(())
    }
}
