//! Files that are replaced whole or not at all.
//!
//! Each file is written beside its destination, flushed to the disk and only then renamed. With several files, all are
//! written before the first is renamed: a full disk leaves what was there before. A [`NewFolder`] is filled under another
//! name and renamed when it is complete.

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

/// Replaces one file with what `fill` writes at the path that it is given, for what shouldn't be in memory as a whole.
pub fn fill_atomically(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = beside(path)?;
    let at = |source| Error::Io { path: path.into(), source };
    let write = || {
        let permissions = File::create(&temporary).and_then(|file| file.metadata()).map_err(at)?.permissions();
        fill(&temporary)?;
        // Whoever filled it may have made another file of it.
        fs::set_permissions(&temporary, permissions).map_err(at)?;
        File::open(&temporary).and_then(|file| file.sync_all()).map_err(at)?;
        fs::rename(&temporary, path).map_err(at)
    };
    let result = write();
    match result {
        Ok(()) => flush_parent(path),
        // The first error is the one to report.
        Err(_) => drop(fs::remove_file(&temporary)),
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
    files.iter().for_each(|(path, _)| flush_parent(path));
    Ok(())
}

/// Fails if [`write_atomically`] couldn't even begin a file at `path`; leaves nothing there.
pub fn try_beside(path: &Path) -> Result<()> {
    let temporary = beside(path)?;
    let tried = File::create(&temporary).and_then(|_| fs::remove_file(&temporary));
    tried.map_err(|source| Error::Io { path: path.into(), source })
}

/// A rename lasts once its folder is flushed. Some systems can't open folders, and have nothing to flush then.
fn flush_parent(path: &Path) {
    if let Some(Ok(folder)) = path.parent().map(File::open) {
        let _ = folder.sync_all();
    }
}

/// A adapter_state name in the same folder, this process's own.
fn beside(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::Invalid(format!("{}: not a file's name", path.display())));
    };
    Ok(path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id())))
}

/// A folder that is not there until it is complete; dropped before that, nothing of it stays.
pub struct NewFolder {
    temporary: PathBuf,
    destination: PathBuf,
    kept: bool,
}

impl NewFolder {
    /// Begins a folder that will be at `destination`, where there is nothing or an empty folder.
    pub fn begin(destination: &Path) -> Result<Self> {
        let at = |source| Error::Io { path: destination.into(), source };
        // A link can't be renamed over: what it leads to is meant.
        if fs::symlink_metadata(destination).is_ok_and(|there| there.is_symlink()) {
            return Self::begin(&fs::canonicalize(destination).map_err(at)?);
        }
        match fs::read_dir(destination).map(|mut entries| entries.next().is_some()) {
            Ok(true) => return Err(Error::Invalid(format!("{} is not empty", destination.display()))),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(at(error)),
            _ => {}
        }
        let temporary = beside(destination)?;
        if let Some(parent) = temporary.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(at)?;
        }
        fs::create_dir(&temporary).map_err(at)?;
        Ok(Self { temporary, destination: destination.into(), kept: false })
    }

    /// Where to write its files.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Flushes its files and puts it at its destination.
    pub fn keep(mut self) -> Result<()> {
        let keep = || {
            for entry in fs::read_dir(&self.temporary)? {
                File::open(entry?.path())?.sync_all()?;
            }
            fs::rename(&self.temporary, &self.destination)
        };
        keep().map_err(|source| Error::Io { path: self.destination.clone(), source })?;
        self.kept = true;
        flush_parent(&self.destination);
        Ok(())
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.kept {
            // There is an error to report already, and no better one to be had here.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}
