//! `hydra info`: what a model or an adapter consists of, and how much memory training needs.

use crate::device::{DeviceArgs, on_device};
use crate::hub::locate;
use crate::memory::{self, mib};
use crate::output::{self, escaped};
use anyhow::{Result, bail};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use hydra_runtime::adapter::{Adapter, AdapterConfig, Contents, StoredTensor};
use hydra_runtime::backend::{AdamW, Backend};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::config::Architecture;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{ActivationCheckpointing, TrainOptions};
use std::path::{Path, PathBuf};

/// Options of `info`.
#[derive(Args)]
pub struct Arguments {
    /// A model (a folder, a GGUF file, or org/name on the Hugging Face hub), or an adapter's folder or GGUF file
    #[arg(value_name = "PATH", value_parser = NonEmptyStringValueParser::new())]
    path: String,
    /// An adapter whose parameters and memory to show as well, besides those of the default one
    #[arg(long, value_name = "DIR", help_heading = "Adapter")]
    adapter: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Device")]
    device: DeviceArgs,
}

/// Describes what is there.
pub fn run(arguments: Arguments) -> Result<()> {
    let path = locate(&arguments.path)?;
    let mut page = Page::default();
    if let Some(contents) = Contents::read(&path)? {
        if let Some(other) = &arguments.adapter {
            bail!("--adapter {} needs a model, and {} is an adapter", other.display(), path.display());
        }
        adapter(&mut page, &path, &contents);
    } else {
        let checkpoint = Checkpoint::open(&path)?;
        model(&mut page, &checkpoint);
        page.line("");
        training(&mut page, &checkpoint, "the default adapter", &AdapterConfig::default(), &arguments.device)?;
        if let Some(dir) = arguments.adapter {
            let adapter = Adapter::load(&dir, checkpoint.config())?;
            page.line("");
            training(&mut page, &checkpoint, &dir.display().to_string(), &adapter.config, &arguments.device)?;
            ranks(&mut page, &adapter);
        }
    }
    output::print(page.0)?;
    Ok(())
}

/// Names and values, a row each.
#[derive(Default)]
struct Page(String);

impl Page {
    fn row(&mut self, name: &str, value: impl std::fmt::Display) {
        self.line(format_args!("{name:<22} {}", escaped(&value.to_string())));
    }

    fn line(&mut self, text: impl std::fmt::Display) {
        self.0 += &format!("{text}\n");
    }
}

fn model(page: &mut Page, checkpoint: &Checkpoint) {
    let config = checkpoint.config();
    page.row("model", checkpoint.path().display());
    page.row("parameters", checkpoint.parameters());
    page.row("size", format!("{:.1} MiB", mib(checkpoint.bytes())));
    for (format, tensors, bytes) in checkpoint.formats() {
        page.row("", format!("{} in {tensors} tensors, {:.1} MiB", format.name(), mib(bytes)));
    }
    page.row("architecture", architecture(&config.architecture));
    page.row("layers", config.layers);
    page.row("width", config.d_model);
    page.row("feed-forward", config.d_ffn);
    page.row("heads", format!("{} of {}, {} key-value heads", config.n_heads, config.head_dim, config.kv_heads));
    page.row(
        "vocabulary",
        format!("{}{}", config.vocab, if config.tied { ", lm_head tied to the embedding" } else { "" }),
    );
    page.row("context", config.context);
    for projection in Projection::ALL {
        let (d_out, d_in) = projection.dims(config);
        page.row(projection.name(), format!("[{d_out}, {d_in}]"));
    }
}

/// The family, and what the model adds to plain LLaMA.
fn architecture(architecture: &Architecture) -> String {
    let Architecture { family, biases, head_norms, window } = architecture;
    let mut parts = vec![family.name().to_string()];
    let biased = [(biases.qkv, "q, k, v"), (biases.o, "o"), (biases.mlp, "gate, up, down")];
    let biased: Vec<_> = biased.iter().filter(|(has, _)| *has).map(|(_, names)| *names).collect();
    if !biased.is_empty() {
        parts.push(format!("biases on {}", biased.join(", ")));
    }
    if *head_norms {
        parts.push("a norm on each head of q and k".into());
    }
    if let Some(window) = window {
        let slides =
            || window.layers.iter().enumerate().filter(|(_, slides)| **slides).map(|(layer, _)| layer.to_string());
        let layers = match window.from_layer() {
            Some(0) => String::new(),
            Some(first) => format!(" from layer {first} on"),
            None => format!(" in layers {}", slides().collect::<Vec<_>>().join(", ")),
        };
        parts.push(format!("a sliding window of {} tokens{layers}", window.size));
    }
    parts.join("; ")
}

fn training(
    page: &mut Page,
    checkpoint: &Checkpoint,
    name: &str,
    adapter: &AdapterConfig,
    device: &DeviceArgs,
) -> Result<()> {
    let (trainable, frozen) = (adapter.parameters(checkpoint.config()), checkpoint.parameters());
    page.row("adapter", name);
    describe(page, adapter);
    page.row(
        "trainable",
        format!("{trainable} ({:.3} % of all)", 100.0 * trainable as f64 / (trainable + frozen) as f64),
    );
    on_device!(device, device => needed(page, &device, checkpoint, adapter))
}

fn needed<B: Backend>(page: &mut Page, device: &B, checkpoint: &Checkpoint, adapter: &AdapterConfig) -> Result<()> {
    if let Err(why) = device.trains() {
        page.row("memory to train", why.to_string());
        return Ok(());
    }
    for tokens in [512, 2048] {
        for (checkpointing, how) in
            [(ActivationCheckpointing::Off, ""), (ActivationCheckpointing::EveryLayer, ", --recompute")]
        {
            let options =
                TrainOptions { checkpointing, max_tokens: tokens, clip: Some(1.0), adam: AdamW::default(), seed: 0 };
            let training = memory::Training { adapter, options: &options, passes: 1, shared: false, eval_tokens: None };
            let bytes = memory::of_training(device, checkpoint.config(), &training)?;
            let what = format!("{:.1} MiB besides the weights, {tokens} tokens per pass{how}", mib(bytes));
            page.row("memory to train", what);
        }
    }
    Ok(())
}

fn describe(page: &mut Page, adapter: &AdapterConfig) {
    page.row("method", format!("{}, gate {}", adapter.method.name(), adapter.gate.name()));
    page.row("rank, heads", format!("{}, {}", adapter.rank, adapter.lora_heads));
    page.row("alpha, dropout", format!("{}, {}", adapter.alpha, adapter.dropout));
    page.row("targets", adapter.targets.iter().map(|p| p.name()).collect::<Vec<_>>().join(", "));
    if !adapter.labels.is_empty() {
        page.row("labels", adapter.labels.join(", "));
    }
}

/// Which projections have which rank, where it isn't one for all.
fn ranks(page: &mut Page, adapter: &Adapter) {
    let ranks = adapter.ranks();
    if ranks.keys().any(|&rank| rank != adapter.config.rank) {
        let places = |(&rank, places): (&usize, &usize)| match rank {
            0 => format!("none in {places}"),
            _ => format!("{rank} in {places}"),
        };
        let ranks: Vec<_> = ranks.iter().rev().map(places).collect();
        page.row("rank by projection", format!("{}; filled up with zeros, which stay zero", ranks.join(", ")));
    }
}

/// Describes an adapter without its model, from its files.
fn adapter(page: &mut Page, path: &Path, contents: &Contents) {
    page.row("adapter", path.display());
    for (key, value) in &contents.settings {
        page.row(&escaped(key), value);
    }
    let count = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    page.row("parameters", contents.tensors.iter().map(|tensor| count(&tensor.shape)).sum::<u64>());
    page.row("size", format!("{:.1} MiB", mib(contents.bytes)));
    for StoredTensor { name, format, shape } in &contents.tensors {
        page.line(format_args!("{} {format} {shape:?}", escaped(name)));
    }
}
