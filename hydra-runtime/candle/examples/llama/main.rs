//! Puts an adapter made by `hydra finetune` on a LLaMA in candle, and compares its logits with Hydra's own.
//!
//!     cargo run --release --example llama -- MODEL ADAPTER TEXT
//!
//! MODEL is a Hugging Face folder with one model.safetensors, ADAPTER an adapter's folder. With the feature
//! `candle-transformers`, the model without the adapter is compared with candle-transformers' as well.

mod model;

use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::Sequence;
use hydra_runtime::{evaluate::Evaluator, model::Model};
use std::{path::Path, sync::Arc};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [model_dir, adapter_dir, text] = &args[..] else {
        return Err("usage: llama MODEL ADAPTER TEXT".into());
    };
    let model = Model::open(model_dir)?;
    let tokens = model.tokenizer()?.encode_prompt(text)?;
    let adapter = Adapter::load(adapter_dir, model.config())?;
    let hydra = Evaluator::new(&model, Some(&adapter), tokens.len())?.logits(&Sequence::prompt(&tokens))?;

    let cpu = Arc::new(Cpu::new(CpuOptions::default())?);
    let llama = model::Llama::open(Path::new(model_dir), Some((cpu, &adapter)))?;
    let candle = llama.logits(&tokens)?.flatten_all()?.to_vec1::<f32>()?;
    println!(
        "{} tokens: largest difference between candle's logits and Hydra's: {:.1e}",
        tokens.len(),
        largest(&candle, &hydra)
    );

    #[cfg(feature = "candle-transformers")]
    {
        let base = model::Llama::open(Path::new(model_dir), None)?.logits(&tokens)?;
        let last = base.get(tokens.len() - 1)?.to_vec1::<f32>()?;
        let theirs = transformers(Path::new(model_dir), &tokens)?;
        println!("without the adapter, from candle-transformers': {:.1e}", largest(&last, &theirs));
    }
    println!("next token: {:?}", next(&model, &candle[candle.len() - model.config().vocab..])?);
    Ok(())
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn next(model: &Model, logits: &[f32]) -> hydra_runtime::Result<String> {
    let best = (0..logits.len()).max_by(|&i, &j| logits[i].total_cmp(&logits[j])).unwrap_or(0);
    model.tokenizer()?.decode(&[best as u32])
}

/// The last token's logits, from candle-transformers' LLaMA.
#[cfg(feature = "candle-transformers")]
fn transformers(dir: &Path, tokens: &[u32]) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    use candle_core::{DType, Device, Tensor};
    use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
    let config = config.into_config(false);
    let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu)?;
    let weights = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu)?;
    let ids = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    Ok(Llama::load(weights, &config)?.forward(&ids, 0, &mut cache)?.flatten_all()?.to_vec1()?)
}
