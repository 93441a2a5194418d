//! From `--device`, `--precision` and `--threads` to a backend; from `--model` to a checkpoint.

use crate::hub::locate;
use crate::options::{Count, Usage};
use crate::ranks::on_this_machine;
#[cfg(feature = "cuda")]
use anyhow::Context;
use anyhow::{Result, bail};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
#[cfg(feature = "cuda")]
use hydra_runtime::backend::cuda::{Cuda, Gpu};
use hydra_runtime::checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};

/// The help of every `--model`.
pub const MODEL_HELP: &str = "Hugging Face folder, GGUF file or a folder with one, or org/name on the Hugging Face hub";

/// Which model to run, and where.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    #[allow(missing_docs)]
    #[arg(long, value_name = "PATH", help = MODEL_HELP, value_parser = NonEmptyStringValueParser::new(),
        help_heading = "Model")]
    pub model: String,
    #[allow(missing_docs)]
    #[command(flatten, next_help_heading = "Device")]
    pub device: DeviceArgs,
}

/// Where and how precisely to compute.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DeviceArgs {
    /// Where to compute: cpu, or cuda:N in a build with the feature `cuda`; cuda:auto is a GPU for each MPI rank of a
    /// machine [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Precision of matrix products' operands; sums are f32 [default: f32; bf16 on CUDA]
    #[arg(long, value_enum)]
    pub precision: Option<PrecisionArg>,
    /// Number of CPU threads; doesn't change results [default: one per core, shared among the MPI ranks of a machine]
    #[arg(long, value_name = "N")]
    pub threads: Option<Count>,
}

/// `--precision`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionArg {
    /// Exact to rounding
    F32,
    /// Operands rounded to bfloat16: faster where the CPU has instructions for it
    Bf16,
    /// Activations in eight bits beside weights in GGUF's block formats, other products in f32; for evaluation and
    /// generation on the CPU
    Q8,
}

impl PrecisionArg {
    fn of_cpu(self) -> Precision {
        match self {
            PrecisionArg::F32 => Precision::F32,
            PrecisionArg::Bf16 => Precision::Bf16,
            PrecisionArg::Q8 => Precision::Q8,
        }
    }
}

/// The most threads that can be asked for.
const MOST_THREADS: usize = 1024;

/// An opened device: see [`on_device`].
#[allow(clippy::large_enum_variant)] // one of them, taken apart at once
pub enum Device {
    /// `--device cpu`
    Cpu(Cpu),
    /// `--device cuda:N`
    #[cfg(feature = "cuda")]
    Cuda(Cuda<Gpu>),
}

/// Opens the device that `$arguments` (a [`DeviceArgs`]) name, on all of `$ranks` if there are several, and does
/// `$body` with it: compiled once for each backend.
macro_rules! on_device {
    ($arguments:expr, $device:ident => $body:expr) => {
        $crate::device::on_device!($arguments, $crate::ranks::Ranks::alone(), $device => $body)
    };
    ($arguments:expr, $ranks:expr, $device:ident => $body:expr) => {
        match $ranks.agree($arguments.open())? {
            $crate::device::Device::Cpu($device) => $body,
            #[cfg(feature = "cuda")]
            $crate::device::Device::Cuda($device) => $body,
        }
    };
}
pub(crate) use on_device;

impl DeviceArgs {
    /// The device, as it was named.
    pub fn name(&self) -> &str {
        self.device.as_deref().unwrap_or("cpu")
    }

    /// The precision that was asked for, or the device's own.
    pub fn precision(&self) -> PrecisionArg {
        self.precision.unwrap_or(if self.name() == "cpu" { PrecisionArg::F32 } else { PrecisionArg::Bf16 })
    }

    /// The backend that was asked for.
    pub fn open(&self) -> Result<Device> {
        let device = self.name();
        if device == "cpu" {
            let precision = self.precision().of_cpu();
            let threads = threads(self.threads)?.or_else(threads_of_rank);
            return Ok(Device::Cpu(Cpu::new(CpuOptions { threads, precision, ..CpuOptions::default() })?));
        }
        let number = if device == "cuda" { Some("0") } else { device.strip_prefix("cuda:") };
        let ordinal = match number {
            Some("auto") => Some(on_this_machine().0 as u32),
            number => number.and_then(|number| number.parse().ok()),
        };
        let Some(ordinal) = ordinal else { bail!("--device: expected cpu, cuda:N or cuda:auto, found {device:?}") };
        if self.precision() != PrecisionArg::Bf16 {
            bail!("--device {device} computes in bf16: leave --precision {} out", self.precision().of_cpu().name());
        }
        if self.threads.is_some() {
            bail!("--device {device} has no threads to choose: leave --threads out");
        }
        open_cuda(device, ordinal)
    }
}

/// The threads of one of several ranks on this machine: its share of the processors, and no more than the launcher has
/// bound it to.
fn threads_of_rank() -> Option<usize> {
    let (_, ranks) = on_this_machine();
    let bound = std::thread::available_parallelism().ok().filter(|_| ranks > 1)?.get();
    let processors = std::fs::read_to_string("/proc/cpuinfo").ok()?.matches("processor\t:").count();
    Some(bound.min(processors / ranks).max(1))
}

/// `--threads`, checked.
pub fn threads(threads: Option<Count>) -> Result<Option<usize>, Usage> {
    match threads.map(Count::get) {
        Some(threads) if threads > MOST_THREADS => {
            Err(Usage(format!("--threads {threads}: expected a whole number from 1 to {MOST_THREADS}")))
        }
        threads => Ok(threads),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(device: &str, ordinal: u32) -> Result<Device> {
    let gpu = Gpu::open(ordinal).with_context(|| format!("--device {device}"))?;
    Ok(Device::Cuda(Cuda::new(gpu)))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(device: &str, _ordinal: u32) -> Result<Device> {
    bail!("--device {device}: this build has no CUDA; build hydra with --features cuda")
}

/// Opens a model's files, downloading them first if `model` is a name on the hub.
pub fn open_model(model: &str) -> Result<Checkpoint> {
    Ok(Checkpoint::open(&locate(model)?)?)
}

impl ModelArgs {
    /// Opens the model's files.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        open_model(&self.model)
    }
}
