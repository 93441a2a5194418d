//! What a run needs, beside its options, to go on bit for bit: parameters, the optimiser's moments, the number of steps.

use super::Trainer;
use crate::backend::Backend;
use crate::error::{not_written, printable};
use crate::{Error, Result, atomic};
use safetensors::tensor::{Dtype, SafeTensors, View};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

/// The file in a run's directory.
pub const STATE_FILE: &str = "trainer_state.safetensors";

/// The most steps that can have been taken: numbers that are exact as f64.
const MOST_STEPS: u64 = 1 << 53;

/// The names of its tensors: the parameters, and the means of their gradients and of those's squares.
const PARTS: [&str; 3] = ["params", "exp_avg", "exp_avg_sq"];

/// One of the file's tensors, copied from the device when it is written.
struct Part<'a, B: Backend> {
    backend: &'a B,
    buffer: &'a B::Buffer,
    shape: [usize; 1],
    /// What went wrong meanwhile.
    failed: &'a RefCell<Option<Error>>,
}

impl<B: Backend> View for &Part<'_, B> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut values = vec![0f32; self.shape[0]];
        if let Err(error) = self.backend.download(&mut values, self.buffer) {
            self.failed.replace(Some(error));
        }
        Cow::Owned(bytemuck::pod_collect_to_vec(&values))
    }

    fn data_len(&self) -> usize {
        self.shape[0] * size_of::<f32>()
    }
}

impl<B: Backend> Trainer<B> {
    /// Writes [`STATE_FILE`] into `dir`, atomically.
    pub fn save_state(&self, dir: impl AsRef<Path>) -> Result<()> {
        let path = dir.as_ref().join(STATE_FILE);
        let failed = RefCell::new(None);
        let buffers = [&self.adapter.params, &self.exp_avg, &self.exp_avg_sq];
        let (backend, len) = (self.model.backend(), self.adapter.slots.len);
        let parts = buffers.map(|buffer| Part { backend, buffer, shape: [len], failed: &failed });
        let metadata = [("steps", self.steps.to_string()), ("adapter", self.adapter.config.function())];
        let metadata = HashMap::from(metadata.map(|(key, value)| (key.to_string(), value)));
        atomic::fill_atomically(&path, |temporary| {
            let written = safetensors::serialize_to_file(PARTS.into_iter().zip(&parts), Some(metadata), temporary);
            match failed.take() {
                Some(error) => Err(error),
                None => written.map_err(|error| not_written(&path, error)),
            }
        })
    }

    /// Takes up what [`Trainer::save_state`] wrote: the run then continues as if it had not been interrupted. A file that isn't one,
    /// or is another adapter's, is an error, and the trainer goes on as it was.
    pub fn load_state(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        let path = dir.as_ref().join(STATE_FILE);
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let invalid = |message: String| Error::Format { path: path.clone(), offset: None, message };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(format!("not safetensors: {e}")))?;
        let metadata = |key| header.metadata().as_ref().and_then(|metadata| metadata.get(key));
        let steps = metadata("steps").and_then(|steps| steps.parse().ok()).filter(|steps| *steps <= MOST_STEPS);
        let steps = steps.ok_or_else(|| invalid("no number of steps in its metadata".into()))?;
        let own = self.adapter.config.function();
        // Earlier versions wrote none.
        if let Some(other) = metadata("adapter").filter(|other| **other != own) {
            let other = printable(other);
            return Err(invalid(format!("of an adapter with {other}, wanted {own}: another adapter's state")));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|e| invalid(e.to_string()))?;
        let want = self.adapter.slots.len;
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
        let (backend, [params, exp_avg, exp_avg_sq]) = (self.model.backend(), &parts);
        backend.upload(&mut self.adapter.params, params)?;
        backend.upload(&mut self.exp_avg, exp_avg)?;
        backend.upload(&mut self.exp_avg_sq, exp_avg_sq)?;
        (self.steps, self.can_undo) = (steps, false);
        Ok(())
    }
}
