//! A Hugging Face folder: `config.json` beside `model.safetensors`, or beside shards that `model.safetensors.index.json`
//! lists. The header's own consistency (lengths, overlaps, gaps) is checked by the safetensors crate.
//!
//! A tensor that a model uses under two names may be stored once. `safetensors.torch.save_model` then lists the other name
//! in the header's metadata, `{"model.embed_tokens.weight": "lm_head.weight"}`, and may keep either of the two. Transformers
//! stores the first of a tied model's two names that it finds, without a note: the configuration says that they are tied.

use super::{Listing, RawTensor, Source, TensorId};
use crate::config::Config;
use crate::error::{not_safetensors, printable};
use crate::files::Files;
use crate::{Error, Result};
use bytes::Bytes;
use hydra_kernels::quant::{Format, RowOrder};
use safetensors::tensor::{Dtype, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

pub(crate) const ONE_FILE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Whether a folder has weights that are read.
pub(super) fn has_weights(files: &Files) -> bool {
    files.has(ONE_FILE) || files.has(INDEX)
}

pub(super) fn list(files: Files) -> Result<Listing> {
    let mut config = Config::read(&files)?;
    let mut stored = Stored::default();
    if files.has(ONE_FILE) {
        stored.add(&files, ONE_FILE)?;
        stored.share(&mut config);
    } else if files.has(INDEX) {
        let placed = index(&files)?;
        for shard in placed.values().collect::<BTreeSet<_>>() {
            stored.add(&files, shard)?;
        }
        stored.share(&mut config);
        let is_there = |name: &str| stored.tensors.contains_key(name);
        let missing: Vec<_> = placed.keys().filter(|name| !is_there(name)).map(|name| printable(name)).collect();
        if !missing.is_empty() {
            return Err(Error::Tensors { path: files.path().into(), missing, surplus: Vec::new(), wrong: Vec::new() });
        }
    } else {
        let pickled = files.has("pytorch_model.bin") || files.has("pytorch_model.bin.index.json");
        let hint = if pickled {
            "; pytorch_model.bin isn't read, save the model again with safe_serialization=True"
        } else {
            ""
        };
        let message = format!("neither {ONE_FILE} nor {INDEX} in it{hint}");
        return Err(Error::Format { path: files.path().into(), offset: None, message });
    }
    let Stored { data, tensors, .. } = stored;
    let (source, attention_rows) = (Source::Files(files), RowOrder::Natural);
    Ok(Listing { source, config, data, tensors, name, relevant, attention_rows })
}

pub(super) fn name(id: TensorId) -> String {
    match id {
        TensorId::Embedding => "model.embed_tokens.weight".into(),
        TensorId::FinalNorm => "model.norm.weight".into(),
        TensorId::Head => "lm_head.weight".into(),
        TensorId::AttentionNorm(layer) => format!("model.layers.{layer}.input_layernorm.weight"),
        TensorId::FfnNorm(layer) => format!("model.layers.{layer}.post_attention_layernorm.weight"),
        TensorId::Projection(layer, projection) => format!("model.layers.{layer}.{}.weight", projection.hf_path()),
        TensorId::Bias(layer, projection) => format!("model.layers.{layer}.{}.bias", projection.hf_path()),
        TensorId::QueryNorm(layer) => format!("model.layers.{layer}.self_attn.q_norm.weight"),
        TensorId::KeyNorm(layer) => format!("model.layers.{layer}.self_attn.k_norm.weight"),
    }
}

/// Biases and norms that the architecture doesn't have, more layers; not the rotary tables that old files hold.
fn relevant(name: &str) -> bool {
    let of_model = name.starts_with("model.layers.") || name == "lm_head.bias";
    of_model && !name.ends_with("rotary_emb.inv_freq")
}

/// The most bytes of a file's name on common file systems.
const NAME: usize = 255;

/// Which shard holds which tensor. A shard is a file of this folder and of no other.
fn index(files: &Files) -> Result<BTreeMap<String, String>> {
    let file = files.object(INDEX)?;
    let placed = file.object("weight_map")?.ok_or_else(|| file.refuse("weight_map", "an object"))?;
    let mut shards = BTreeMap::new();
    for tensor in placed.map.keys() {
        let shard = placed.string(tensor)?.unwrap_or_default();
        let mut parts = Path::new(shard).components();
        let own = matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == shard);
        if !own || shard.len() > NAME {
            return Err(placed.refuse(&printable(tensor), "the name of a file in the same folder"));
        }
        shards.insert(tensor.clone(), shard.to_string());
    }
    Ok(shards)
}

/// What the files hold.
#[derive(Default)]
struct Stored {
    /// The files' bytes.
    data: Vec<Bytes>,
    tensors: BTreeMap<String, RawTensor>,
    /// The files' metadata: among it, another name of a tensor → the name under which it is stored.
    metadata: BTreeMap<String, String>,
}

impl Stored {
    /// Adds a file's bytes, tensors and metadata.
    fn add(&mut self, files: &Files, name: &str) -> Result<()> {
        let (path, mapped) = (files.name(name), files.map(name)?);
        let invalid = |message: String| Error::Format { path: path.clone(), offset: None, message };
        let refused = |error| invalid(not_safetensors(&error));
        let (_, header) = SafeTensors::read_metadata(&mapped).map_err(refused)?;
        let parsed = SafeTensors::deserialize(&mapped).map_err(refused)?;
        let base = mapped.as_ptr() as usize;
        for (name, view) in parsed.iter() {
            let start = view.data().as_ptr() as usize - base;
            let format = match view.dtype() {
                Dtype::F32 => Ok(Format::F32),
                Dtype::F16 => Ok(Format::F16),
                Dtype::BF16 => Ok(Format::Bf16),
                other => Err(other.to_string()),
            };
            let bytes = start..start + view.data().len();
            let raw = RawTensor { file: self.data.len(), bytes, format, shape: view.shape().to_vec() };
            if self.tensors.insert(name.to_string(), raw).is_some() {
                return Err(invalid(format!("{} is in two shards", printable(name))));
            }
        }
        self.metadata.extend(header.metadata().iter().flatten().map(|(name, value)| (name.clone(), value.clone())));
        self.data.push(mapped);
        Ok(())
    }

    /// Gives a tensor that is stored under one name to the other names that it has. A model whose output head is its
    /// embedding is tied, whatever `config` says.
    fn share(&mut self, config: &mut Config) {
        let (embedding, head) = (name(TensorId::Embedding), name(TensorId::Head));
        // As transformers 5 does, which ties what is missing: a head of its own is taken.
        if let (Some(a), Some(b)) = (self.tensors.get(&embedding), self.tensors.get(&head)) {
            let bytes = |raw: &RawTensor| &self.data[raw.file][raw.bytes.clone()];
            config.tied &= a.shape == b.shape && a.format == b.format && bytes(a) == bytes(b);
        }
        let is_alias = |a: &str, b: &str| self.metadata.get(a).is_some_and(|stored| stored == b);
        config.tied |= !(self.tensors.contains_key(&embedding) && self.tensors.contains_key(&head))
            && (is_alias(&embedding, &head) || is_alias(&head, &embedding));
        if config.tied {
            self.metadata.insert(embedding, head);
        }
        for (name, stored) in &self.metadata {
            let raw = self.tensors.get(stored).cloned();
            if let Some(raw) = raw.filter(|_| !self.tensors.contains_key(name)) {
                self.tensors.insert(name.clone(), raw);
            }
        }
    }
}
