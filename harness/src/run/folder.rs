//! A run's folder, in which one process works at a time.

use anyhow::{Context, Result, bail};
use hydra_runtime::atomic::{is_temporary, remove_leftovers};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{DirEntry, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The lock's file. It is never removed: whoever removed it could remove another process's.
const LOCK: &str = ".lock";

/// Whether a folder is absent, or holds nothing but a lock and what killed processes left.
pub fn vacant(folder: &Path) -> Result<bool> {
    let counts = |entry: DirEntry| entry.file_name() != LOCK && !is_leftover(&entry.file_name());
    match std::fs::read_dir(folder) {
        Ok(mut entries) => Ok(!entries.any(|entry| entry.map_or(true, counts))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error).with_context(|| format!("--out {}", folder.display())),
    }
}

/// Whether a name is a temporary one: ours, that of the crate safetensors (".tmp" and six letters or digits), or that of an
/// earlier version (".NAME.PROCESS.tmp").
fn is_leftover(name: &OsStr) -> bool {
    let text = name.to_string_lossy();
    let random = |text: &str| text.len() == 6 && text.chars().all(|c| c.is_ascii_alphanumeric());
    let process = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    let earlier = || text.strip_suffix(".tmp")?.strip_prefix('.')?.rsplit_once('.');
    is_temporary(name) || text.strip_prefix(".tmp").is_some_and(random) || earlier().is_some_and(|(_, id)| process(id))
}

/// Fails for a pipe, a socket or a device: opening it waits for another process, or has no end.
pub fn no_pipe(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(there) if !there.is_file() && !there.is_dir() => {
            bail!("{}: expected a regular file, found a pipe, a socket or a device", path.display())
        }
        _ => Ok(()),
    }
}

/// Makes a folder, if it isn't there, and removes what killed processes left in it. Fails if it has a pipe in it, under whichever
/// of its files' names.
pub fn make(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    entries.flatten().try_for_each(|entry| no_pipe(&entry.path()))?;
    remove_leftovers(folder);
    Ok(())
}

/// The error of a folder that another process has locked.
#[derive(Debug)]
pub struct Busy(PathBuf);

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--out {}: another process is working there", self.0.display())
    }
}

impl std::error::Error for Busy {}

/// Keeps other processes out of a folder; the system releases it when the process ends, however it ends.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Fails at once, with [`Busy`], if another process, or another part of this one, holds the folder's lock.
    pub fn take(folder: &Path) -> Result<Self> {
        Self::take_by(folder, File::try_lock)
    }

    /// A lock that several may hold at the same time, but not beside one of [`Lock::take`].
    pub fn share(folder: &Path) -> Result<Self> {
        Self::take_by(folder, File::try_lock_shared)
    }

    fn take_by(folder: &Path, lock: fn(&File) -> Result<(), TryLockError>) -> Result<Self> {
        let path = folder.join(LOCK);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        match lock(&file) {
            Err(TryLockError::WouldBlock) => Err(Busy(folder.into()).into()),
            // An error means that this file system has no locks.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
        }
    }
}

/// Makes `folder`, if it isn't there, locks it, and removes what killed processes left in it.
pub fn claim(folder: &Path) -> Result<Lock> {
    make(folder).context("--out")?;
    let lock = Lock::take(folder)?;
    // Who wrote these can't be asked; but here only the holder of the lock writes.
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries.flatten().filter(|entry| is_leftover(&entry.file_name()) && !is_temporary(&entry.file_name()))
    {
        // What can't be removed does no harm.
        let _ = std::fs::remove_file(entry.path());
    }
    Ok(lock)
}

/// A run's folder, held by this process or by rank 0 for it.
pub struct RunDir {
    /// The folder.
    pub path: PathBuf,
    /// Steps between saves.
    pub save_every: Option<usize>,
    /// Whether the run continues from the state that is saved there.
    pub resume: bool,
    /// What identifies the run, for that state.
    pub run: String,
    /// On rank 0, which alone uses the folder.
    _lock: Option<Lock>,
}

impl RunDir {
    /// The folder `path` of a `run`, which `lock` keeps other processes out of until that is over. On rank 0, it has the lock.
    pub fn new(path: PathBuf, save_every: Option<usize>, resume: bool, run: String, lock: Option<Lock>) -> Self {
        Self { path, save_every, resume, run, _lock: lock }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_known_by_their_names() {
        for name in [".hydra-tmp-1-x7Yz", ".tmpAb3dEf", ".run.json.17.tmp", ".adapter_model.safetensors.1.tmp"] {
            assert!(is_leftover(OsStr::new(name)), "{name}");
        }
        for name in ["run.json", ".tmp", ".tmpx", ".notes.tmp", ".a.b.tmp", "a.1.tmp", ".lock"] {
            assert!(!is_leftover(OsStr::new(name)), "{name}");
        }
    }
}
