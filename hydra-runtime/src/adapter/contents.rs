//! What an adapter's files hold, as they have it: without a model, and without judging it.

use super::Adapter;
use super::file::CONFIG;
use crate::checkpoint::gguf::container::{Container, MAGIC, Value};
use crate::config::json::FILE as MODEL_CONFIG;
use crate::error::not_safetensors;
use crate::files::map;
use crate::json::{Object, narrowed, shortest};
use crate::{Error, Result};
use safetensors::SafeTensors;
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTensor {
    /// Its name.
    pub name: String,
    /// The type of its values: "F32", "BF16".
    pub format: String,
    /// Its shape, the slowest dimension first.
    pub shape: Vec<usize>,
}

/// Settings and tensors of an adapter's folder, or of a LoRA in a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// The entries of `adapter_config.json` or of the GGUF file, values as JSON.
    pub settings: Vec<(String, serde_json::Value)>,
    /// The tensors, by name.
    pub tensors: Vec<StoredTensor>,
    /// The size of the file with the tensors.
    pub bytes: u64,
}

impl Contents {
    /// What is there, if it is an adapter: a folder with its configuration and without a model's, or a GGUF file that says so.
    /// Nothing is said against what else is there.
    pub fn read(path: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = path.as_ref();
        if path.join(CONFIG).is_file() && !path.join(MODEL_CONFIG).is_file() {
            Self::of_folder(path).map(Some)
        } else if is_gguf(path) {
            Self::of_gguf(path)
        } else {
            Ok(None)
        }
    }

    fn of_folder(dir: &Path) -> Result<Self> {
        let [config, path] = Adapter::files(dir)?;
        let mut settings: Vec<_> = Object::read(&config)?.map.into_iter().collect();
        settings.sort_by(|a, b| a.0.cmp(&b.0));
        let bytes = map(&path)?;
        let file = SafeTensors::deserialize(&bytes);
        let file = file.map_err(|error| Error::Format { path, offset: None, message: not_safetensors(&error) })?;
        let stored = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| StoredTensor {
            name: name.into(),
            format: view.dtype().to_string(),
            shape: view.shape().to_vec(),
        };
        let mut tensors: Vec<_> = file.iter().map(stored).collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { settings, tensors, bytes: bytes.len() as u64 })
    }

    fn of_gguf(path: &Path) -> Result<Option<Self>> {
        let bytes = map(path)?;
        let file = Container::parse(path, &bytes)?;
        if file.string("general.type")? != Some("adapter") {
            return Ok(None);
        }
        let value = |key| match &file.metadata[key] {
            Value::Unsigned(x) => json!(x),
            Value::Signed(x) => json!(x),
            &Value::Float(x) => narrowed(x).map_or_else(|| json!(x), shortest),
            Value::Bool(x) => json!(x),
            Value::String(x) => json!(x),
            Value::Strings(x) => json!(x),
            Value::Integers(x) => json!(x),
            Value::Floats(x) => x.iter().map(|&x| shortest(x)).collect(),
            Value::Other => json!("…"),
        };
        let mut settings: Vec<_> = file.metadata.keys().map(|&key| (key.to_string(), value(key))).collect();
        settings.sort_by(|a, b| a.0.cmp(&b.0));
        let tensors = file.tensors.iter().map(|(name, tensor)| StoredTensor {
            name: name.to_string(),
            format: tensor.format.name().into(),
            shape: tensor.dims.iter().rev().copied().collect(),
        });
        Ok(Some(Self { settings, tensors: tensors.collect(), bytes: bytes.len() as u64 }))
    }
}

fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; MAGIC.len()];
    path.is_file() && File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == MAGIC
}
