//! What a run needs, besides its options, to resume bit for bit: parameters, the optimizer's moments, the number of
//! steps.

use super::Trainer;
use super::sum::broadcast;
use crate::backend::Backend;
use crate::error::{not_safetensors, printable};
use crate::files::map;
use crate::{Error, Result, atomic};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Serialize;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// The file in a run's directory.
pub const STATE_FILE: &str = "trainer_state.safetensors";

/// The most steps that can have been taken: numbers that are exact as f64.
const MOST_STEPS: u64 = 1 << 53;

/// The names of its tensors: the parameters, and the means of their gradients and of those's squares.
const PARTS: [&str; 3] = ["params", "exp_avg", "exp_avg_sq"];

/// The file's header. (The crate safetensors writes its metadata in a hash map's order, which differs each time.)
#[derive(Serialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: Metadata,
    params: TensorInfo,
    exp_avg: TensorInfo,
    exp_avg_sq: TensorInfo,
}

#[derive(Serialize)]
struct Metadata {
    adapter: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<String>,
    steps: String,
}

#[derive(Serialize)]
struct TensorInfo {
    dtype: &'static str,
    shape: [usize; 1],
    data_offsets: [usize; 2],
}

impl Header {
    /// Of parts of `len` values each, in the order of [`PARTS`].
    fn new(adapter: String, run: Option<String>, steps: u64, len: usize) -> Self {
        let bytes = len * size_of::<f32>();
        let part = |i: usize| TensorInfo { dtype: "F32", shape: [len], data_offsets: [i * bytes, (i + 1) * bytes] };
        let metadata = Metadata { adapter, run, steps: steps.to_string() };
        Self { metadata, params: part(0), exp_avg: part(1), exp_avg_sq: part(2) }
    }

    /// As it stands in the file: its length, and JSON padded with spaces to whole words.
    fn bytes(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec(self).expect("a header has only texts and numbers");
        json.resize(json.len().next_multiple_of(size_of::<u64>()), b' ');
        [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
    }
}

/// What [`Trainer::with_run`] was given, in the state that is in `dir`; `None` if it wasn't, or there is no state.
pub fn saved_run(dir: impl AsRef<Path>) -> Result<Option<String>> {
    let path = dir.as_ref().join(STATE_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let (_, header) = SafeTensors::read_metadata(&map(&path)?).map_err(|e| Error::Format {
        path,
        offset: None,
        message: not_safetensors(&e),
    })?;
    Ok(header.metadata().as_ref().and_then(|metadata| metadata.get("run").cloned()))
}

impl<B: Backend> Trainer<B> {
    /// Writes [`STATE_FILE`] into `dir`, atomically. The same state has the same bytes.
    pub fn save_state(&self, dir: impl AsRef<Path>) -> Result<()> {
        let path = dir.as_ref().join(STATE_FILE);
        let buffers = [&self.adapter.params, &self.exp_avg, &self.exp_avg_sq];
        let (backend, len) = (self.model.backend(), self.adapter.slots.len);
        let header = Header::new(self.adapter.config.function(), self.run.clone(), self.steps, len);
        atomic::fill_atomically(&path, |temporary| {
            let at = |source| Error::Io { path: path.clone(), source };
            let mut file = File::create(temporary).map_err(at)?;
            file.write_all(&header.bytes()).map_err(at)?;
            let mut values = vec![0f32; len];
            for buffer in buffers {
                backend.download(&mut values, buffer)?;
                file.write_all(bytemuck::cast_slice(&values)).map_err(at)?;
            }
            Ok(())
        })
    }

    /// Takes up what [`Trainer::save_state`] wrote: the run then continues as if it had not been interrupted. A file
    /// that isn't one, or is another adapter's, is an error, and the trainer goes on as it was.
    pub fn load_state(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        let path = dir.as_ref().join(STATE_FILE);
        let bytes = map(&path)?;
        let invalid = |message: String| Error::Format { path: path.clone(), offset: None, message };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(not_safetensors(&e)))?;
        let metadata = |key| header.metadata().as_ref().and_then(|metadata| metadata.get(key));
        let steps = metadata("steps").and_then(|steps| steps.parse().ok()).filter(|steps| *steps <= MOST_STEPS);
        let steps = steps.ok_or_else(|| invalid("no number of steps in its metadata".into()))?;
        let own = self.adapter.config.function();
        // Earlier versions wrote none.
        if let Some(other) = metadata("adapter").filter(|other| **other != own) {
            let other = printable(other);
            return Err(invalid(format!("the state of another adapter: expected {own}, found {other}")));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|e| invalid(not_safetensors(&e)))?;
        let want = self.adapter.slots.len;
        let mut parts = Vec::new();
        for name in PARTS {
            let tensor = file.tensor(name).map_err(|e| invalid(e.to_string()))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [want] {
                let (dtype, shape) = (tensor.dtype(), tensor.shape());
                let found = format!("{dtype:?} {shape:?}");
                return Err(invalid(format!(
                    "the state of another adapter: {name}: expected F32 [{want}], found {found}"
                )));
            }
            let values = tensor.data().chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]));
            if !values.clone().all(f32::is_finite) {
                return Err(invalid(format!("{name} holds values that are not finite")));
            }
            parts.push(values);
        }
        // All of it is sound. One part is in memory at a time.
        let buffers = [&mut self.adapter.params, &mut self.exp_avg, &mut self.exp_avg_sq];
        for (values, buffer) in parts.into_iter().zip(buffers) {
            self.model.backend().upload(buffer, &values.collect::<Vec<f32>>())?;
        }
        (self.steps, self.can_undo) = (steps, false);
        Ok(())
    }

    /// Gives every rank the state of rank 0: parameters, moments and the number of steps. After
    /// [`Trainer::load_state`], which rank 0 alone then has to call.
    pub fn share_state(&mut self) -> Result<()> {
        if self.ranks.size() == 1 {
            return Ok(());
        }
        let mut steps = self.steps.to_le_bytes();
        self.ranks.broadcast(&mut steps)?;
        let (backend, len) = (self.model.backend(), self.adapter.slots.len);
        for buffer in [&mut self.adapter.params, &mut self.exp_avg, &mut self.exp_avg_sq] {
            broadcast(&*self.ranks, backend, &mut self.message, (buffer, len))?;
        }
        (self.steps, self.can_undo) = (u64::from_le_bytes(steps), false);
        Ok(())
    }
}
