//! A run's folder, in which one process works at a time.

use anyhow::{Context, Result, bail};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The lock's file. It is never removed: whoever removed it could remove another process's.
const LOCK: &str = ".lock";

/// Whether a folder is absent, or holds nothing but a lock.
pub fn vacant(folder: &Path) -> Result<bool> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => Ok(entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == LOCK))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error).with_context(|| format!("--out {}", folder.display())),
    }
}

/// Keeps other processes out of a folder; the system releases it when the process ends, however it ends.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Fails at once if another process, or another part of this one, holds the folder's lock.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("--out {}: another process is working there", folder.display()),
            // An error means that this file system has no locks.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
        }
    }
}

/// Makes `folder`, if it isn't there, and locks it.
pub fn claim(folder: &Path) -> Result<Lock> {
    std::fs::create_dir_all(folder).with_context(|| format!("can't make --out {}", folder.display()))?;
    Lock::take(folder)
}

/// A run's folder, held by this process.
pub struct RunDir {
    /// The folder.
    pub path: PathBuf,
    /// Steps between saves.
    pub save_every: Option<usize>,
    /// Whether the run continues from the state that is saved there.
    pub resume: bool,
    _lock: Lock,
}

impl RunDir {
    /// The folder `path`, which `lock` keeps other processes out of until the run is over.
    pub fn new(path: PathBuf, save_every: Option<usize>, resume: bool, lock: Lock) -> Self {
        Self { path, save_every, resume, _lock: lock }
    }
}
