//! The files of a model: in a folder, or in memory under the same names.

use crate::json::Object;
use crate::{Error, Result};
use bytes::Bytes;
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Where a model's files are.
#[derive(Clone)]
pub(crate) struct Files {
    /// The folder. For files in memory, what messages call it.
    path: PathBuf,
    memory: Option<BTreeMap<String, Bytes>>,
}

impl Files {
    pub fn folder(path: &Path) -> Self {
        Self { path: path.into(), memory: None }
    }

    pub fn memory(files: BTreeMap<String, Bytes>) -> Self {
        Self { path: "<memory>".into(), memory: Some(files) }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What messages call a file.
    pub fn name(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether there is such a file.
    pub fn has(&self, name: &str) -> bool {
        match &self.memory {
            Some(files) => files.contains_key(name),
            None => self.name(name).is_file(),
        }
    }

    /// Reads a file whole.
    pub fn read(&self, name: &str) -> Result<Bytes> {
        match &self.memory {
            Some(files) => files.get(name).cloned().ok_or_else(|| self.missing(name)),
            None => match std::fs::read(self.name(name)) {
                Ok(bytes) => Ok(bytes.into()),
                Err(source) => Err(Error::Io { path: self.name(name), source }),
            },
        }
    }

    /// A file's bytes, mapped if it is on a disk.
    pub fn map(&self, name: &str) -> Result<Bytes> {
        match &self.memory {
            Some(files) => files.get(name).cloned().ok_or_else(|| self.missing(name)),
            None => map(&self.name(name)),
        }
    }

    /// Reads a JSON object.
    pub fn object(&self, name: &str) -> Result<Object> {
        match &self.memory {
            Some(_) => Object::parse(&self.name(name), &self.read(name)?),
            None => Object::read(&self.name(name)),
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::Io { path: self.name(name), source: std::io::ErrorKind::NotFound.into() }
    }
}

/// Maps a file into memory.
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    let io = |source| Error::Io { path: path.into(), source };
    // A folder, a pipe or a device can't be a checkpoint: mapping one may do anything, and opening a pipe waits for its writer.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::Format { path: path.into(), offset: None, message: "not a regular file".into() });
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is private and read-only; that nobody truncates the file under it is `Checkpoint::open`'s
    // documented contract, as it is of every engine that maps its weights.
    let mapped = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(mapped))
}
