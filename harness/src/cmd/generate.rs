//! `hydra generate`: text after a prompt.

use super::{adapter, positive, seed};
use crate::data::encode::prompt_ids;
use crate::data::records::Record;
use crate::data::template::Template;
use crate::device::{ModelArgs, on_device};
use crate::output;
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::backend::Backend;
use hydra_runtime::generate::{Generator, Sampler};
use hydra_runtime::model::Model;
use std::path::PathBuf;

/// Options of `generate`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// An adapter's folder
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The head of this label, of an adapter with the label gate [default: the mean of the heads]
    #[arg(long, value_name = "LABEL", requires = "adapter")]
    label: Option<String>,
    /// What to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Put the prompt into the template an adapter was trained with: plain, official, alpaca, chat, or a Jinja file
    #[arg(long)]
    template: Option<String>,
    /// The most tokens to write
    #[arg(long, allow_negative_numbers = true, value_name = "N", default_value_t = 128, value_parser = positive)]
    max_tokens: usize,
    /// 0 takes the likeliest token each time
    #[arg(long, allow_negative_numbers = true, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Draw from the likeliest tokens that have this share of the probability
    #[arg(long, allow_negative_numbers = true, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// The same seed draws the same text
    #[arg(long, allow_negative_numbers = true, value_name = "S", default_value_t = 0, value_parser = seed)]
    seed: u64,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    let sampler = Sampler::new(arguments.temperature, arguments.top_p, arguments.seed)?;
    on_device!(arguments.model.device, device => run_on(device, arguments, sampler))
}

fn run_on<B: Backend>(device: B, arguments: Arguments, mut sampler: Sampler) -> Result<()> {
    let name = &arguments.model.model;
    let checkpoint = arguments.model.checkpoint()?;
    let config = checkpoint.config();
    let adapter = adapter(arguments.adapter.as_deref(), arguments.label.as_deref(), config)?;
    let tokenizer = checkpoint.tokenizer()?;
    let prompt = match &arguments.template {
        None => prompt_ids(&tokenizer, &arguments.prompt)?,
        Some(template) => {
            let record = Record { instruction: arguments.prompt.clone(), ..Record::default() };
            let texts = Template::from_argument(template, &tokenizer)?.render(&record)?;
            let end = tokenizer.eos().filter(|_| texts.source_end);
            prompt_ids(&tokenizer, &texts.source)?.into_iter().chain(end).collect()
        }
    };
    if prompt.is_empty() {
        bail!("--prompt has no tokens, and the model no token to begin with");
    }
    if prompt.len() >= config.context {
        bail!("the prompt has {} tokens, the model's context {}", prompt.len(), config.context);
    }
    let room = config.context.min(prompt.len().saturating_add(arguments.max_tokens));
    let model = Model::load(device, &checkpoint)?;
    let mut generator = Generator::new(&model, adapter.as_ref(), room)?;
    let ends = |id: u32| tokenizer.eos() == Some(id) || config.eos.contains(&id);
    let mut text = tokenizer.stream();
    let mut draw = |logits: &[f32]| sampler.sample(logits).with_context(|| name.clone());
    let mut next = draw(generator.feed(&prompt)?)?;
    for written in prompt.len() + 1.. {
        if ends(next) {
            if written == prompt.len() + 1 {
                let chats = arguments.template.is_none() && Template::from_argument("chat", &tokenizer).is_ok();
                let hint =
                    if chats { "; it was trained on chats: --template chat puts the prompt into one" } else { "" };
                output::say(format_args!("{name} ends the text right after the prompt{hint}"));
            }
            break;
        }
        if !output::print(text.push(next)?)? {
            return Ok(());
        }
        if written == room {
            break;
        }
        next = draw(generator.feed(&[next])?)?;
    }
    output::print(text.finish()? + "\n")?;
    Ok(())
}
