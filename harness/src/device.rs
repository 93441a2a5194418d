//! From the command line's device, precision and threads to a backend; and from `--model` to a checkpoint.

use crate::session::mib;
use anyhow::{Context, Result, bail};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hydra_runtime::backend::Backend;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
#[cfg(feature = "cuda")]
use hydra_runtime::backend::cuda::{Cuda, Gpu};
use hydra_runtime::checkpoint::Checkpoint;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Which model, on what.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// A Hugging Face folder, a GGUF file, a folder with one, or org/name on the Hugging Face hub
    #[arg(long, value_name = "PATH", value_parser = NonEmptyStringValueParser::new())]
    pub model: String,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Where and how precisely to compute.
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// Where to compute: cpu, or cuda:0 (cuda:1, ...) in a build with the feature `cuda`
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// What the large products are computed in; sums are f32 [default: f32; bf16 on cuda, which has no other]
    #[arg(long, value_enum)]
    pub precision: Option<PrecisionArg>,
    /// Threads; the results don't depend on them [default: one a core]
    #[arg(long, allow_negative_numbers = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// `--precision`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionArg {
    /// Exact to rounding
    F32,
    /// Operands rounded to bfloat16: faster where the CPU has it
    Bf16,
}

/// An opened device: see [`on_device`].
#[allow(clippy::large_enum_variant)] // one of them, taken apart at once
pub enum Device {
    /// `--device cpu`
    Cpu(Cpu),
    /// `--device cuda:N`
    #[cfg(feature = "cuda")]
    Cuda(Cuda<Gpu>),
}

/// Opens the device that `$arguments` (a [`DeviceArgs`]) name and does `$body` with it: compiled once for each backend.
macro_rules! on_device {
    ($arguments:expr, $device:ident => $body:expr) => {
        match $arguments.open()? {
            $crate::device::Device::Cpu($device) => $body,
            #[cfg(feature = "cuda")]
            $crate::device::Device::Cuda($device) => $body,
        }
    };
}
pub(crate) use on_device;

impl DeviceArgs {
    /// The precision that was asked for, or the device's own.
    pub fn precision(&self) -> PrecisionArg {
        self.precision.unwrap_or(if self.device == "cpu" { PrecisionArg::F32 } else { PrecisionArg::Bf16 })
    }

    /// As on a command line.
    pub fn words(&self) -> Vec<String> {
        let precision = format!("{:?}", self.precision()).to_lowercase();
        let words = ["--device", &self.device, "--precision", &precision].map(str::to_owned);
        let threads = self.threads.map(|threads| ["--threads".to_string(), threads.to_string()]);
        words.into_iter().chain(threads.into_iter().flatten()).collect()
    }

    /// The backend that was asked for.
    pub fn open(&self) -> Result<Device> {
        if self.device == "cpu" {
            let precision = match self.precision() {
                PrecisionArg::F32 => Precision::F32,
                PrecisionArg::Bf16 => Precision::Bf16,
            };
            let threads = self.threads.map(usize::from);
            return Ok(Device::Cpu(Cpu::new(CpuOptions { threads, precision, ..CpuOptions::default() })?));
        }
        let named = &self.device;
        let number = if named == "cuda" { Some("0") } else { named.strip_prefix("cuda:") };
        let Some(Ok(ordinal)) = number.map(str::parse::<u32>) else { bail!("--device {named}: wanted cpu, or cuda:0") };
        if self.precision() == PrecisionArg::F32 {
            bail!("--device {named} --precision f32: CUDA's products take bf16");
        }
        if self.threads.is_some() {
            bail!("--device {named} --threads: threads are the CPU's");
        }
        open_cuda(named, ordinal)
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(named: &str, ordinal: u32) -> Result<Device> {
    let gpu = Gpu::open(ordinal).with_context(|| format!("--device {named}"))?;
    Ok(Device::Cuda(Cuda::new(gpu)))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(named: &str, _ordinal: u32) -> Result<Device> {
    bail!("--device {named}: this build has only cpu; build it with --features cuda")
}

impl ModelArgs {
    /// Opens the model's files, which are fetched first if the name is a hub's.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(&locate(&self.model)?)?)
    }
}

/// Fails if `what` takes more memory than the device has free.
pub fn room_on<B: Backend>(backend: &B, bytes: u64, what: &str) -> Result<()> {
    match backend.free_bytes()? {
        Some(there) if bytes > there => {
            bail!("{what} takes {:.1} MiB, and {:.1} MiB of the device's memory are free", mib(bytes), mib(there))
        }
        Some(_) => Ok(()),
        None => room(bytes, what),
    }
}

/// Fails if `what` takes more memory than the system says there is; where it says nothing, all is well.
pub fn room(bytes: u64, what: &str) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let there = kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    if bytes > there {
        bail!("{what} takes {:.1} MiB, and {:.1} MiB of memory are free", mib(bytes), mib(there));
    }
    Ok(())
}

/// The local path of a model: itself, or where the hub's cache has it.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.exists() || !is_hub_name(model) {
        return Ok(path);
    }
    let advice = "no such folder, and the Hugging Face hub can't be asked; without a network, copy the model's folder \
                  (config.json, tokenizer.json, *.safetensors) here and give its path";
    from_hub(model).with_context(|| format!("--model {model}: {advice}"))
}

/// Where the hub's files are kept. (hf-hub's own way there panics where there is no home.)
fn hub_cache(hf_home: Option<String>, home: Option<PathBuf>) -> Result<PathBuf> {
    let folder = hf_home.map(PathBuf::from).or_else(|| Some(home?.join(".cache/huggingface")));
    Ok(folder.context("neither HF_HOME nor HOME says where to keep its files")?.join("hub"))
}

/// One slash, and what the hub allows in names.
fn is_hub_name(model: &str) -> bool {
    let part = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    model.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// Downloads what a checkpoint consists of into the hub's usual cache.
fn from_hub(model: &str) -> Result<PathBuf> {
    let cache = hub_cache(std::env::var("HF_HOME").ok(), std::env::home_dir())?;
    let mut builder = ApiBuilder::from_cache(Cache::new(cache));
    if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint);
    }
    let repo = builder.build()?.model(model.to_string());
    let listed: BTreeSet<String> = repo.info()?.siblings.into_iter().map(|file| file.rfilename).collect();
    let fetch = |repo: &ApiRepo, name: &str| repo.get(name).with_context(|| name.to_string());
    let config = fetch(&repo, "config.json")?;
    fetch(&repo, "tokenizer.json")?;
    for optional in ["tokenizer_config.json", "chat_template.jinja"] {
        if listed.contains(optional) {
            fetch(&repo, optional)?;
        }
    }
    let index = "model.safetensors.index.json";
    if listed.contains(index) {
        fetch(&repo, index)?;
        for shard in listed.iter().filter(|name| name.ends_with(".safetensors") && !name.contains('/')) {
            fetch(&repo, shard)?;
        }
    } else {
        fetch(&repo, "model.safetensors")?;
    }
    Ok(config.parent().unwrap_or(Path::new(".")).to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hub_has_a_place_or_an_error() {
        let cache =
            |hf_home: Option<&str>, home: Option<&str>| hub_cache(hf_home.map(Into::into), home.map(Into::into));
        assert_eq!(cache(Some("/hf"), None).unwrap(), Path::new("/hf/hub"));
        assert_eq!(cache(None, Some("/home/a")).unwrap(), Path::new("/home/a/.cache/huggingface/hub"));
        assert!(cache(None, None).unwrap_err().to_string().contains("HF_HOME"));
    }

    #[test]
    fn hub_names() {
        assert!(is_hub_name("HuggingFaceTB/SmolLM2-135M"));
        for path in ["model", "./model", "/a/b", "a/b/c", "../x", "a/", "a b/c"] {
            assert!(!is_hub_name(path), "{path}");
        }
    }
}
