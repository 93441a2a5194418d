//! LLaMA on candle, with an adapter's layers where the adapter has any. The model is that of candle-transformers'
//! `models::llama`, whose own layers can't be replaced from outside.

use candle_core::{D, Device, Module, Result, Tensor};
use candle_nn::{Embedding, Linear, RmsNorm, ops::softmax_last_dim, rotary_emb::rope};
use hydra_candle::HydraLinear;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::cpu::Cpu;
use hydra_runtime::projection::{ByProjection, Projection};
use serde_json::Value;
use std::{collections::HashMap, path::Path, sync::Arc};

/// A model with or without an adapter.
pub struct Llama {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    heads: [usize; 2],
    theta: f64,
}

struct Layer {
    projections: ByProjection<Box<dyn Module>>,
    input_norm: RmsNorm,
    post_attention_norm: RmsNorm,
}

impl Llama {
    /// Reads a Hugging Face folder with one model.safetensors.
    pub fn open(
        dir: &Path,
        adapter: Option<(Arc<Cpu>, &Adapter)>,
    ) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let path = dir.join("config.json");
        let config = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let config: Value = serde_json::from_slice(&config)?;
        if !config["rope_scaling"].is_null() {
            return Err("this example has no RoPE scaling".into());
        }
        let size = |key: &str| config[key].as_u64().map(|n| n as usize).ok_or(format!("config.json has no {key}"));
        let number = |key: &str, default: f64| config[key].as_f64().unwrap_or(default);
        let heads = size("num_attention_heads")?;
        let layers = size("num_hidden_layers")?;
        if let Some((_, adapter)) = &adapter
            && adapter.layers.len() != layers
        {
            return Err(format!("the adapter is for {} layers, the model has {layers}", adapter.layers.len()).into());
        }
        let eps = number("rms_norm_eps", 1e-6);
        let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu)?;
        let norm = |name: String| Ok::<_, String>(RmsNorm::new(tensor(&tensors, name)?, eps));
        let layer = |i: usize| -> std::result::Result<Layer, Box<dyn std::error::Error>> {
            let projection = |p: Projection| -> std::result::Result<Box<dyn Module>, Box<dyn std::error::Error>> {
                let weight = tensor(&tensors, format!("model.layers.{i}.{}.weight", p.hf_path()))?;
                Ok(match &adapter {
                    Some((cpu, adapter)) if adapter.layers[i][p].is_some() => {
                        Box::new(HydraLinear::from_adapter(cpu.clone(), weight.try_into()?, adapter, i, p)?.frozen())
                    }
                    _ => Box::new(Linear::new(weight, None)),
                })
            };
            Ok(Layer {
                projections: ByProjection::try_from_fn(projection)?,
                input_norm: norm(format!("model.layers.{i}.input_layernorm.weight"))?,
                post_attention_norm: norm(format!("model.layers.{i}.post_attention_layernorm.weight"))?,
            })
        };
        let embeddings = tensor(&tensors, "model.embed_tokens.weight".into())?;
        let lm_head = tensors.get("lm_head.weight").unwrap_or(&embeddings).clone();
        Ok(Self {
            layers: (0..layers).map(layer).collect::<std::result::Result<_, _>>()?,
            embedding: Embedding::new(embeddings, size("hidden_size")?),
            norm: norm("model.norm.weight".into())?,
            lm_head: Linear::new(lm_head, None),
            heads: [heads, config["num_key_value_heads"].as_u64().map_or(heads, |n| n as usize)],
            theta: number("rope_theta", config["rope_parameters"]["rope_theta"].as_f64().unwrap_or(1e4)),
        })
    }

    /// The logits [tokens, vocabulary] of one sequence.
    pub fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let mut x = self.embedding.forward(&ids)?;
        for layer in &self.layers {
            x = (&x + self.attention(layer, &layer.input_norm.forward(&x)?)?)?;
            let h = layer.post_attention_norm.forward(&x)?;
            let gate = layer.projections[Projection::Gate].forward(&h)?.silu()?;
            let inner = (gate * layer.projections[Projection::Up].forward(&h)?)?;
            x = (&x + layer.projections[Projection::Down].forward(&inner)?)?;
        }
        self.lm_head.forward(&self.norm.forward(&x)?)
    }

    fn attention(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let ([heads, kv_heads], tokens) = (self.heads, x.dim(0)?);
        let project = |p: Projection, heads: usize| {
            let y = layer.projections[p].forward(x)?;
            y.reshape((1, tokens, heads, ()))?.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) =
            (project(Projection::Q, heads)?, project(Projection::K, kv_heads)?, project(Projection::V, kv_heads)?);
        let head_dim = q.dim(D::Minus1)?;
        let (cos, sin) = self.angles(tokens, head_dim)?;
        let (q, k) = (rope(&q, &cos, &sin)?, rope(&k, &cos, &sin)?);
        let repeat = |x: Tensor| {
            let shape = (1, kv_heads, heads / kv_heads, tokens, head_dim);
            x.unsqueeze(2)?.broadcast_as(shape)?.reshape((1, heads, tokens, head_dim))
        };
        let (k, v) = (repeat(k)?, repeat(v)?);
        let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (head_dim as f64).sqrt())?;
        let weights = softmax_last_dim(&scores.broadcast_add(&causal(tokens)?)?)?;
        let o = weights.matmul(&v.contiguous()?)?.transpose(1, 2)?.reshape((tokens, ()))?;
        layer.projections[Projection::O].forward(&o)
    }

    fn angles(&self, tokens: usize, head_dim: usize) -> Result<(Tensor, Tensor)> {
        let angle = |t: usize, i: usize| t as f64 / self.theta.powf(2.0 * i as f64 / head_dim as f64);
        let all = |f: fn(f64) -> f64| {
            let values = (0..tokens).flat_map(|t| (0..head_dim / 2).map(move |i| f(angle(t, i)) as f32));
            Tensor::from_iter(values.collect::<Vec<_>>(), &Device::Cpu)?.reshape((tokens, head_dim / 2))
        };
        Ok((all(f64::cos)?, all(f64::sin)?))
    }
}

/// 0 for what a token may see, −∞ for what comes after it; [tokens, tokens].
fn causal(tokens: usize) -> Result<Tensor> {
    let values = (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 });
    Tensor::from_iter(values.collect::<Vec<_>>(), &Device::Cpu)?.reshape((tokens, tokens))
}

fn tensor(tensors: &HashMap<String, Tensor>, name: String) -> std::result::Result<Tensor, String> {
    let tensor = tensors.get(&name).ok_or_else(|| format!("model.safetensors has no {name}"))?;
    tensor.to_dtype(candle_core::DType::F32).map_err(|error| error.to_string())
}
