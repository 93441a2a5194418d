//! `--adapter` and `--label`: an adapter, or one of its heads.

use crate::output;
use anyhow::{Result, bail};
use clap::Args;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind};
use hydra_runtime::config::Config;
use std::path::{Path, PathBuf};

/// Which adapter to attach to the model.
#[derive(Args)]
pub struct AdapterArgs {
    /// Adapter: its folder, or a LoRA in a GGUF file [default: the model alone]
    #[arg(long, value_name = "PATH")]
    adapter: Option<PathBuf>,
    /// Under the adapter's label gate: use this label's head [default: the mean of the heads]
    ///
    /// `eval mmlu` without it uses a subject's head if the subject is named like a label.
    #[arg(long, value_name = "LABEL", requires = "adapter")]
    label: Option<String>,
}

impl AdapterArgs {
    /// The adapter's folder, if one was given.
    pub fn folder(&self) -> Option<&Path> {
        self.adapter.as_deref()
    }

    /// The adapter for a model, if one was given.
    pub fn load(&self, model: &Config) -> Result<Option<Adapter>> {
        let Some(dir) = &self.adapter else { return Ok(None) };
        let adapter = Adapter::load(dir, model)?;
        let Some(label) = &self.label else { return Ok(Some(adapter)) };
        let AdapterConfig { gate, labels, .. } = &adapter.config;
        if *gate != GateKind::Label {
            bail!("--label {label} needs an adapter with the label gate; that of {} is {}", dir.display(), gate.name());
        }
        match labels.iter().position(|known| known == label) {
            Some(head) => Ok(Some(adapter.head(head)?)),
            None => {
                let known = output::printable(&labels.join(", "));
                bail!("--label: expected one of {known}, the labels of {}, found {label:?}", dir.display())
            }
        }
    }
}
