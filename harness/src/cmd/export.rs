//! `hydra export`: an adapter, or a model with it merged in, for other engines.

use crate::export::SourceArgs;
use crate::options::{Count, Usage};
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use hydra_runtime::backend::Format;
use hydra_runtime::merge::MergeOptions;
use std::path::PathBuf;

/// Options of `export`.
#[derive(Args)]
#[command(
    after_help = "Other engines know no router, whose weights depend on the token. An adapter with a router is refused unless --gate \
    chooses an approximation, and the result says that it is one. What is written is read back and compared with the model and its \
    adapter under the same gate; it is kept only if they agree up to the rounding of its format."
)]
pub struct Arguments {
    #[command(flatten)]
    source: SourceArgs,
    /// What to write
    #[arg(long, value_enum, help_heading = "Output")]
    format: Kind,
    /// A new file (gguf, gguf-lora), or a folder that is new or empty (hf, peft)
    #[arg(long, value_name = "PATH", help_heading = "Output")]
    out: PathBuf,
    /// Data type of matrices: gguf any [default: q8_0]; hf f32, f16 or bf16 [default: each one's own, bf16 for a GGUF]
    #[arg(long, value_enum, help_heading = "Output")]
    dtype: Option<Dtype>,
    /// Maximum size of a file of tensors, for hf
    #[arg(long, value_name = "MIB", default_value_t = Count::new(4096), help_heading = "Output")]
    shard_size: Count,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A LoRA for HF PEFT: a folder that `PeftModel.from_pretrained` takes
    Peft,
    /// A LoRA for llama.cpp: a file for its `--lora`
    GgufLora,
    /// The model with the adapter merged into it, for llama.cpp
    Gguf,
    /// The model with the adapter merged into it, for transformers and vLLM; as `hydra merge` writes it
    Hf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q5_0")]
    Q5_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k")]
    Q4K,
}

impl From<Dtype> for Format {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
            Dtype::Q8_0 => Self::Q8_0,
            Dtype::Q5_0 => Self::Q5_0,
            Dtype::Q4_0 => Self::Q4_0,
            Dtype::Q4K => Self::Q4K,
        }
    }
}

/// Writes it, checks it, and keeps it.
pub fn run(arguments: Arguments) -> Result<()> {
    let Arguments { source, format: kind, out, dtype, shard_size } = arguments;
    let format = dtype.map(Format::from);
    if format.is_some() && matches!(kind, Kind::Peft | Kind::GgufLora) {
        bail!(Usage("--dtype: adapters are written in f32; it is for --format gguf and hf".into()));
    }
    if kind == Kind::Hf && format.is_some_and(|format| format.block_len() > 1) {
        bail!(Usage("--dtype: --format hf takes f32, f16 or bf16; block formats are for --format gguf".into()));
    }
    let source = source.open()?;
    match kind {
        Kind::Peft => source.peft(&out),
        Kind::GgufLora => source.gguf_lora(&out),
        Kind::Gguf => source.gguf(&out, format.unwrap_or(Format::Q8_0)),
        Kind::Hf => {
            let max_shard_bytes = (shard_size.get() as u64).saturating_mul(1 << 20);
            source.folder(&out, MergeOptions { format, max_shard_bytes })
        }
    }
}
