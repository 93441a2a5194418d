//! An adapter on a device: all its parameters in one flat buffer, and where each projection's lie.

use super::{Adapter, AdapterConfig, AdapterPair};
use crate::backend::{AdapterArgs, AdapterSlot, Backend, DropoutKey, GateKind};
use crate::batch::Sequence;
use crate::config::Config;
use crate::projection::{ByProjection, Projection};
use crate::{Error, Result};
use core::ops::Range;
use hydra_kernels::random::mix;

/// The places of an adapter's parameters in a flat buffer: layer by layer, projection by projection, `[A; R]` before `B`.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    layers: Vec<ByProjection<Option<AdapterSlot>>>,
    /// Number of parameters.
    pub len: usize,
}

impl Slots {
    pub fn new(config: &Config, adapter: &AdapterConfig) -> Self {
        let mut len = 0;
        let mut take = |values: usize| {
            len += values;
            len - values..len
        };
        let mut slot = |projection| {
            let shape = adapter.shape(config, projection);
            let a = take(shape.stacked_rows() * shape.d_in);
            let b = take(shape.d_out * shape.mixed_width());
            AdapterSlot { shape, gate: adapter.gate, routing: adapter.routing(), scale: adapter.scale(), a, b }
        };
        let layers = (0..config.layers)
            .map(|_| ByProjection::from_fn(|p| adapter.targets.contains(&p).then(|| slot(p))))
            .collect();
        Self { layers, len }
    }

    pub fn get(&self, layer: usize, projection: Projection) -> Option<&AdapterSlot> {
        self.layers[layer][projection].as_ref()
    }

    /// The learning rates of all parameters: `router` for the routers' rows, `lr` for A and B.
    pub fn rates(&self, lr: f32, router: f32) -> Vec<(Range<usize>, f32)> {
        if lr == router {
            return vec![(0..self.len, lr)];
        }
        let (mut ranges, mut start) = (Vec::new(), 0);
        for slot in self.layers.iter().flatten().flatten() {
            let rows = slot.a.start + slot.shape.a_rows() * slot.shape.d_in..slot.a.end;
            ranges.extend([(start..rows.start, lr), (rows.clone(), router)]);
            start = rows.end;
        }
        ranges.push((start..self.len, lr));
        ranges
    }
}

/// What makes a pass one of a training step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Training {
    /// Of the dropout masks.
    pub seed: u64,
    /// The pass's share of the step's tokens.
    pub share: f32,
}

/// An adapter whose parameters are on the device.
pub(crate) struct DeviceAdapter<B: Backend> {
    pub config: AdapterConfig,
    pub slots: Slots,
    pub params: B::Buffer,
}

impl<B: Backend> DeviceAdapter<B> {
    pub fn upload(backend: &B, config: &Config, adapter: &Adapter) -> Result<Self> {
        adapter.fits(config)?;
        let slots = Slots::new(config, &adapter.config);
        let params = backend.buffer(slots.len)?;
        let mut adapted = Self { config: adapter.config.clone(), slots, params };
        adapted.set(backend, config, adapter)?;
        Ok(adapted)
    }

    /// Takes the parameters of an adapter of the same configuration.
    pub fn set(&mut self, backend: &B, config: &Config, adapter: &Adapter) -> Result<()> {
        adapter.fits(config)?;
        let mut flat = vec![0.0; self.slots.len];
        for (layer, pairs) in adapter.layers.iter().enumerate() {
            for projection in Projection::ALL {
                if let (Some(slot), Some(pair)) = (self.slots.get(layer, projection), &pairs[projection]) {
                    flat[slot.a.clone()].copy_from_slice(&pair.a);
                    flat[slot.b.clone()].copy_from_slice(&pair.b);
                }
            }
        }
        backend.upload(&mut self.params, &flat)
    }

    /// Fails if a label names a head that the adapter does not have.
    pub fn check_lora_heads(&self, sequences: &[Sequence]) -> Result<()> {
        let AdapterConfig { gate, lora_heads, .. } = self.config;
        match sequences.iter().filter_map(|s| s.lora_head).find(|&head| head as usize >= lora_heads) {
            Some(head) if gate == GateKind::Label => {
                let message = format!("a sequence of lora head {head}: the adapter has {lora_heads} heads");
                Err(Error::WrongAdapter(message))
            }
            _ => Ok(()),
        }
    }

    /// What a flat buffer of this layout holds, as an adapter: the parameters, or their gradients.
    pub fn download(&self, backend: &B, flat: &B::Buffer) -> Result<Adapter> {
        let mut values = vec![0.0; self.slots.len];
        backend.download(&mut values, flat)?;
        let pair = |slot: &AdapterSlot| AdapterPair {
            d_in: slot.shape.d_in,
            d_out: slot.shape.d_out,
            a: values[slot.a.clone()].to_vec(),
            b: values[slot.b.clone()].to_vec(),
        };
        let pairs = |slots: &ByProjection<Option<_>>| ByProjection::from_fn(|p| slots[p].as_ref().map(pair));
        let layers = self.slots.layers.iter().map(pairs).collect();
        Ok(Adapter { config: self.config.clone(), layers })
    }

    /// The arguments of one projection's linear operation; with `training`, the options that concern it alone apply.
    pub fn args<'a>(
        &'a self,
        layer: usize,
        projection: Projection,
        labels: &'a [u32],
        training: Option<Training>,
    ) -> Option<AdapterArgs<'a, B>> {
        let slot = self.slots.get(layer, projection)?;
        let AdapterConfig { dropout, head_dropout, load_balance, .. } = self.config;
        let place = (layer * Projection::ALL.len() + projection as usize) as u64;
        let seed = training.map(|training| mix(training.seed ^ mix(place + 1)));
        let key = |p: f32, seed: Option<u64>| seed.filter(|_| p > 0.0).map(|seed| DropoutKey { p, seed });
        Some(AdapterArgs {
            slot,
            params: &self.params,
            labels,
            dropout: key(dropout, seed),
            head_dropout: key(head_dropout, seed.map(mix)),
            balance: training.map_or(0.0, |training| load_balance * training.share),
        })
    }
}
