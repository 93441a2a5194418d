//! How much memory there is, and how much this process has used.

mod limits;

use crate::ranks::on_this_machine;
use anyhow::{Result, bail};
use hydra_runtime::adapter::AdapterConfig;
use hydra_runtime::backend::Backend;
use hydra_runtime::config::Config;
use hydra_runtime::train::{TrainOptions, Trainer};

/// Bytes in MiB, for people.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What a run's memory depends on, besides the device and the model.
#[derive(Clone, Copy)]
pub struct Training<'a> {
    /// The adapter.
    pub adapter: &'a AdapterConfig,
    /// The trainer's options.
    pub options: &'a TrainOptions,
    /// Passes of the step that has the most.
    pub passes: usize,
    /// Whether there are several ranks.
    pub shared: bool,
    /// Tokens of the passes in which the eval loss is measured, if there is an eval set.
    pub eval_tokens: Option<usize>,
}

/// The most bytes that a run takes beside the weights, on the device alone if that has memory of its own.
pub fn of_training<B: Backend>(backend: &B, config: &Config, training: &Training<'_>) -> Result<u64> {
    let &Training { adapter, options, passes, shared, eval_tokens } = training;
    let trainer = Trainer::plan_bytes(backend, config, adapter, options)?;
    let trainer = trainer.saturating_add(Trainer::<B>::sum_bytes(config, adapter, passes));
    let of_host = if backend.free_bytes()?.is_none() { 4 } else { 0 };
    let copy = adapter.parameters(config).saturating_mul(of_host);
    // Between ranks a gradient travels in a buffer of its own.
    let trainer = trainer.saturating_add(if shared { copy } else { 0 });
    let evaluator = match eval_tokens {
        Some(tokens) => Trainer::evaluator_bytes(backend, config, adapter, options, tokens)?,
        None => 0,
    };
    // The adapter before the first step, and as it is read from the trainer; beside it the evaluator, or the file as it
    // is saved.
    let copies = copy.saturating_mul(2).saturating_add(evaluator.max(copy));
    Ok(trainer.saturating_add(copies))
}

/// Fails if `what` takes more bytes than the device has free. In the machine's memory every rank that works there takes
/// as much.
pub fn require_on<B: Backend>(backend: &B, bytes: u64, what: &str) -> Result<()> {
    match backend.free_bytes()? {
        Some(free) => compare(bytes, free, what, " on the device"),
        None => require(bytes.saturating_mul(on_this_machine().1 as u64), what),
    }
}

/// Fails if `what` takes more bytes than the system has free. Where the system doesn't say, nothing is refused.
pub fn require(bytes: u64, what: &str) -> Result<()> {
    free().map_or(Ok(()), |free| compare(bytes, free, what, ""))
}

/// The bytes that the system has free for this process, where it says.
pub fn free() -> Option<u64> {
    let machine = kib_of("/proc/meminfo", "MemAvailable:").map(|kib| kib.saturating_mul(1024));
    [machine, limits::left()].into_iter().flatten().min()
}

fn compare(bytes: u64, free: u64, what: &str, place: &str) -> Result<()> {
    if bytes > free {
        bail!("{what} needs {:.1} MiB, and {:.1} MiB of memory are free{place}", mib(bytes), mib(free));
    }
    Ok(())
}

/// Forgets the peak so far. Where that isn't possible, [`peak`] covers the whole life of the process.
pub fn reset_peak() {
    // proc(5): 5 resets the peak resident set size to the current one.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The largest resident set in bytes since [`reset_peak`], including touched pages of mapped weights; `None` where the
/// system doesn't say.
pub fn peak() -> Option<u64> {
    Some(kib_of("/proc/self/status", "VmHWM:")? * 1024)
}

/// The number after `key` in a file of proc(5), most often in KiB.
fn kib_of(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}
