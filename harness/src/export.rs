//! What leaves this project: a merged model, or an adapter that other engines load. Each is checked before it is kept
//! (`export/check.rs`, `export/write.rs`).

mod check;
mod write;

pub use check::{Agreement, Prompts};

use crate::device::{MODEL_HELP, open_model, threads};
use crate::options::Count;
use crate::output;
use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::merge::MergeGate;
use std::path::PathBuf;

/// Which adapter, on which model, under which gate.
#[derive(Args)]
pub struct SourceArgs {
    #[arg(long, value_name = "PATH", help = MODEL_HELP, value_parser = NonEmptyStringValueParser::new(),
        help_heading = "Model")]
    model: String,
    /// Adapter: its folder, or a LoRA in a GGUF file
    #[arg(long, value_name = "PATH", help_heading = "Adapter")]
    adapter: PathBuf,
    /// Fixed gate: one (the only head), uniform (the mean of the heads), head:I (from 0) [default: the adapter's]
    #[arg(long, value_name = "GATE", value_parser = merge_gate, help_heading = "Adapter")]
    gate: Option<MergeGate>,
    /// Number of CPU threads of the check; doesn't change results [default: one per core]
    #[arg(long, value_name = "N", help_heading = "Device")]
    threads: Option<Count>,
}

/// A model, an adapter of it, and the gate under which the adapter is written.
pub struct Source {
    /// The model as it was named.
    pub model: String,
    /// The adapter's path.
    pub path: PathBuf,
    /// The model.
    pub checkpoint: Checkpoint,
    /// The adapter as it was trained.
    pub adapter: Adapter,
    /// The gate.
    pub gate: MergeGate,
    /// What is lost, if the adapter's own gate is another.
    pub approximation: Option<String>,
    threads: Option<usize>,
}

impl SourceArgs {
    /// Opens both, and says so if the gate makes it an approximation.
    pub fn open(self) -> Result<Source> {
        let checkpoint = open_model(&self.model)?;
        let adapter = Adapter::load(&self.adapter, checkpoint.config())?;
        let gate = match self.gate {
            Some(gate) => gate,
            None => own(&adapter.config).with_context(|| self.adapter.display().to_string())?,
        };
        // It also checks that the gate fits the adapter.
        adapter.with_fixed_gate(gate).with_context(|| self.adapter.display().to_string())?;
        let approximation = approximation(&adapter.config, gate);
        if let Some(note) = &approximation {
            output::say(format_args!("note: {note}"));
        }
        let threads = threads(self.threads)?;
        Ok(Source { model: self.model, path: self.adapter, checkpoint, adapter, gate, approximation, threads })
    }
}

fn merge_gate(text: &str) -> Result<MergeGate, String> {
    match (text, text.strip_prefix("head:").map(str::parse)) {
        ("one", _) => Ok(MergeGate::One),
        ("uniform", _) => Ok(MergeGate::Uniform),
        (_, Some(Ok(head))) => Ok(MergeGate::Head(head)),
        _ => Err("expected one, uniform or head:I".into()),
    }
}

/// The gate as `--gate` has it.
pub fn name(gate: MergeGate) -> String {
    match gate {
        MergeGate::One => "one".to_string(),
        MergeGate::Uniform => "uniform".to_string(),
        MergeGate::Head(head) => format!("head:{head}"),
    }
}

/// The adapter's own gate, if it doesn't depend on the token.
fn own(config: &AdapterConfig) -> Result<MergeGate> {
    match config.gate {
        _ if config.lora_heads == 1 => Ok(MergeGate::One),
        GateKind::One => Ok(MergeGate::One),
        GateKind::Uniform => Ok(MergeGate::Uniform),
        GateKind::Router => bail!(
            "its router weighs {} heads differently for every token, which one merged matrix can't; choose an approximation with \
             --gate uniform or head:I",
            config.lora_heads
        ),
        GateKind::Label => bail!(
            "its heads belong to labels; choose one with --gate head:I, or --gate uniform for what records with unknown labels get"
        ),
    }
}

/// A note on what is lost, if the adapter's own gate is another.
fn approximation(config: &AdapterConfig, gate: MergeGate) -> Option<String> {
    let exact = match (config.gate, gate) {
        _ if config.lora_heads == 1 => true,
        (GateKind::Uniform, gate) => gate == MergeGate::Uniform,
        (gate, _) => gate != GateKind::Router,
    };
    (!exact).then(|| match config.gate {
        GateKind::Router => {
            format!("an approximation: the adapter's router over {} heads is left out", config.lora_heads)
        }
        _ => "an approximation: the adapter was trained with the mean of its heads".to_string(),
    })
}
