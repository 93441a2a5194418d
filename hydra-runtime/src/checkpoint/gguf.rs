//! A model in one GGUF file: llama.cpp's names, its keys for the configuration, its tokenizer.

mod container;
mod types;
mod vocabulary;

use super::{Listing, RawTensor, Source, TensorId};
use crate::config::{Config, Rope, RopeScaling};
use crate::error::printable;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use bytes::Bytes;
use container::{Container, Value};
use hydra_kernels::quant::RowOrder;
use std::collections::BTreeMap;
use std::path::Path;

/// Frequencies' divisors of models that were stretched the LLaMA 3.1 way, [head_dim / 2].
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Lists a file's tensors; `path` is for messages.
pub(super) fn list(path: &Path, file: Bytes) -> Result<Listing> {
    let container = Container::parse(path, &file)?;
    let config = config(&container)?;
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &container.tensors {
        let shape = tensor.dims.iter().rev().copied().collect();
        let raw = RawTensor { file: 0, bytes: tensor.bytes.clone(), format: Ok(tensor.format), shape };
        tensors.insert(name.to_string(), raw);
    }
    let attention_rows = RowOrder::Interleaved { head_dim: config.head_dim };
    let (source, data) = (Source::Gguf(path.into()), vec![file]);
    Ok(Listing { source, config, data, tensors, name, relevant, attention_rows })
}

/// The tokenizer that the file carries.
pub(super) fn tokenizer(path: &Path, bytes: &[u8]) -> Result<Tokenizer> {
    vocabulary::tokenizer(&Container::parse(path, bytes)?)
}

fn name(id: TensorId) -> String {
    match id {
        TensorId::Embedding => "token_embd.weight".into(),
        TensorId::FinalNorm => "output_norm.weight".into(),
        TensorId::Head => "output.weight".into(),
        TensorId::AttentionNorm(layer) => format!("blk.{layer}.attn_norm.weight"),
        TensorId::FfnNorm(layer) => format!("blk.{layer}.ffn_norm.weight"),
        TensorId::Projection(layer, projection) => format!("blk.{layer}.{}.weight", projection.gguf_name()),
    }
}

/// Biases, more norms, more layers; not the rotary tables of old files.
fn relevant(name: &str) -> bool {
    let of_model = name.starts_with("blk.") || name == "output.bias";
    of_model && !name.ends_with(".attn_rot_embd") && !name.ends_with(".rope_freqs.weight")
}

fn config(file: &Container) -> Result<Config> {
    let architecture = file.string("general.architecture")?;
    if architecture != Some("llama") {
        return Err(file.refuse("general.architecture", "\"llama\""));
    }
    if file.unsigned("split.count")?.unwrap_or(1) > 1 {
        return Err(file.refuse("split.count", "a model in one file (gguf-split --merge makes one)"));
    }
    if file.unsigned("llama.expert_count")?.unwrap_or(0) > 0 {
        return Err(file.refuse("llama.expert_count", "a model without experts"));
    }
    let size = |key: &str| file.unsigned(key);
    let need = |key: &str| size(key)?.ok_or_else(|| file.refuse(key, "a positive whole number"));
    let (d_model, n_heads) = (need("llama.embedding_length")?, need("llama.attention.head_count")?);
    let head_dim = match size("llama.attention.key_length")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && d_model.is_multiple_of(n_heads) => d_model / n_heads,
        None => return Err(file.refuse("llama.embedding_length", &format!("a multiple of the {n_heads} heads"))),
    };
    for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if size(key)?.is_some_and(|n| n != head_dim) {
            return Err(file.refuse(key, &format!("the head size, {head_dim}")));
        }
    }
    let embedding = file.tensor("token_embd.weight")?;
    let config = Config {
        vocab: embedding.dims.get(1).copied().unwrap_or(0),
        d_model,
        d_ffn: need("llama.feed_forward_length")?,
        layers: need("llama.block_count")?,
        n_heads,
        kv_heads: size("llama.attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        norm_eps: file
            .float("llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| file.refuse("llama.attention.layer_norm_rms_epsilon", "a number"))? as f32,
        rope: rope(file)?,
        context: need("llama.context_length")?,
        tied: !file.tensors.contains_key("output.weight"),
        bos: file.token("tokenizer.ggml.bos_token_id")?,
        eos: end_tokens(file)?,
    };
    config.check().map_err(|message| Error::Config { path: file.path.into(), message })?;
    Ok(config)
}

/// The end of a text, then the end of a turn, if that is another.
fn end_tokens(file: &Container) -> Result<Vec<u32>> {
    let mut ids: Vec<_> = file.token("tokenizer.ggml.eos_token_id")?.into_iter().collect();
    let turn = file.token("tokenizer.ggml.eot_token_id")?;
    ids.extend(turn.filter(|id| !ids.contains(id)));
    Ok(ids)
}

fn rope(file: &Container) -> Result<Rope> {
    let theta = file.float("llama.rope.freq_base")?.unwrap_or(10_000.0) as f32;
    let factor = match file.float("llama.rope.scaling.factor")? {
        None => file.float("llama.rope.scale_linear")?,
        factor => factor,
    };
    let scaling = match file.string("llama.rope.scaling.type")? {
        Some("none") => RopeScaling::None,
        None | Some("linear") => {
            factor.filter(|&f| f != 1.0).map_or(RopeScaling::None, |f| RopeScaling::Linear(f as f32))
        }
        Some(_) => return Err(file.refuse("llama.rope.scaling.type", "\"none\" or \"linear\"")),
    };
    if !file.tensors.contains_key(ROPE_FACTORS) {
        return Ok(Rope { theta, scaling });
    }
    let tensor = file.tensor(ROPE_FACTORS)?;
    let (RopeScaling::None, [_], Some(factors)) =
        (scaling, tensor.dims.as_slice(), super::floats(tensor.format, &file.bytes[tensor.bytes.clone()]))
    else {
        let message = format!("{ROPE_FACTORS}: wanted one row of floats and no other rope scaling");
        return Err(Error::Config { path: file.path.into(), message });
    };
    Ok(Rope { theta, scaling: RopeScaling::Factors(factors) })
}

/// Typed access to the metadata; a wrong type is an error that names the key.
impl<'a> Container<'a> {
    fn refuse(&self, key: &str, wanted: &str) -> Error {
        let found = match self.metadata.get(key) {
            None => "missing".into(),
            Some(Value::String(s)) => format!("is \"{}\"", printable(s)),
            Some(Value::Unsigned(n)) => format!("is {n}"),
            Some(Value::Signed(n)) => format!("is {n}"),
            Some(Value::Float(x)) => format!("is {x}"),
            Some(Value::Bool(b)) => format!("is {b}"),
            Some(_) => "is an array".into(),
        };
        Error::Config { path: self.path.into(), message: format!("{key} {found}, wanted {wanted}") }
    }

    fn typed<T>(&self, key: &str, wanted: &str, read: impl Fn(&Value<'a>) -> Option<T>) -> Result<Option<T>> {
        self.metadata.get(key).map(|value| read(value).ok_or_else(|| self.refuse(key, wanted))).transpose()
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", |value| if let Value::String(s) = value { Some(*s) } else { None })
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| if let Value::Bool(b) = value { Some(*b) } else { None })
    }

    fn unsigned(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| match *value {
            Value::Unsigned(n) => usize::try_from(n).ok(),
            Value::Signed(n) => usize::try_from(n).ok(),
            _ => None,
        })
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        let id = self.unsigned(key)?.map(|n| u32::try_from(n).map_err(|_| self.refuse(key, "a token's number")));
        id.transpose()
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| match *value {
            Value::Float(x) => Some(x),
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            _ => None,
        })
    }

    fn tensor(&self, name: &str) -> Result<&container::Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::Tensors {
            path: self.path.into(),
            missing: vec![name.into()],
            surplus: Vec::new(),
            wrong: Vec::new(),
        })
    }
}
