//! How much memory there is, and how much this process has used.

use anyhow::{Result, bail};
use hydra_runtime::backend::Backend;

/// Bytes in MiB, for people.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Fails if `what` takes more bytes than the device has free.
pub fn require_on<B: Backend>(backend: &B, bytes: u64, what: &str) -> Result<()> {
    match backend.free_bytes()? {
        Some(free) => compare(bytes, free, what, " on the device"),
        None => require(bytes, what),
    }
}

/// Fails if `what` takes more bytes than the system has free. Where the system doesn't say, nothing is refused.
pub fn require(bytes: u64, what: &str) -> Result<()> {
    match kib_of("/proc/meminfo", "MemAvailable:") {
        Some(kib) => compare(bytes, kib.saturating_mul(1024), what, ""),
        None => Ok(()),
    }
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

/// The largest resident set in bytes since [`reset_peak`], including touched pages of mapped weights; `None` where the system
/// doesn't say.
pub fn peak() -> Option<u64> {
    Some(kib_of("/proc/self/status", "VmHWM:")? * 1024)
}

/// The number after `key` in a file of proc(5).
fn kib_of(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}
