//! `hydra generate`: text after a prompt.

use super::adapter::AdapterArgs;
use crate::data::encode::prompt_ids;
use crate::data::records::Record;
use crate::data::template::Template;
use crate::device::{ModelArgs, on_device};
use crate::options::{Count, Seed};
use crate::output;
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::backend::Backend;
use hydra_runtime::generate::{Generator, Sampler};
use hydra_runtime::model::Model;

/// Options of `generate`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten, next_help_heading = "Adapter")]
    adapter: AdapterArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Prompt")]
    prompt: String,
    /// Wrap the prompt in a template: plain, official, alpaca, chat, or a Jinja file [default: none]
    ///
    /// Use the template that the adapter was trained with; chat is the model's own chat template.
    #[arg(long, value_name = "NAME|FILE", help_heading = "Prompt")]
    template: Option<String>,
    /// Maximum number of tokens to generate
    #[arg(long, value_name = "N", default_value_t = Count::new(128), help_heading = "Sampling")]
    max_tokens: Count,
    /// Sampling temperature (0 = greedy)
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Sampling")]
    temperature: f32,
    /// Top-p (nucleus) sampling: draw from the likeliest tokens that together have probability P
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Sampling")]
    top_p: f32,
    /// Random seed of sampling
    #[arg(long, value_name = "SEED", default_value_t = Seed::new(0), help_heading = "Sampling")]
    seed: Seed,
}

/// Generates, and prints the text as it comes.
pub fn run(arguments: Arguments) -> Result<()> {
    let sampler = Sampler::new(arguments.temperature, arguments.top_p, arguments.seed.get())?;
    on_device!(arguments.model.device, device => run_on(device, arguments, sampler))
}

fn run_on<B: Backend>(device: B, arguments: Arguments, mut sampler: Sampler) -> Result<()> {
    let name = &arguments.model.model;
    let checkpoint = arguments.model.checkpoint()?;
    let config = checkpoint.config();
    let adapter = arguments.adapter.load(config)?;
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
        bail!("empty --prompt, and this model has no BOS token to start from");
    }
    if prompt.len() >= config.context {
        bail!("--prompt: expected fewer than {} tokens, the model's context, found {}", config.context, prompt.len());
    }
    let room = config.context.min(prompt.len().saturating_add(arguments.max_tokens.get()));
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
                let hint = if chats { "; it is a chat model: try --template chat" } else { "" };
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
