//! A LoRA in llama.cpp's form: one GGUF file, which `llama-cli --lora` takes.
//!
//! ```text
//! general.type = "adapter"   adapter.type = "lora"   general.architecture   adapter.lora.alpha (without it the scale is 1)
//! blk.{L}.{projection}.weight.lora_a [rank, d_in]      blk.{L}.{projection}.weight.lora_b [d_out, rank]
//! ```
//! Each pair has its own rank, by which alpha is divided, and a layer need not have one: see `adapter/pad.rs`.
//! The rows of B follow the model's GGUF: those of q and k lie in llama.cpp's order, where the architecture has it.

use super::modules::Placed;
use super::pad::Own;
use super::{Adapter, AdapterConfig, AdapterPair, GateKind, Method};
use crate::atomic::fill_atomically;
use crate::checkpoint::TensorId;
use crate::checkpoint::gguf::container::{Container, Tensor};
use crate::checkpoint::gguf::quantize::encode_row;
use crate::checkpoint::gguf::{self, describe};
use crate::config::Config;
use crate::error::printable;
use crate::files::map;
use crate::projection::{ByProjection, Projection};
use crate::{Error, Result};
use hydra_kernels::isa::Isa;
use hydra_kernels::quant::{Format, RowOrder, Weight};
use std::collections::BTreeMap;
use std::path::Path;

fn name(layer: usize, projection: Projection, part: &str) -> String {
    format!("{}.{part}", gguf::name(TensorId::Projection(layer, projection)))
}

impl Adapter {
    /// Writes a LoRA as a GGUF file for llama.cpp, in f32; `model` is the model's. `description` becomes `general.description`. What
    /// is at `path` is replaced whole or not at all.
    ///
    /// # Errors
    /// If the adapter is not a LoRA ([`Adapter::as_lora`] makes one of it), doesn't fit the model, or has values that aren't finite.
    pub fn save_gguf(&self, path: impl AsRef<Path>, model: &Config, description: Option<&str>) -> Result<()> {
        self.fits(model)?;
        self.check_finite()?;
        if self.config.method != Method::Lora {
            let method = self.config.method.name();
            return Err(Error::WrongAdapter(format!(
                "llama.cpp's adapters are LoRAs: expected method lora, found {method}"
            )));
        }
        if self.config.scale() == 0.0 {
            return Err(Error::WrongAdapter("alpha 0: expected another, since llama.cpp takes 0 for no alpha".into()));
        }
        let mut header = describe::lora(model, self.config.scale() * self.config.rank as f32);
        if let Some(description) = description {
            header.string("general.description", description);
        }
        let mut tensors = Vec::new();
        for (layer, projection, pair) in self.pairs() {
            let rank = self.config.rank;
            header.tensor(name(layer, projection, "lora_a"), &[rank, pair.d_in], Format::F32);
            header.tensor(name(layer, projection, "lora_b"), &[pair.d_out, rank], Format::F32);
            tensors.push(pair.a.clone());
            let order = gguf::row_order(model, TensorId::Projection(layer, projection));
            let stored = gguf::stored_order(order, pair.d_out);
            tensors.push(stored.into_iter().flat_map(|row| &pair.b[row * rank..][..rank]).copied().collect());
        }
        fill_atomically(path.as_ref(), |path| {
            header.write(path, |i, bytes| {
                encode_row(Format::F32, &tensors[i], bytes);
                Ok(())
            })
        })
    }
}

/// Reads such a file for a model.
pub(super) fn load(path: &Path, model: &Config) -> Result<Adapter> {
    let bytes = map(path)?;
    let file = Container::parse(path, &bytes)?;
    let (config, placed) = config(&file, model)?;
    let (mut missing, mut wrong) = (Vec::new(), Vec::new());
    let mut left: BTreeMap<&str, &Tensor> = file.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut layers = Vec::new();
    for (layer, owns) in placed.iter().enumerate() {
        let mut pairs = ByProjection::default();
        for projection in Projection::ALL {
            let Some(Own { rank, .. }) = owns[projection] else { continue };
            let (d_out, d_in) = projection.dims(model);
            let mut read = |part: &str, rows: usize, cols: usize| {
                let name = name(layer, projection, part);
                let Some(tensor) = left.remove(name.as_str()) else {
                    missing.push(name);
                    return None;
                };
                values(tensor, &bytes, rows, cols).map_err(|why| wrong.push(format!("{name} {why}"))).ok()
            };
            let (a, b) = (read("lora_a", rank, d_in), read("lora_b", d_out, rank));
            let Some((a, b)) = a.zip(b) else { continue };
            let order = gguf::row_order(model, TensorId::Projection(layer, projection));
            let b = (0..d_out).flat_map(|row| &b[order.stored_row(row) * rank..][..rank]).copied().collect();
            pairs[projection] = Some(AdapterPair { d_in, d_out, a, b });
        }
        layers.push(pairs);
    }
    missing.truncate(crate::error::MOST_MISSING);
    let surplus: Vec<_> = left.into_keys().map(printable).collect();
    if missing.is_empty() && wrong.is_empty() && surplus.is_empty() {
        Adapter::of_pairs(config, &placed, layers)
    } else {
        Err(Error::Tensors { path: path.into(), missing, surplus, wrong })
    }
}

/// The configuration for all pairs, and rank and alpha of each.
fn config(file: &Container<'_>, model: &Config) -> Result<(AdapterConfig, Placed)> {
    for (key, wanted) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        if file.string(key)? != Some(wanted) {
            return Err(file.refuse(key, &format!("\"{wanted}\": a LoRA for llama.cpp")));
        }
    }
    // It acts only behind certain tokens.
    let activated = "adapter.alora.invocation_tokens";
    if file.metadata.contains_key(activated) {
        return Err(file.refuse(activated, "none: a LoRA that always acts"));
    }
    let architecture = describe::architecture(model);
    if file.string("general.architecture")? != Some(architecture) {
        return Err(file.refuse("general.architecture", &format!("the model's, \"{architecture}\"")));
    }
    // llama.cpp takes 0 for none given.
    let alpha = file.float("adapter.lora.alpha")?.map(|alpha| alpha as f32).filter(|&alpha| alpha != 0.0);
    let own = |layer: usize, projection: Projection| {
        let tensor = |part| file.tensors.get(name(layer, projection, part).as_str());
        // Fastest first. If one is missing, or has another rank, it is named later.
        let rank = tensor("lora_a").map(|a| a.dims.get(1)).or(tensor("lora_b").map(|b| b.dims.first()))?;
        let rank = rank.copied().unwrap_or(1);
        Some(Own { rank, alpha: alpha.unwrap_or(rank as f32) })
    };
    let placed: Placed = (0..model.layers).map(|layer| ByProjection::from_fn(|p| own(layer, p))).collect();
    let config = AdapterConfig {
        method: Method::Lora,
        gate: GateKind::One,
        lora_heads: 1,
        dropout: 0.0,
        ..AdapterConfig::default()
    };
    let config = config.of_all(&placed);
    let refuse = |error: Error| Error::Format { path: file.path.into(), offset: None, message: error.to_string() };
    config.check().map_err(refuse)?;
    Ok((config, placed))
}

/// A matrix as f32; the text says what is wrong with it.
fn values(tensor: &Tensor, file: &[u8], rows: usize, cols: usize) -> Result<Vec<f32>, String> {
    let shape: Vec<usize> = tensor.dims.iter().rev().copied().collect();
    if shape != [rows, cols] {
        return Err(format!("is {shape:?}, wanted [{rows}, {cols}]"));
    }
    let weight = Weight::new(tensor.format, rows, cols, &file[tensor.bytes.clone()], RowOrder::Natural);
    let (weight, isa) = (weight.map_err(|error| error.to_string())?, Isa::detect());
    let mut values = vec![0.0; rows * cols];
    values.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| weight.decode_row(isa, row, 0, out));
    match values.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(format!("holds {x}")),
        None => Ok(values),
    }
}
