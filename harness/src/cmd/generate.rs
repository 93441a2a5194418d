//! `hydra generate`: text after a prompt.

use super::adapter::AdapterArgs;
use crate::data::options::EncodingArgs;
use crate::data::template::Template;
use crate::device::{ModelArgs, on_device};
use crate::options::Count;
use crate::output;
use crate::sampling::SamplingArgs;
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::backend::Backend;
use hydra_runtime::generate::{Finish, Sampling, StopStrings};
use hydra_runtime::model::Model;
use std::path::PathBuf;

/// Options of `generate`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten, next_help_heading = "Adapter")]
    adapter: AdapterArgs,
    /// Text to continue
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        required_unless_present = "prompt_file",
        help_heading = "Prompt"
    )]
    prompt: Option<String>,
    /// File with the text to continue, but for its last line break; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt", help_heading = "Prompt")]
    prompt_file: Option<PathBuf>,
    /// Wrap the prompt in a template: plain, official, alpaca, chat, or a Jinja file [default: none]
    ///
    /// Use the template that the adapter was trained with; chat is the model's own chat template.
    #[arg(long, value_name = "NAME|FILE", help_heading = "Prompt")]
    template: Option<String>,
    /// Jinja file in place of the model's own chat template, for --template chat
    #[arg(long, value_name = "FILE", requires = "template", help_heading = "Prompt")]
    chat_template: Option<PathBuf>,
    /// Maximum number of tokens to generate
    #[arg(long, value_name = "N", default_value_t = Count::new(128), help_heading = "Sampling")]
    max_tokens: Count,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Sampling")]
    stop: Vec<String>,
    #[command(flatten, next_help_heading = "Sampling")]
    sampling: SamplingArgs,
}

impl Arguments {
    /// The text to continue, and the option that it came by.
    fn prompt(&self) -> Result<(String, String)> {
        let Some(file) = &self.prompt_file else {
            return Ok((self.prompt.clone().unwrap_or_default(), "--prompt".into()));
        };
        let option = format!("--prompt-file {}", file.display());
        let text = match file.as_os_str() == "-" {
            true => std::io::read_to_string(std::io::stdin()),
            false => std::fs::read_to_string(file),
        };
        let mut text = text.with_context(|| option.clone())?;
        if text.ends_with('\n') {
            text.pop();
        }
        Ok((text, option))
    }
}

/// Generates, and prints the text as it comes.
pub fn run(arguments: Arguments) -> Result<()> {
    // A wrong option is refused before a model is loaded.
    let sampling = arguments.sampling.or_temperature(0.0)?;
    StopStrings::new(arguments.stop.clone()).context("--stop")?;
    let prompt = arguments.prompt()?;
    on_device!(arguments.model.device, device => run_on(device, arguments, sampling, prompt))
}

fn run_on<B: Backend>(
    device: B,
    arguments: Arguments,
    sampling: Sampling,
    (asked, option): (String, String),
) -> Result<()> {
    let name = &arguments.model.model;
    let checkpoint = arguments.model.checkpoint()?;
    let config = checkpoint.config();
    let adapter = arguments.adapter.load(config)?;
    let model = Model::load(device, &checkpoint)?;
    let tokenizer = model.tokenizer()?;
    let prompt: Vec<u32> = match &arguments.template {
        None => tokenizer.encode_prompt(&asked)?,
        Some(template) => {
            let (template, chat_template) = (Some(template.clone()), arguments.chat_template.clone());
            let options = EncodingArgs { template, chat_template, ..EncodingArgs::default() };
            Template::new(&options, tokenizer)?.prompt(&asked)?
        }
    };
    if prompt.is_empty() {
        bail!("empty {option}, and this model has no BOS token to start from");
    }
    if prompt.len() >= config.context {
        bail!("{option}: expected fewer than {} tokens, the model's context, found {}", config.context, prompt.len());
    }
    let mut generate = model.generate(prompt).max_tokens(arguments.max_tokens.get()).sampling(sampling);
    generate = arguments.stop.into_iter().fold(generate, |generate, text| generate.stop(text));
    if let Some(adapter) = &adapter {
        generate = generate.adapter(&model.attach(adapter)?);
    }
    let mut text = generate.stream()?;
    for piece in text.by_ref() {
        if !output::print(piece.with_context(|| name.clone())?)? {
            return Ok(());
        }
    }
    if text.tokens().is_empty() && text.finish() == Some(Finish::EndOfText) {
        let chats = arguments.template.is_none() && tokenizer.chat_template().is_some();
        let hint = if chats { "; it is a chat model: try --template chat" } else { "" };
        output::say(format_args!("{name} ends the text right after the prompt{hint}"));
    }
    output::print("\n")?;
    Ok(())
}
