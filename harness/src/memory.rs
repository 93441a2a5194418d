//! The most memory that this process has held, where the system says it.

/// Forgets the peak so far. Where that isn't possible, [`peak`] is of the whole process.
pub fn reset_peak() {
    // proc(5): 5 resets the peak resident set size to what is resident now.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Bytes resident at most since [`reset_peak`], the touched pages of mapped weights among them; `None` where nothing says so.
pub fn peak() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}
