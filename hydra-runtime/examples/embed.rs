//! The runtime inside another program: load a model, teach it one answer, save the adapter, attach it again, generate.
//!
//!     cargo run --release -p hydra-runtime --example embed -- MODEL ADAPTER_OUT
//!
//! MODEL is a Hugging Face folder or a GGUF file.

use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::{Generator, Sampler};
use hydra_runtime::model::Model;
use hydra_runtime::train::{ActivationCheckpointing, AdamW, TrainOptions, Trainer};
use std::path::Path;

const STEPS: usize = 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out] = arguments.as_slice() else { return Err("usage: embed MODEL ADAPTER_OUT".into()) };

    // The checkpoint is mapped, the weights stay in their own format.
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let tokenizer = checkpoint.tokenizer()?;
    let model = Model::load(Cpu::new(CpuOptions::default())?, &checkpoint)?;

    // One example: the loss is taken on the answer alone, and on the token that ends it.
    let mut prompt: Vec<u32> = tokenizer.bos_to_add().into_iter().collect();
    prompt.extend(tokenizer.encode("What has a heart of water and nine heads?\n")?);
    let mut answer = tokenizer.encode("A hydra.")?;
    answer.extend(tokenizer.eos());
    let example = [Sequence::answer(&prompt, &answer)];

    // HydraLoRA as published: one A, four B and a router on the feed-forward projections.
    let adapter = Adapter::init(model.config(), AdapterConfig { dropout: 0.0, ..AdapterConfig::default() }, 0)?;
    let adam = AdamW::default();
    let options =
        TrainOptions { checkpointing: ActivationCheckpointing::Off, max_tokens: 256, clip: Some(1.0), adam, seed: 0 };
    let bytes = Trainer::plan_bytes(model.backend(), model.config(), &adapter.config, &options)?;
    println!("{} trainable parameters, {} MiB to train them", adapter.parameters(), bytes >> 20);

    // A step is forward, loss, backward, clipping and AdamW; when to take one, on what and at which rate is the caller's.
    // (`Trainer::gradients` and `Trainer::set_adapter` leave the update to the caller, too.)
    let mut trainer = Trainer::new(&model, &adapter, options)?;
    for step in 0..STEPS {
        let lr = 2e-3 * (1.0 - step as f32 / STEPS as f32);
        let report = trainer.step(&example, lr)?;
        println!("step {:2}  loss {:.4}  gradient norm {:.3}", step + 1, report.loss, report.grad_norm);
    }
    trainer.adapter()?.save(Path::new(out))?;

    // Saved is attached again, wherever the model is.
    let adapter = Adapter::load(Path::new(out), model.config())?;
    for (name, adapter) in [("without", None), ("with", Some(&adapter))] {
        let loss = Evaluator::new(&model, adapter, 256)?.losses(&example)?[0];
        println!("{name} the adapter: {:.4} nats a token", loss.nll / loss.targets as f64);
    }

    // Generation with a key-value cache, through the router.
    let mut generator = Generator::new(&model, Some(&adapter), prompt.len() + 32)?;
    let mut sampler = Sampler::new(0.7, 0.95, 0)?;
    let ends = |id: u32| tokenizer.eos() == Some(id) || model.config().eos.contains(&id);
    let mut text = tokenizer.stream();
    let mut next = sampler.sample(generator.feed(&prompt)?)?;
    for _ in 0..32 {
        if ends(next) {
            break;
        }
        print!("{}", text.push(next)?);
        next = sampler.sample(generator.feed(&[next])?)?;
    }
    println!("{}", text.finish()?);
    Ok(())
}
