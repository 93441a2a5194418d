//! `hydra merge`: an adapter merged into its model's weights, and checked before the result is kept.
//!
//! The check runs both models in f32 on [`TEXT`] and compares their logits: the largest difference over the largest logit. It
//! runs on the CPU, as the CUDA backend has no f32 products.

use crate::device::{MODEL_HELP, open_model, threads};
use crate::memory::mib;
use crate::options::Count;
use crate::{interrupt, output};
use anyhow::{Context, Result, bail};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind};
use hydra_runtime::atomic::NewFolder;
use hydra_runtime::backend::Format;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::merge::{self, MergeGate, MergeOptions, Merged};
use hydra_runtime::model::Model;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Options of `merge`.
#[derive(Args)]
#[command(
    after_help = "A router's weights depend on the token, so an adapter with a router can't be merged exactly: --gate chooses an \
    approximation. The merged model is kept only if its logits agree with the unmerged model's under the same gate, up to \
    rounding: 1e-4 of the largest logit in f32, 5e-3 in f16, 4e-2 in bf16."
)]
pub struct Arguments {
    #[arg(long, value_name = "PATH", help = MODEL_HELP, value_parser = NonEmptyStringValueParser::new(),
        help_heading = "Model")]
    model: String,
    /// Folder of the adapter to merge
    #[arg(long, value_name = "DIR", help_heading = "Adapter")]
    adapter: PathBuf,
    /// Gate to merge: one (the only head), uniform (the mean of the heads), head:I (from 0) [default: the adapter's]
    #[arg(long, value_name = "GATE", value_parser = merge_gate, help_heading = "Adapter")]
    gate: Option<MergeGate>,
    /// Folder for the merged model; must be new or empty
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: PathBuf,
    /// Data type of all tensors [default: each one's own; for a GGUF, bf16, or f32 or f16 if its matrices are]
    #[arg(long, value_enum, help_heading = "Output")]
    dtype: Option<Dtype>,
    /// Maximum size of a file of tensors
    #[arg(long, value_name = "MIB", default_value_t = Count::new(4096), help_heading = "Output")]
    shard_size: Count,
    /// Number of CPU threads of the check; doesn't change results [default: one per core]
    #[arg(long, value_name = "N", help_heading = "Device")]
    threads: Option<Count>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

impl From<Dtype> for Format {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::Bf16 => Format::Bf16,
        }
    }
}

/// What was merged, in the merged model's folder.
const FILE: &str = "hydra_merge.json";

/// The text that both models read: prose, code and arithmetic.
const TEXT: &str = "The lake of Lerna lies south of Argos. In it lived a water snake of nine heads; where one was cut off, two \
    grew in its place.\n\ndef mean(values):\n    return sum(values) / len(values)\n\nQuestion: A dozen eggs cost 3.60. What \
    do 5 eggs cost?\nAnswer: 3.60 / 12 = 0.30, and 5 * 0.30 = 1.50.";
/// The most tokens that are compared; the logits of all of them are in memory.
const TOKENS: usize = 96;

fn merge_gate(text: &str) -> Result<MergeGate, String> {
    match (text, text.strip_prefix("head:").map(str::parse)) {
        ("one", _) => Ok(MergeGate::One),
        ("uniform", _) => Ok(MergeGate::Uniform),
        (_, Some(Ok(head))) => Ok(MergeGate::Head(head)),
        _ => Err("expected one, uniform or head:I".into()),
    }
}

/// Merges, checks, and keeps the result.
pub fn run(arguments: Arguments) -> Result<()> {
    let checkpoint = open_model(&arguments.model)?;
    let adapter = Adapter::load(&arguments.adapter, checkpoint.config())?;
    let chosen = match arguments.gate {
        Some(gate) => gate,
        None => own(&adapter.config).with_context(|| arguments.adapter.display().to_string())?,
    };
    let (unmerged, head) = adapter.with_fixed_gate(chosen).with_context(|| arguments.adapter.display().to_string())?;
    let note = approximation(&adapter.config, chosen);
    if let Some(note) = &note {
        output::say(format_args!("note: {note}"));
    }
    let format = arguments.dtype.map(Format::from);
    let options = MergeOptions { format, max_shard_bytes: (arguments.shard_size.get() as u64).saturating_mul(1 << 20) };
    let folder = NewFolder::begin(&arguments.out).context("--out")?;
    interrupt::discard(folder.path())?;
    let merged = merge::write(&checkpoint, &adapter, chosen, folder.path(), options)?;
    let formats = merged.formats.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ");
    let (tolerance, out) = (tolerance(&merged), arguments.out.display());
    let check = compare(&arguments, &checkpoint, (&unmerged, head), folder.path())?;
    let Check { difference, effect, tokens } = check;
    // Not a number is not a small difference either.
    if difference.is_nan() || difference > tolerance {
        bail!(
            "--out {out}: not kept, as the merged model's logits differ from the unmerged model's by {difference:.1e} of the largest \
             logit: expected at most {tolerance:.0e} in {formats}"
        );
    }
    let facts = json!({
        "model": arguments.model, "adapter": arguments.adapter, "adapter_gate": adapter.config.gate.name(),
        "gate": name(chosen), "approximation": note, "dtype": formats, "compared_tokens": tokens,
        "relative_difference": difference, "tolerance": tolerance, "relative_effect": effect,
    });
    output::write_json(&folder.path().join(FILE), &facts)?;
    folder.keep()?;
    let (shards, files) = (merged.shards, if merged.shards == 1 { "file" } else { "files" });
    output::print(format_args!(
        "{out}: {formats}, {shards} {files}, {:.1} MiB\n\
         largest difference of a logit from the unmerged model's, relative to the largest logit: {difference:.1e} on {tokens} tokens \
         (at most {tolerance:.0e} allowed); the adapter itself changes them by {effect:.1e}\n",
        mib(merged.bytes),
    ))?;
    Ok(())
}

/// The gate as `--gate` has it.
fn name(gate: MergeGate) -> String {
    match gate {
        MergeGate::One => "one".to_string(),
        MergeGate::Uniform => "uniform".to_string(),
        MergeGate::Head(head) => format!("head:{head}"),
    }
}

/// How far rounding to the written type may move a logit, as a share of the largest.
fn tolerance(merged: &Merged) -> f64 {
    let of = |format: &Format| match format.name() {
        "F32" => 1e-4,
        "F16" => 5e-3,
        _ => 4e-2,
    };
    merged.formats.iter().map(of).fold(0.0, f64::max)
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

struct Check {
    /// Difference of the merged from the unmerged model.
    difference: f64,
    /// Difference that the adapter makes to the unmerged model.
    effect: f64,
    tokens: usize,
}

fn compare(
    arguments: &Arguments,
    checkpoint: &Checkpoint,
    (adapter, head): (&Adapter, Option<u32>),
    folder: &Path,
) -> Result<Check> {
    let threads = threads(arguments.threads)?;
    let cpu = || Cpu::new(CpuOptions { threads, precision: Precision::F32, ..CpuOptions::default() });
    let merged = Checkpoint::open(folder)?;
    let mut ids = checkpoint.tokenizer()?.encode_prompt(TEXT)?;
    if merged.tokenizer()?.encode_prompt(TEXT)? != ids {
        bail!("the merged model's tokenizer gives other token ids than that of {}", arguments.model);
    }
    ids.truncate(TOKENS.min(checkpoint.config().context));
    let sequence = Sequence { lora_head: head, ..Sequence::prompt(&ids) };
    let logits = |checkpoint: &Checkpoint, adapter: Option<&Adapter>| -> Result<Vec<f32>> {
        let model = Model::load(cpu()?, checkpoint)?;
        Ok(Evaluator::new(&model, adapter, ids.len())?.logits(&sequence)?)
    };
    let want = logits(checkpoint, Some(adapter))?;
    let difference = relative_difference(&logits(&merged, None)?, &want);
    let effect = relative_difference(&logits(checkpoint, None)?, &want);
    Ok(Check { difference, effect, tokens: ids.len() })
}

/// The largest |got − want| over the largest |want|; NaN if one of the values is.
fn relative_difference(got: &[f32], want: &[f32]) -> f64 {
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(0.0, |max: f64, x| if x.is_nan() || max.is_nan() { f64::NAN } else { max.max(x) })
    };
    let difference = largest(&mut got.iter().zip(want).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs()));
    difference / largest(&mut want.iter().map(|&x| f64::from(x).abs()))
}
