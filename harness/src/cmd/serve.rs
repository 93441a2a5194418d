//! `hydra serve`: a model and its adapters over HTTP.

use crate::device::{ModelArgs, on_device};
use crate::memory;
use crate::options::{Count, Usage, whole};
use crate::serve::{self, Key, Limits, MOST_ADAPTERS, Options};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use hydra_runtime::serve::{Engine, EngineOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tracing::level_filters::LevelFilter;

/// The most bytes in a MiB's worth of body that can be asked for.
const MOST_BODY_MIB: usize = 1024;

/// Options of `serve`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Name of the model in requests [default: the name of its file or folder]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    model_name: Option<String>,
    /// Adapter, a folder or a LoRA in a GGUF file, and its name in requests; may be given several times [default name: that of its
    /// folder or file]
    #[arg(long, value_name = "[NAME=]PATH", value_parser = named_adapter, help_heading = "Adapters")]
    adapter: Vec<(String, PathBuf)>,
    /// Folder from which requests may load adapters while the server runs [default: they may not]
    #[arg(long, value_name = "DIR", help_heading = "Adapters")]
    adapter_dir: Option<PathBuf>,
    /// Address to listen on; 127.0.0.1 is reached from this machine only
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Network")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080, help_heading = "Network")]
    port: u16,
    /// File whose first line is a key that requests have to show: "Authorization: Bearer KEY"
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    api_key_file: Option<PathBuf>,
    /// Another host name under which the server is reached, as behind a proxy; may be given several times
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    allow_host: Vec<String>,
    /// Sequences that are generated at once
    #[arg(long, value_name = "N", default_value_t = Count::new(8), help_heading = "Limits")]
    parallel: Count,
    /// Sequences that may wait; beyond them requests are answered with 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = whole, help_heading = "Limits")]
    queue: usize,
    /// Maximum number of tokens of a request, prompt and answer [default: the model's context]
    #[arg(long, value_name = "TOKENS", help_heading = "Limits")]
    ctx: Option<Count>,
    /// Tokens of prompts that one step takes beside the running generations
    #[arg(long, value_name = "TOKENS", default_value_t = Count::new(256), help_heading = "Limits")]
    prompt_tokens: Count,
    /// Tokens of prompts that are kept for requests that begin in the same way (0 = none) [default: those of one request]
    #[arg(long, value_name = "TOKENS", value_parser = whole, help_heading = "Limits")]
    prefix_tokens: Option<usize>,
    /// Maximum size of a request's body
    #[arg(long, value_name = "MIB", default_value_t = Count::new(4), help_heading = "Limits")]
    max_body: Count,
    /// Maximum time of a request
    #[arg(long, value_name = "SECONDS", default_value_t = Count::new(600), help_heading = "Limits")]
    timeout: Count,
    /// Time for requests that are being answered when the server is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = Count::new(30), help_heading = "Limits")]
    drain: Count,
    /// What the log on stderr shows
    #[arg(long, value_enum, default_value_t = Log::Warn, help_heading = "Log")]
    log: Log,
    /// Show prompts in the log, too
    #[arg(long, help_heading = "Log")]
    log_prompts: bool,
}

/// `--log`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Log {
    /// Errors
    Error,
    /// And what may be wrong
    Warn,
    /// And each request
    Info,
    /// And each connection's end
    Debug,
}

/// An adapter's name and path.
fn named_adapter(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = match text.split_once('=') {
        Some((name, path)) => (name.to_string(), Path::new(path)),
        None => (own_name(Path::new(text)), Path::new(text)),
    };
    if path.as_os_str().is_empty() || serve::check_name(&name).is_err() {
        return Err("expected PATH or NAME=PATH, with a name of letters, digits and -_.:/@+".into());
    }
    Ok((name, path.into()))
}

/// Serves.
pub fn run(arguments: Arguments) -> Result<()> {
    if arguments.max_body.get() > MOST_BODY_MIB {
        return Err(Usage(format!("--max-body: expected at most {MOST_BODY_MIB}, found {}", arguments.max_body)).into());
    }
    if arguments.adapter.len() > MOST_ADAPTERS {
        return Err(
            Usage(format!("--adapter: expected at most {MOST_ADAPTERS}, found {}", arguments.adapter.len())).into()
        );
    }
    let level = match (arguments.log, arguments.log_prompts) {
        (Log::Debug, _) => LevelFilter::DEBUG,
        (Log::Info, _) | (_, true) => LevelFilter::INFO,
        (Log::Warn, _) => LevelFilter::WARN,
        (Log::Error, _) => LevelFilter::ERROR,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).init();
    on_device!(arguments.model.device, device => run_on(device, arguments))
}

fn run_on<B: Backend>(device: B, arguments: Arguments) -> Result<()> {
    let key = arguments.api_key_file.as_deref().map(Key::read).transpose()?;
    let checkpoint = arguments.model.checkpoint()?;
    let config = checkpoint.config();
    let name = match arguments.model_name {
        Some(name) => name,
        None => own_name(checkpoint.path()),
    };
    if let Err(error) = serve::check_name(&name) {
        bail!("--model-name: {}", error.message.trim_start_matches("lora_name: "));
    }
    let context = arguments.ctx.map(Count::get);
    if let Some(context) = context.filter(|&context| context < 2 || context > config.context) {
        bail!("--ctx: expected a number from 2 to {}, the model's context, found {context}", config.context);
    }
    let read = |(name, folder): (String, PathBuf)| {
        let adapter = Adapter::load(&folder, config).with_context(|| format!("--adapter {name}"));
        Ok((name, adapter?))
    };
    let adapters = arguments.adapter.into_iter().map(read).collect::<Result<Vec<_>>>()?;
    let (slots, seconds) = (arguments.parallel.get(), |count: Count| Duration::from_secs(count.get() as u64));
    let engine = EngineOptions {
        slots,
        context,
        prompt_tokens: arguments.prompt_tokens.get(),
        prefix_tokens: arguments.prefix_tokens.unwrap_or(context.unwrap_or(config.context)),
    };
    let asked = || format!("--parallel {slots} and --prompt-tokens {}", engine.prompt_tokens);
    let bytes = Engine::plan_bytes(&device, config, &engine).with_context(asked)?;
    memory::require_on(&device, bytes, &format!("--parallel {slots} (choose less, or a smaller --ctx)"))?;
    let limits = Limits {
        sequences: slots.saturating_add(arguments.queue).min(tokio::sync::Semaphore::MAX_PERMITS),
        body: arguments.max_body.get() << 20,
        time: seconds(arguments.timeout),
    };
    let options = Options {
        host: arguments.host,
        port: arguments.port,
        name,
        key,
        hosts: arguments.allow_host,
        adapter_dir: arguments.adapter_dir,
        engine,
        limits,
        drain: seconds(arguments.drain),
        log_prompts: arguments.log_prompts,
    };
    serve::run(Model::load(device, &checkpoint)?, adapters, options)
}

/// The name of a model's or an adapter's file or folder, without what can't be part of a name.
fn own_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.into());
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let name = name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let kept: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    if kept.is_empty() { "model".into() } else { kept }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_names() {
        assert_eq!(named_adapter("a/b=x=y").unwrap(), ("a/b".into(), "x=y".into()));
        assert_eq!(named_adapter("runs/my run").unwrap(), ("my-run".into(), "runs/my run".into()));
        assert_eq!(named_adapter("runs/lora.gguf").unwrap(), ("lora".into(), "runs/lora.gguf".into()));
        for wrong in ["=run", "a=", "a b=run", ""] {
            assert!(named_adapter(wrong).unwrap_err().starts_with("expected PATH or NAME=PATH"), "{wrong:?}");
        }
    }

    #[test]
    fn models_are_called_like_their_files() {
        assert_eq!(own_name(Path::new("/models/SmolLM2-135M.Q4_1.gguf")), "SmolLM2-135M.Q4_1");
        assert_eq!(own_name(Path::new("/models/my model")), "my model".replace(' ', "-"));
    }
}
