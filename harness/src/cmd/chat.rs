//! `hydra chat`: a conversation in a terminal.

use crate::chat::{Command, HELP, Input, Line, Session, Settings};
use crate::device::{ModelArgs, on_device};
use crate::options::Count;
use crate::report::file_name;
use crate::sampling::SamplingArgs;
use crate::{interrupt, memory, output};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::generate::Sampling;
use hydra_runtime::model::Model;
use hydra_runtime::serve::{Engine, EngineOptions};
use std::path::PathBuf;

/// Tokens of a prompt that one step takes: nothing else runs beside it, and Ctrl-C is looked for in between.
const PROMPT_TOKENS: usize = 512;

/// The temperature without `--temperature`.
const TEMPERATURE: f32 = 0.7;

/// Options of `chat`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter: its folder, or a LoRA in a GGUF file; may be given several times: the first one is used, /adapter changes it
    #[arg(long, value_name = "PATH", help_heading = "Adapters")]
    adapter: Vec<PathBuf>,
    /// System prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Prompt")]
    system: Option<String>,
    /// Maximum number of tokens of the conversation [default: the model's context]
    #[arg(long, value_name = "TOKENS", help_heading = "Prompt")]
    ctx: Option<Count>,
    /// Maximum number of tokens of an answer [default: what the context has room for]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    max_tokens: Option<Count>,
    #[command(flatten, next_help_heading = "Sampling")]
    sampling: SamplingArgs,
}

/// Talks until the input ends.
pub fn run(arguments: Arguments) -> Result<()> {
    // A wrong option is refused before a model is loaded.
    let sampling = arguments.sampling.or_temperature(TEMPERATURE)?;
    on_device!(arguments.model.device, device => run_on(device, arguments, sampling))
}

fn run_on<B: Backend>(device: B, arguments: Arguments, sampling: Sampling) -> Result<()> {
    let checkpoint = arguments.model.checkpoint()?;
    let config = checkpoint.config();
    let context = arguments.ctx.map_or(config.context, Count::get);
    if context < 2 || context > config.context {
        bail!("--ctx: expected a number from 2 to {}, the model's context, found {context}", config.context);
    }
    let engine =
        EngineOptions { slots: 1, context: Some(context), prompt_tokens: PROMPT_TOKENS, prefix_tokens: context };
    let bytes = Engine::plan_bytes(&device, config, &engine)?;
    memory::require_on(&device, bytes, &format!("a conversation of {context} tokens (--ctx)"))?;
    let mut read: Vec<(String, Adapter)> = Vec::new();
    for folder in &arguments.adapter {
        let folder = folder.display().to_string();
        let name = file_name(&folder);
        if read.iter().any(|(known, _)| *known == name) {
            bail!("--adapter {folder}: another adapter is called {name}, too; rename a folder");
        }
        let adapter = Adapter::load(&folder, config).context("--adapter")?;
        read.push((name, adapter));
    }
    let model = Model::load(device, &checkpoint)?;
    let attach = |(name, adapter): (String, Adapter)| Ok((name, model.attach(&adapter)?));
    let attached = read.into_iter().map(attach).collect::<Result<Vec<_>>>()?;
    let settings = Settings { max_tokens: arguments.max_tokens.map(Count::get), sampling };
    let mut session = Session::new(&model, attached, settings, engine)?;
    session.set_system(arguments.system.unwrap_or_default()).context("--system")?;
    talk(&mut session)
}

fn talk<B: Backend>(session: &mut Session<B>) -> Result<()> {
    let mut input = Input::open()?;
    let signals = interrupt::AnswerSignals::listen(!input.is_terminal())?;
    if input.is_terminal() {
        output::say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends");
    }
    if !session.has_template() {
        output::say("the model has no chat template: it continues your text");
    }
    loop {
        let line = match input.next()? {
            Line::Text(line) if line.trim().is_empty() => continue,
            Line::Text(line) => line,
            Line::Interrupted => {
                output::say("Ctrl-D or /quit ends");
                continue;
            }
            Line::End => return Ok(()),
        };
        let done = match line.starts_with('/') {
            false => signals.during(|stop| session.answer(line, stop)),
            true => match Command::parse(&line) {
                Ok(Command::Quit) => return Ok(()),
                Ok(command) => obey(session, command),
                Err(wrong) => Err(anyhow::anyhow!(wrong)),
            },
        };
        // A mistake ends a script, and not a conversation.
        match done {
            Err(error) if input.is_terminal() => output::say(format_args!("error: {error:#}")),
            done => done?,
        }
    }
}

fn obey<B: Backend>(session: &mut Session<B>, command: Command) -> Result<()> {
    match command {
        Command::Adapter(Some(name)) => session.choose(&name)?,
        Command::Adapter(None) => {
            let current = session.adapter().unwrap_or("none").to_owned();
            let mark = |name: &str| format!("{} {name}\n", if name == current { "*" } else { " " });
            let list: String = session.adapters().chain(["none"]).map(mark).collect();
            output::print(list)?;
        }
        Command::System(text) => session.set_system(text)?,
        Command::Router(place) => session.set_router(place),
        Command::Reset => session.reset(),
        Command::Save(path) => session.save(&path)?,
        Command::Help => {
            output::print(HELP)?;
        }
        Command::Quit => {}
    }
    Ok(())
}
