//! One process at a time in a run's folder.

use anyhow::{Context, Result, bail};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::Path;

/// Its name. It stays: who would take it away could take another's.
const FILE: &str = ".lock";

/// Whether nothing but a lock is in a folder, or there is none.
pub fn vacant(folder: &Path) -> Result<bool> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => Ok(entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == FILE))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error).with_context(|| format!("--out {}", folder.display())),
    }
}

/// Held, others are refused; the system takes it back when the process ends, however it does.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Fails at once if another process, or another part of this one, has the folder.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("--out {}: another process is at work there", folder.display()),
            // Or there are no locks on this file system.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
        }
    }
}
