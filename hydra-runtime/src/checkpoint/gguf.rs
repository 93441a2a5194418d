//! A model in a GGUF file, or in the parts of a split one: llama.cpp's names, its keys for the configuration, its tokenizer.
//! `describe.rs` and `writer.rs` write what this file reads.

pub(crate) mod container;
pub(crate) mod describe;
mod describe_tokenizer;
pub(crate) mod quantize;
pub(crate) mod split;
mod types;
mod vocabulary;
pub(crate) mod writer;

use super::{Listing, RawTensor, Source, TensorId};
use crate::config::architecture::{Traits, supported};
use crate::config::{Architecture, Biases, Config, Family, Rope, RopeScaling, Window, Yarn};
use crate::error::printable;
use crate::files::map;
use crate::json::narrowed;
use crate::projection::Projection;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use bytes::Bytes;
use container::{Container, Value};
use hydra_kernels::quant::RowOrder;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Frequencies' divisors of models that were stretched the LLaMA 3.1 way, [head_dim / 2].
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// What multiplies queries and keys, beside YaRN's usual factor.
const ATTENTION_FACTOR: &str = "rope.scaling.attn_factor";

/// Lists the tensors of a file, and of the other parts of a split model; `path` is for messages, and where those are.
pub(super) fn list(path: &Path, file: Bytes) -> Result<Listing> {
    let mut container = Container::parse(path, &file)?;
    let others = split::others(&container)?;
    let parts: Vec<(PathBuf, Bytes)> = others.map(|path| Ok((path.clone(), map(&path)?))).collect::<Result<_>>()?;
    for (path, bytes) in &parts {
        let part = Container::parse(path, bytes)?;
        split::follows(&part, &container)?;
        container.join(part)?;
    }
    split::check(&container)?;
    let config = config(&container)?;
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &container.tensors {
        let shape = tensor.dims.iter().rev().copied().collect();
        let raw = RawTensor { file: tensor.file, bytes: tensor.bytes.clone(), format: Ok(tensor.format), shape };
        tensors.insert(name.to_string(), raw);
    }
    let attention_rows = row_order(&config, TensorId::Projection(0, Projection::Q));
    let (source, data) = (Source::Gguf(path.into()), [file].into_iter().chain(parts.into_iter().map(|(_, part)| part)));
    Ok(Listing { source, config, data: data.collect(), tensors, name, relevant, attention_rows })
}

/// The tokenizer that the file carries.
pub(super) fn tokenizer(path: &Path, bytes: &[u8]) -> Result<Tokenizer> {
    vocabulary::tokenizer(&Container::parse(path, bytes)?)
}

pub(crate) fn name(id: TensorId) -> String {
    match id {
        TensorId::Embedding => "token_embd.weight".into(),
        TensorId::FinalNorm => "output_norm.weight".into(),
        TensorId::Head => "output.weight".into(),
        TensorId::AttentionNorm(layer) => format!("blk.{layer}.attn_norm.weight"),
        TensorId::FfnNorm(layer) => format!("blk.{layer}.ffn_norm.weight"),
        TensorId::Projection(layer, projection) => format!("blk.{layer}.{}.weight", projection.gguf_name()),
        TensorId::Bias(layer, projection) => format!("blk.{layer}.{}.bias", projection.gguf_name()),
        TensorId::QueryNorm(layer) => format!("blk.{layer}.attn_q_norm.weight"),
        TensorId::KeyNorm(layer) => format!("blk.{layer}.attn_k_norm.weight"),
    }
}

/// The order in which a file of this model's architecture has the rows of a tensor.
pub(crate) fn row_order(config: &Config, id: TensorId) -> RowOrder {
    match id {
        TensorId::Projection(_, Projection::Q | Projection::K) | TensorId::Bias(_, Projection::Q | Projection::K)
            if config.architecture.family.traits().interleaved =>
        {
            RowOrder::Interleaved { head_dim: config.head_dim }
        }
        _ => RowOrder::Natural,
    }
}

/// The logical row of each stored one.
pub(crate) fn stored_order(order: RowOrder, rows: usize) -> Vec<usize> {
    let mut logical = vec![0; rows];
    (0..rows).for_each(|row| logical[order.stored_row(row)] = row);
    logical
}

/// Biases and norms that the architecture doesn't have, more layers; not the rotary tables of old files.
fn relevant(name: &str) -> bool {
    let of_model = name.starts_with("blk.") || name == "output.bias";
    of_model && !name.ends_with(".attn_rot_embd") && !name.ends_with(".rope_freqs.weight")
}

/// The configuration, from the keys that begin with the architecture's name.
fn config(file: &Container) -> Result<Config> {
    let traits = traits(file)?;
    let key = |name: &str| format!("{}.{name}", traits.gguf.unwrap_or_default());
    let size = |name: &str| file.unsigned(&key(name));
    let need = |name: &str| size(name)?.ok_or_else(|| file.refuse(&key(name), "a positive whole number"));
    if size("expert_count")?.unwrap_or(0) > 0 {
        return Err(file.refuse(&key("expert_count"), "a model without experts"));
    }
    let (d_model, n_heads) = (need("embedding_length")?, need("attention.head_count")?);
    let head_dim = match size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && d_model.is_multiple_of(n_heads) => d_model / n_heads,
        None => return Err(file.refuse(&key("embedding_length"), &format!("a multiple of the {n_heads} heads"))),
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        if size(name)?.is_some_and(|n| n != head_dim) {
            return Err(file.refuse(&key(name), &format!("the head size, {head_dim}")));
        }
    }
    const EPSILON: &str = "attention.layer_norm_rms_epsilon";
    let norm_eps = file.float(&key(EPSILON))?.ok_or_else(|| file.refuse(&key(EPSILON), "a number"))?;
    let embedding = file.tensor("token_embd.weight")?;
    let (layers, context) = (need("block_count")?, need("context_length")?);
    let config = Config {
        vocab: embedding.dims.get(1).copied().unwrap_or(0),
        d_model,
        d_ffn: need("feed_forward_length")?,
        layers,
        n_heads,
        kv_heads: size("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        norm_eps: norm_eps as f32,
        rope: rope(file, key, context)?,
        context,
        tied: !file.tensors.contains_key("output.weight"),
        bos: file.token("tokenizer.ggml.bos_token_id")?,
        eos: end_tokens(file)?,
        architecture: architecture(file, traits, layers, &key("attention.sliding_window"))?,
    };
    config.check().map_err(|message| Error::Config { path: file.path.into(), message })?;
    Ok(config)
}

/// The architecture's row of the table.
fn traits(file: &Container) -> Result<&'static Traits> {
    const KEY: &str = "general.architecture";
    if file.string("general.type")? == Some("adapter") {
        return Err(file.refuse("general.type", "\"model\"; an adapter is given beside its model"));
    }
    let traits = file.string(KEY)?.and_then(Traits::of_gguf);
    traits.ok_or_else(|| file.refuse(KEY, &supported(|traits| traits.gguf)))
}

/// What the file's tensors and its window make of the architecture. llama.cpp takes biases where there are some, and calls a
/// LLaMA with a window LLaMA; in a Hugging Face folder it is a Mistral.
fn architecture(file: &Container, traits: &Traits, layers: usize, window_key: &str) -> Result<Architecture> {
    let has_bias = |projection| file.tensors.contains_key(name(TensorId::Bias(0, projection)).as_str());
    let biases = Biases {
        qkv: traits.biases.qkv || [Projection::Q, Projection::K, Projection::V].into_iter().any(has_bias),
        o: traits.biases.o || has_bias(Projection::O),
        mlp: traits.biases.mlp || [Projection::Gate, Projection::Up, Projection::Down].into_iter().any(has_bias),
    };
    let window = match file.unsigned(window_key)? {
        None => None,
        Some(size) => {
            let size = NonZeroUsize::new(size).ok_or_else(|| file.refuse(window_key, "a positive whole number"))?;
            Window::new(size, layers, |_| true)
        }
    };
    let family = match traits.family {
        Family::Llama if window.is_some() => Family::Mistral,
        family => family,
    };
    Ok(Architecture { family, biases, head_norms: traits.head_norms, window })
}

/// The ends of a text, of a turn and of a message, as far as they are different tokens.
fn end_tokens(file: &Container) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for end in ["eos", "eot", "eom"] {
        let id = file.token(&format!("tokenizer.ggml.{end}_token_id"))?;
        ids.extend(id.filter(|id| !ids.contains(id)));
    }
    Ok(ids)
}

fn rope(file: &Container, key: impl Fn(&str) -> String, context: usize) -> Result<Rope> {
    let theta = file.float(&key("rope.freq_base"))?.unwrap_or(10_000.0) as f32;
    let factor = match file.float(&key("rope.scaling.factor"))? {
        None => file.float(&key("rope.scale_linear"))?,
        factor => factor,
    };
    let kind = key("rope.scaling.type");
    let scaling = match file.string(&kind)? {
        Some("none") => RopeScaling::None,
        None | Some("linear") => {
            factor.filter(|&f| f != 1.0).map_or(RopeScaling::None, |f| RopeScaling::Linear(f as f32))
        }
        Some("yarn") => RopeScaling::Yarn(yarn(file, &key, factor.unwrap_or(1.0), context)?),
        Some(_) => return Err(file.refuse(&kind, r#""none", "linear" or "yarn""#)),
    };
    let attention_factor = key(ATTENTION_FACTOR);
    if !matches!(scaling, RopeScaling::Yarn(_)) && file.float(&attention_factor)?.is_some_and(|factor| factor != 1.0) {
        return Err(file.refuse(&attention_factor, "1 without YaRN"));
    }
    if !file.tensors.contains_key(ROPE_FACTORS) {
        return Ok(Rope { theta, scaling });
    }
    let tensor = file.tensor(ROPE_FACTORS)?;
    let (RopeScaling::None, [_], Some(factors)) =
        (scaling, tensor.dims.as_slice(), super::floats(tensor.format, &file.files[tensor.file][tensor.bytes.clone()]))
    else {
        let message = format!("{ROPE_FACTORS}: wanted one row of floats and no other rope scaling");
        return Err(Error::Config { path: file.path.into(), message });
    };
    Ok(Rope { theta, scaling: RopeScaling::Factors(factors) })
}

/// YaRN as llama.cpp computes it: of the keys for its other numbers llama.cpp reads none for these architectures.
fn yarn(file: &Container, key: &impl Fn(&str) -> String, factor: f64, context: usize) -> Result<Yarn> {
    let [beta_fast, beta_slow] = Yarn::BETAS;
    let attention_factor = file.float(&key(ATTENTION_FACTOR))?.unwrap_or(1.0);
    Ok(Yarn {
        factor: factor as f32,
        original_context: file.unsigned(&key("rope.scaling.original_context_length"))?.unwrap_or(context),
        beta_fast,
        beta_slow,
        truncate: true,
        attention_factor: (Yarn::mscale(factor, 1.0) * attention_factor) as f32,
    })
}

/// Typed access to the metadata; a wrong type is an error that names the key.
impl<'a> Container<'a> {
    pub(crate) fn refuse(&self, key: &str, wanted: &str) -> Error {
        let found = match self.metadata.get(key) {
            None => "missing".into(),
            Some(Value::String(s)) => format!("is \"{}\"", printable(s)),
            Some(Value::Unsigned(n)) => format!("is {n}"),
            Some(Value::Signed(n)) => format!("is {n}"),
            // Without the digits that widening an f32 adds.
            Some(&Value::Float(x)) => narrowed(x).map_or_else(|| format!("is {x}"), |x| format!("is {x}")),
            Some(Value::Bool(b)) => format!("is {b}"),
            Some(_) => "is an array".into(),
        };
        Error::Config { path: self.path.into(), message: format!("{key} {found}, wanted {wanted}") }
    }

    fn typed<T>(&self, key: &str, wanted: &str, read: impl Fn(&Value<'a>) -> Option<T>) -> Result<Option<T>> {
        self.metadata.get(key).map(|value| read(value).ok_or_else(|| self.refuse(key, wanted))).transpose()
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>> {
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

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
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
