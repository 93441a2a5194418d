//! A merged model as a Hugging Face folder.

use super::{MergeGate, Merged, Merging};
use crate::adapter::Adapter;
use crate::checkpoint::gguf::quantize::{encode_row, is_finite};
use crate::checkpoint::safetensors::{INDEX, ONE_FILE};
use crate::checkpoint::{Checkpoint, TensorId};
use crate::config::json::FILE as CONFIG;
use crate::error::not_written;
use crate::{Error, Result};
use hydra_kernels::quant::Format;
use safetensors::tensor::{Dtype, View};
use serde_json::json;
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// How the merged model is written.
#[derive(Clone, Copy, Debug)]
pub struct MergeOptions {
    /// The type of all tensors, a plain one. `None`: each tensor's own, in a model of plain types; else f16 where no matrix
    /// is of another type than f32 and f16, and bf16 otherwise.
    pub format: Option<Format>,
    /// The most bytes of tensors in one file; a larger tensor has its own file.
    pub max_shard_bytes: u64,
}

/// Files of a Hugging Face folder that go with its weights and its `config.json`, as far as they are there.
pub const COMPANIONS: [&str; 13] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
];

/// Writes the model with the adapter merged into it to `folder`, which exists and is empty: `config.json`, the tokenizer's
/// files, and `model.safetensors` or its shards, one after the other. Of an adapter with a router it writes the approximation
/// that `gate` says.
///
/// # Errors
/// If `gate` doesn't fit the adapter, the adapter doesn't fit the model, the folder isn't empty, or a value isn't finite, in the
/// adapter or in the type that is written; the message names the tensor.
pub fn write(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    gate: MergeGate,
    folder: &Path,
    options: MergeOptions,
) -> Result<Merged> {
    let config = checkpoint.config();
    let merging = Merging::new(checkpoint, adapter, gate)?;
    let mut there = std::fs::read_dir(folder).map_err(|source| Error::Io { path: folder.into(), source })?;
    if there.next().is_some() {
        return Err(Error::Invalid(format!("{}: not empty: expected an empty folder", folder.display())));
    }
    let format = match options.format {
        None if checkpoint.files().is_some() => None,
        None => Some(common_format(checkpoint)),
        asked => asked,
    };
    let overflowed = Cell::new(None);
    let tensors: Vec<Tensor> = TensorId::all(config)
        .map(|id| {
            let format = format.unwrap_or_else(|| checkpoint.format(id));
            dtype(format)?;
            let (rows, cols) = id.dims(config);
            let shape = rows.into_iter().chain([cols]).collect();
            Ok(Tensor { merging, id, shape, format, overflowed: &overflowed })
        })
        .collect::<Result<_>>()?;
    describe(checkpoint, folder, format)?;
    let bytes = tensors.iter().map(|tensor| tensor.bytes() as u64).sum();
    let formats = super::formats(tensors.iter().map(|tensor| (tensor.format, tensor.bytes() as u64)));
    let shards = write_shards(folder, shards(tensors, options.max_shard_bytes), bytes, &overflowed)?;
    Ok(Merged { formats, shards, bytes })
}

/// The type of a GGUF's tensors as they are written.
fn common_format(checkpoint: &Checkpoint) -> Format {
    let matrices = || TensorId::all(checkpoint.config()).filter(|id| id.dims(checkpoint.config()).0.is_some());
    let only = |formats: &[Format]| matrices().all(|id| formats.contains(&checkpoint.format(id)));
    match () {
        () if only(&[Format::F32]) => Format::F32,
        () if only(&[Format::F32, Format::F16]) => Format::F16,
        () => Format::Bf16,
    }
}

fn dtype(format: Format) -> Result<Dtype> {
    match format {
        Format::F32 => Ok(Dtype::F32),
        Format::F16 => Ok(Dtype::F16),
        Format::Bf16 => Ok(Dtype::BF16),
        other => Err(Error::Invalid(format!("merged tensors: expected F32, F16 or BF16, found {}", other.name()))),
    }
}

/// Writes `config.json` and the companions. `format` is the type of all tensors; `None` if each keeps its own.
fn describe(checkpoint: &Checkpoint, folder: &Path, format: Option<Format>) -> Result<()> {
    let torch = |format| match format {
        Format::F32 => "float32",
        Format::F16 => "float16",
        _ => "bfloat16",
    };
    let path = folder.join(CONFIG);
    let config = if let Some(files) = checkpoint.files() {
        for name in COMPANIONS.into_iter().filter(|name| files.has(name)) {
            let to = folder.join(name);
            std::fs::write(&to, files.read(name)?).map_err(|source| Error::Io { path: to, source })?;
        }
        let mut map = files.object(CONFIG)?.map;
        if let Some(format) = format {
            map.remove("dtype");
            map.insert("torch_dtype".into(), torch(format).into());
        }
        // What the tensors say, where config.json said something else.
        const TIED: &str = "tie_word_embeddings";
        let tied = checkpoint.config().tied;
        if map.get(TIED).and_then(serde_json::Value::as_bool).unwrap_or(false) != tied {
            map.insert(TIED.into(), tied.into());
        }
        map.into()
    } else {
        checkpoint.tokenizer()?.save(folder, checkpoint.config())?;
        let config = checkpoint.config().to_json(torch(format.unwrap_or(Format::Bf16)));
        config.map_err(|message| Error::Config { path: checkpoint.path().into(), message })?
    };
    std::fs::write(&path, format!("{config:#}\n")).map_err(|source| Error::Io { path, source })
}

/// Cuts a model's tensors, in order, into files of at most `most` bytes.
fn shards(tensors: Vec<Tensor<'_>>, most: u64) -> Vec<Vec<Tensor<'_>>> {
    let (mut shards, mut room) = (Vec::<Vec<_>>::new(), 0);
    for tensor in tensors {
        let bytes = tensor.bytes() as u64;
        match shards.last_mut() {
            Some(shard) if bytes <= room => {
                shard.push(tensor);
                room -= bytes;
            }
            _ => {
                shards.push(vec![tensor]);
                room = most.saturating_sub(bytes);
            }
        }
    }
    shards
}

/// Writes one file, or several and their index. Returns how many.
fn write_shards(
    folder: &Path,
    shards: Vec<Vec<Tensor<'_>>>,
    bytes: u64,
    overflowed: &Cell<Option<(TensorId, Format)>>,
) -> Result<usize> {
    let count = shards.len();
    let mut placed = BTreeMap::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let name = match count {
            1 => ONE_FILE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        placed.extend(shard.iter().map(|tensor| (tensor.id.hf_name(), name.clone())));
        let path = folder.join(name);
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let views = shard.iter().map(|tensor| (tensor.id.hf_name(), tensor));
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(|error| not_written(&path, error))?;
        if let Some((id, format)) = overflowed.get() {
            let (name, format) = (id.hf_name(), format.name());
            return Err(Error::Invalid(format!("{name} would hold values that aren't finite in {format}")));
        }
        // The safetensors crate's file is readable by its owner only; give it its neighbours' permissions.
        let neighbour = std::fs::metadata(folder.join(CONFIG));
        let shared = neighbour.and_then(|neighbour| std::fs::set_permissions(&path, neighbour.permissions()));
        shared.map_err(|source| Error::Io { path, source })?;
    }
    if count > 1 {
        let path = folder.join(INDEX);
        let index = json!({"metadata": {"total_size": bytes}, "weight_map": placed});
        std::fs::write(&path, format!("{index:#}\n")).map_err(|source| Error::Io { path, source })?;
    }
    Ok(count)
}

/// A tensor of the merged model, computed when it is written.
struct Tensor<'a> {
    merging: Merging<'a>,
    id: TensorId,
    shape: Vec<usize>,
    format: Format,
    /// A tensor that is not finite in the type in which it is written.
    overflowed: &'a Cell<Option<(TensorId, Format)>>,
}

impl Tensor<'_> {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.format.block_bytes()
    }
}

impl View for &Tensor<'_> {
    fn dtype(&self) -> Dtype {
        dtype(self.format).expect("checked before anything was written")
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.bytes());
        self.merging.rows(self.id, 0..self.merging.row_count(self.id), |row| {
            if !is_finite(self.format, row) {
                self.overflowed.set(Some((self.id, self.format)));
            }
            encode_row(self.format, row, &mut bytes);
        });
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.bytes()
    }
}
