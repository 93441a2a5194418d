//! The files of a model: in a folder, or in memory under the same names.

use crate::json::Object;
use crate::{Error, Result};
use bytes::Bytes;
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The most bytes of a file that is read whole: a configuration, a template, or tokenizer.json, which has up to 40 MB.
const MOST_BYTES: u64 = 256 << 20;

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
            None => read(&self.name(name)).map(Into::into),
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

/// Reads a small file whole.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let length = regular(path)?;
    if length > MOST_BYTES {
        let message = format!("{length} bytes: expected at most {MOST_BYTES}");
        return Err(Error::Format { path: path.into(), offset: None, message });
    }
    std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })
}

/// A file's size. A folder, a pipe or a device is none of a checkpoint's files: opening a pipe waits for its writer, and a
/// device may give bytes without end.
fn regular(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
    if !metadata.is_file() {
        return Err(Error::Format { path: path.into(), offset: None, message: "not a regular file".into() });
    }
    Ok(metadata.len())
}

/// Maps a file into memory.
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    let io = |source| Error::Io { path: path.into(), source };
    regular(path)?;
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is private and read-only; that nobody truncates the file under it is `Checkpoint::open`'s
    // documented contract, as it is of every engine that maps its weights.
    let mapped = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(mapped))
}
