//! Files that are replaced whole or not at all.
//!
//! Each file is written beside its destination, flushed to the disk and only then renamed. With several files, all are
//! written before the first is renamed: a full disk leaves what was there before.

use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Replaces one file.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_all_atomically(&[(path.to_path_buf(), bytes)])
}

/// Replaces several files; none before all of them are on the disk.
pub fn write_all_atomically(files: &[(PathBuf, &[u8])]) -> Result<()> {
    let mut written = Vec::with_capacity(files.len());
    let result = write_and_rename(files, &mut written);
    if result.is_err() {
        for temporary in written {
            // The first error is the one to report; what was renamed is no longer there.
            let _ = fs::remove_file(temporary);
        }
    }
    result
}

fn write_and_rename(files: &[(PathBuf, &[u8])], written: &mut Vec<PathBuf>) -> Result<()> {
    for (path, bytes) in files {
        let temporary = beside(path)?;
        written.push(temporary.clone());
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    for ((path, _), temporary) in files.iter().zip(written.iter()) {
        fs::rename(temporary, path).map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    for (path, _) in files {
        // A rename lasts once its folder is flushed. Some systems can't open folders, and have nothing to flush then.
        if let Some(Ok(folder)) = path.parent().map(File::open) {
            let _ = folder.sync_all();
        }
    }
    Ok(())
}

/// A hidden name in the same folder, this process's own.
fn beside(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::Invalid(format!("{}: not a file's name", path.display())));
    };
    Ok(path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id())))
}
