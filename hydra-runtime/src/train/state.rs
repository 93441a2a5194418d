//! What a run needs, beside its options, to go on bit for bit: parameters, the optimiser's moments, the number of steps.

use super::Trainer;
use crate::backend::Backend;
use crate::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::path::Path;

/// The file in a run's directory.
pub const STATE_FILE: &str = "trainer_state.safetensors";

/// The names of its tensors, in [`Snapshot`]'s order.
const PARTS: [&str; 3] = ["params", "exp_avg", "exp_avg_sq"];

/// Where a trainer is: what its steps change.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Parameters, and the means of their gradients and of those's squares.
    parts: [Vec<f32>; 3],
    steps: u64,
}

impl<B: Backend> Trainer<'_, '_, B> {
    /// Copies where the trainer is.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let copy = |buffer: &B::Buffer| -> Result<Vec<f32>> {
            let mut part = vec![0f32; self.adapted.slots.len];
            self.model.backend.download(&mut part, buffer)?;
            Ok(part)
        };
        let parts = [copy(&self.adapted.params)?, copy(&self.exp_avg)?, copy(&self.exp_avg_sq)?];
        Ok(Snapshot { parts, steps: self.steps })
    }

    /// Goes back to where a snapshot of this trainer was taken.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let (backend, [params, exp_avg, exp_avg_sq]) = (&self.model.backend, &snapshot.parts);
        backend.upload(&mut self.adapted.params, params)?;
        backend.upload(&mut self.exp_avg, exp_avg)?;
        backend.upload(&mut self.exp_avg_sq, exp_avg_sq)?;
        self.steps = snapshot.steps;
        Ok(())
    }

    /// Writes [`STATE_FILE`] into `dir`, atomically.
    pub fn save_state(&self, dir: &Path) -> Result<()> {
        let snapshot = self.snapshot()?;
        let path = dir.join(STATE_FILE);
        let invalid = |e| Error::Invalid(format!("{}: {e}", path.display()));
        let mut views = Vec::new();
        for (name, part) in PARTS.into_iter().zip(&snapshot.parts) {
            let view = TensorView::new(Dtype::F32, vec![part.len()], bytemuck::cast_slice(part)).map_err(invalid)?;
            views.push((name, view));
        }
        let metadata = HashMap::from([("steps".to_string(), self.steps.to_string())]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(invalid)?;
        crate::atomic::write_atomically(&path, &bytes)
    }

    /// Takes up what [`Trainer::save_state`] wrote: the run then continues as if it had not been interrupted.
    pub fn load_state(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let invalid = |message: String| Error::Invalid(format!("{}: {message}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(format!("not safetensors: {e}")))?;
        let steps = header.metadata().as_ref().and_then(|m| m.get("steps")).and_then(|s| s.parse().ok());
        let steps = steps.ok_or_else(|| invalid("no number of steps in its metadata".into()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| invalid(e.to_string()))?;
        let want = self.adapted.slots.len;
        let mut parts: [Vec<f32>; 3] = Default::default();
        for (part, name) in parts.iter_mut().zip(PARTS) {
            let tensor = file.tensor(name).map_err(|e| invalid(e.to_string()))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [want] {
                let (dtype, shape) = (tensor.dtype(), tensor.shape());
                return Err(invalid(format!(
                    "{name} is {dtype:?} {shape:?}, wanted F32 [{want}]: another adapter's state"
                )));
            }
            *part = bytemuck::pod_collect_to_vec(tensor.data());
            if !part.iter().all(|x| x.is_finite()) {
                return Err(invalid(format!("{name} holds values that are not finite")));
            }
        }
        self.restore(&Snapshot { parts, steps })
    }
}
