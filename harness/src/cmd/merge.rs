//! `hydra merge`: an adapter merged into its model's weights, as a Hugging Face folder; what `hydra export --format hf` writes.

use crate::export::SourceArgs;
use crate::options::Count;
use anyhow::Result;
use clap::{Args, ValueEnum};
use hydra_runtime::backend::Format;
use hydra_runtime::merge::MergeOptions;
use std::path::PathBuf;

/// Options of `merge`.
#[derive(Args)]
#[command(
    after_help = "A router's weights depend on the token, so an adapter with a router can't be merged exactly: --gate chooses an \
    approximation. The merged model is kept only if its logits agree with the unmerged model's under the same gate, up to \
    rounding: 1e-4 of the largest logit in f32, 5e-3 in f16, 4e-2 in bf16. Other formats: hydra export."
)]
pub struct Arguments {
    #[command(flatten)]
    source: SourceArgs,
    /// Folder for the merged model; must be new or empty
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: PathBuf,
    /// Data type of all tensors [default: each one's own; for a GGUF, bf16, or f32 or f16 if its matrices are]
    #[arg(long, value_enum, help_heading = "Output")]
    dtype: Option<Dtype>,
    /// Maximum size of a file of tensors
    #[arg(long, value_name = "MIB", default_value_t = Count::new(4096), help_heading = "Output")]
    shard_size: Count,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

/// Merges, checks, and keeps the result.
pub fn run(arguments: Arguments) -> Result<()> {
    let format = arguments.dtype.map(|dtype| match dtype {
        Dtype::F32 => Format::F32,
        Dtype::F16 => Format::F16,
        Dtype::Bf16 => Format::Bf16,
    });
    let max_shard_bytes = (arguments.shard_size.get() as u64).saturating_mul(1 << 20);
    arguments.source.open()?.folder(&arguments.out, MergeOptions { format, max_shard_bytes })
}
