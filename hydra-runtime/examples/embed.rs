//! The runtime inside another program: load a model, teach it one answer, generate with the adapter, save it.
//!
//!     cargo run --release -p hydra-runtime --example embed -- MODEL ADAPTER_OUT
//!
//! MODEL is a Hugging Face folder or a GGUF file.

use hydra_runtime::activations::Keep;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::AdamW;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::generate::{Generator, Sampler};
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{TrainOptions, Trainer};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out] = arguments.as_slice() else { return Err("usage: embed MODEL ADAPTER_OUT".into()) };

    // The checkpoint is mapped, the weights stay in their own format.
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let tokenizer = checkpoint.tokenizer()?;
    let model = Model::load(Cpu::new(CpuOptions::default())?, &checkpoint)?;

    // One example: the loss is taken on the answer alone.
    let mut tokens: Vec<u32> = tokenizer.bos_to_add().into_iter().collect();
    tokens.extend(tokenizer.encode("What has a heart of water and nine heads?\n")?);
    let answer_start = tokens.len();
    tokens.extend(tokenizer.encode("A hydra.")?);
    let prompt = tokens[..answer_start].to_vec();
    let mut targets = vec![NO_TARGET; tokens.len()];
    targets[answer_start - 1..tokens.len() - 1].copy_from_slice(&tokens[answer_start..]);
    let example = Sequence { tokens, targets, head: None };

    // HydraLoRA on the feed-forward projections: one A, four B, a router.
    let config = AdapterConfig {
        method: Method::Hydra,
        gate: GateKind::Router,
        rank: 4,
        heads: 4,
        alpha: 32.0,
        dropout: 0.0,
        targets: vec![Projection::Gate, Projection::Up, Projection::Down],
        labels: Vec::new(),
        ..AdapterConfig::default()
    };
    let adapter = Adapter::init(model.config(), config, 0)?;
    let adam = AdamW::default();
    let options = TrainOptions { keep: Keep::All, max_tokens: 256, clip: Some(1.0), adam, seed: 0 };
    let bytes = Trainer::plan_bytes(model.backend(), model.config(), &adapter.config, &options);
    println!("{} trainable parameters, {} MiB to train them", adapter.parameters(), bytes >> 20);
    let mut trainer = Trainer::new(&model, &adapter, options)?;
    for step in 1..=20 {
        let report = trainer.step(std::slice::from_ref(&example), 1e-3)?;
        println!("step {step:2}  loss {:.4}  gradient norm {:.3}", report.loss, report.grad_norm);
    }
    let adapter = trainer.adapter()?;
    adapter.save(Path::new(out))?;

    // Generation with a key-value cache, through the router.
    let mut generator = Generator::new(&model, Some(&adapter), 64)?;
    let mut sampler = Sampler::new(0.0, 1.0, 0)?;
    let mut next = sampler.sample(generator.feed(&prompt)?);
    let mut answer = Vec::new();
    while !model.config().eos.contains(&next) && answer.len() < 6 {
        answer.push(next);
        next = sampler.sample(generator.feed(&[next])?);
    }
    println!("{}", tokenizer.decode(&answer)?);
    Ok(())
}
