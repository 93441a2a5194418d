//! The router's gates of a row, collected while a pass goes through the layers.

use super::TokenGates;
use crate::Result;
use crate::adapter::device::DeviceAdapter;
use crate::backend::Backend;
use crate::config::Config;
use crate::model::activations::Activations;
use crate::projection::Projection;

/// Collects the gates of one row.
pub(super) struct GateReader<'a, B: Backend> {
    adapter: &'a DeviceAdapter<B>,
    row: usize,
    gates: TokenGates,
}

impl<'a, B: Backend> GateReader<'a, B> {
    /// For a row whose adapter this is.
    pub fn new(adapter: &'a DeviceAdapter<B>, config: &Config, row: usize) -> Self {
        let adapted = |layer| Projection::ALL.into_iter().filter(move |&p| adapter.slots.get(layer, p).is_some());
        let slots: Vec<_> = (0..config.layers).flat_map(|layer| adapted(layer).map(move |p| (layer, p))).collect();
        let lora_heads = adapter.config.lora_heads;
        let gates = TokenGates { gates: Vec::with_capacity(slots.len() * lora_heads), slots, lora_heads };
        Self { adapter, row, gates }
    }

    /// Takes the gates of a layer that has been computed for all rows of a pass; `groups` are their numbers and
    /// adapters.
    pub fn read(
        readers: &mut [Option<Self>],
        backend: &B,
        acts: &Activations<B>,
        layer: usize,
        groups: &[(usize, Option<&DeviceAdapter<B>>)],
    ) -> Result<()> {
        for projection in Projection::ALL {
            let Some(state) = acts.layers[0].adapter_state[projection].as_ref() else { continue };
            let width = |adapter: Option<&DeviceAdapter<B>>| {
                adapter
                    .and_then(|adapter| adapter.slots.get(layer, projection))
                    .map_or(0, |slot| slot.shape.state_width())
            };
            let mut states = vec![0.0; groups.iter().map(|(rows, adapter)| rows * width(*adapter)).sum()];
            backend.download(&mut states, state)?;
            let (mut rest, mut first) = (states.as_slice(), 0);
            for &(rows, adapter) in groups {
                let (own, others) = rest.split_at(rows * width(adapter));
                readers
                    .iter_mut()
                    .flatten()
                    .filter(|reader| (first..first + rows).contains(&reader.row))
                    .for_each(|reader| reader.take(layer, projection, own, first));
                (rest, first) = (others, first + rows);
            }
        }
        Ok(())
    }

    /// Takes one projection's gates from the states of a group whose first row is `first`.
    fn take(&mut self, layer: usize, projection: Projection, states: &[f32], first: usize) {
        let Some(slot) = self.adapter.slots.get(layer, projection) else { return };
        let (width, at) = (slot.shape.state_width(), self.row - first);
        self.gates.gates.extend_from_slice(&states[at * width + slot.shape.a_rows()..(at + 1) * width]);
    }

    /// All gates.
    pub fn finish(self) -> TokenGates {
        self.gates
    }
}
