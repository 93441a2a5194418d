//! The runtime inside another program: open a model, teach it one answer, save the adapter, attach it and generate.
//!
//!     cargo run --release -p hydra-runtime --example embed -- MODEL ADAPTER_OUT
//!
//! MODEL is a Hugging Face folder or a GGUF file.

use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::batch::Sequence;
use hydra_runtime::model::Model;
use hydra_runtime::train::{TrainOptions, Trainer};

const STEPS: usize = 20;
const QUESTION: &str = "What has a heart of water and nine heads?\n";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out] = arguments.as_slice() else { return Err("usage: embed MODEL ADAPTER_OUT".into()) };

    // The files are mapped; the weights stay in their own format.
    let model = Model::open(model)?;
    let tokenizer = model.tokenizer()?;

    // One example: the loss is taken on the answer alone, and on the token that ends it.
    let mut answer = tokenizer.encode("A hydra.")?;
    answer.extend(tokenizer.eos());
    let example = [Sequence::answer(&tokenizer.encode_prompt(QUESTION)?, &answer)];

    // HydraLoRA as published: one A, four B and a router on the feed-forward projections.
    let config = AdapterConfig { dropout: 0.0, ..AdapterConfig::default() };
    let adapter = Adapter::init(model.config(), config, 0)?;
    let mut trainer = Trainer::new(&model, &adapter, TrainOptions { max_tokens: 256, ..TrainOptions::default() })?;

    // A step is forward, loss, backward, clipping and AdamW. (`Trainer::gradients` leaves the update to you.)
    for step in 0..STEPS {
        let report = trainer.step(&example, 2e-3 * (1.0 - step as f32 / STEPS as f32))?;
        println!("step {:2}  loss {:.4}  gradient norm {:.3}", step + 1, report.loss, report.grad_norm);
    }
    trainer.adapter()?.save(out)?;

    let adapter = model.load_adapter(out)?;
    for text in model.generate(QUESTION).adapter(&adapter).max_tokens(32).stop("\n").stream()? {
        print!("{}", text?);
    }
    println!();
    Ok(())
}
