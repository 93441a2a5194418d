//! The forms in which things are written: each is made under a temporary name, read back, compared, and only then kept.

use super::check::limits;
use super::{Agreement, Prompts, Source, name};
use crate::memory::mib;
use crate::{interrupt, output};
use anyhow::{Context, Result};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::atomic::{NewFile, NewFolder};
use hydra_runtime::backend::Format;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::merge::{self, GgufOptions, MergeOptions, Merged};
use serde_json::{Value, json};
use std::path::Path;

/// What was merged, in the merged model's folder.
const MERGED: &str = "hydra_merge.json";
/// What was exported, in an adapter's folder.
const EXPORTED: &str = "hydra_export.json";

impl Source {
    /// The merged model as a Hugging Face folder.
    pub fn folder(&self, out: &Path, options: MergeOptions) -> Result<()> {
        let folder = NewFolder::begin(out).context("--out")?;
        interrupt::discard(folder.path())?;
        let written = merge::write(&self.checkpoint, &self.adapter, self.gate, folder.path(), options);
        let merged = output::named(written.map_err(Into::into), folder.path(), out)?;
        let prompts = Prompts::new(self)?;
        let found = prompts.compare(&Checkpoint::open(folder.path())?, None)?;
        found.require(&merged.formats).with_context(|| refused(out))?;
        let effect = prompts.effect()?;
        let mut facts = self.facts(&found, &effect);
        facts["dtype"] = names(&merged.formats).into();
        facts["tolerance"] = limits(&merged.formats).difference.into();
        let noted = output::write_json(&folder.path().join(MERGED), &facts);
        output::named(noted, folder.path(), out)?;
        folder.keep()?;
        report(out, &described(&merged), &found, &effect)
    }

    /// The merged model as a GGUF file.
    pub fn gguf(&self, out: &Path, format: Format) -> Result<()> {
        let file = NewFile::begin(out).context("--out")?;
        interrupt::discard(file.temporary())?;
        let description = self.description();
        let options = GgufOptions { format, description: description.as_deref() };
        let written = merge::write_gguf(&self.checkpoint, &self.adapter, self.gate, file.path(), options);
        let merged = output::named(written.map_err(Into::into), file.path(), out)?;
        let prompts = Prompts::new(self)?;
        let found = prompts.compare(&Checkpoint::open(file.path())?, None)?;
        found.require(&merged.formats).with_context(|| refused(out))?;
        let effect = prompts.effect()?;
        file.keep()?;
        report(out, &described(&merged), &found, &effect)
    }

    /// The adapter as a LoRA in a GGUF file.
    pub fn gguf_lora(&self, out: &Path) -> Result<()> {
        let file = NewFile::begin(out).context("--out")?;
        interrupt::discard(file.temporary())?;
        let (lora, config) = (self.adapter.as_lora(self.gate)?, self.checkpoint.config());
        let written = lora.save_gguf(file.path(), config, self.description().as_deref());
        output::named(written.map_err(Into::into), file.path(), out)?;
        let (found, effect) = self.check_adapter(out, file.path())?;
        file.keep()?;
        report(out, &lora_in_words(&lora), &found, &effect)
    }

    /// The adapter as a LoRA of HF PEFT's.
    pub fn peft(&self, out: &Path) -> Result<()> {
        let folder = NewFolder::begin(out).context("--out")?;
        interrupt::discard(folder.path())?;
        let lora = self.adapter.as_lora(self.gate)?;
        output::named(lora.save(folder.path()).map_err(Into::into), folder.path(), out)?;
        let (found, effect) = self.check_adapter(out, folder.path())?;
        let noted = output::write_json(&folder.path().join(EXPORTED), &self.facts(&found, &effect));
        output::named(noted, folder.path(), out)?;
        folder.keep()?;
        report(out, &lora_in_words(&lora), &found, &effect)
    }

    /// Reads back the adapter at `written` and compares it; the effect of the adapter comes second.
    fn check_adapter(&self, out: &Path, written: &Path) -> Result<(Agreement, Agreement)> {
        let lora = Adapter::load(written, self.checkpoint.config())?;
        let prompts = Prompts::new(self)?;
        let found = prompts.compare(&self.checkpoint, Some(&lora))?;
        found.require(&[Format::F32]).with_context(|| refused(out))?;
        Ok((found, prompts.effect()?))
    }

    /// What a file says of itself, if it is an approximation.
    fn description(&self) -> Option<String> {
        let note = self.approximation.as_ref()?;
        Some(format!("HydraLoRA under the fixed gate {}: {note}", name(self.gate)))
    }

    fn facts(&self, found: &Agreement, effect: &Agreement) -> Value {
        json!({
            "model": self.model, "adapter": self.path, "adapter_gate": self.adapter.config.gate.name(), "gate": name(self.gate),
            "approximation": self.approximation, "compared_tokens": found.tokens, "relative_difference": found.difference,
            "mean_kl": found.mean_kl, "largest_kl": found.largest_kl, "relative_effect": effect.difference,
        })
    }
}

fn refused(out: &Path) -> String {
    format!("--out {}", out.display())
}

fn names(formats: &[Format]) -> String {
    formats.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
}

fn described(merged: &Merged) -> String {
    let (formats, shards) = (names(&merged.formats), merged.shards);
    let files = if shards == 1 { "file" } else { "files" };
    format!("{formats}, {shards} {files}, {:.1} MiB", mib(merged.bytes))
}

fn lora_in_words(lora: &Adapter) -> String {
    format!("LoRA of rank {}, {:.1} MiB", lora.config.rank, mib(4 * lora.parameters()))
}

fn report(out: &Path, what: &str, found: &Agreement, effect: &Agreement) -> Result<()> {
    let Agreement { difference, mean_kl, largest_kl, tokens } = found;
    output::print(format_args!(
        "{}: {what}\n\
         beside the model with its adapter, on {tokens} tokens: largest difference of a logit {difference:.1e} of the largest logit; \
         KL {mean_kl:.1e} on average, {largest_kl:.1e} at most\n\
         the adapter itself: {:.1e}; {:.1e} and {:.1e}\n",
        out.display(),
        effect.difference,
        effect.mean_kl,
        effect.largest_kl,
    ))?;
    Ok(())
}
